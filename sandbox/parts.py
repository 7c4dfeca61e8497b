"""The components of a wired system, built from their complete Configs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from sandbox import registry
from sandbox.config import Root
from sandbox.contracts import Backbone, Conditioner, FirstStage, Guidance, Loss, Sampler, Schedule
from sandbox.wiring import Wiring


@dataclass
class Parts:
    first_stage: FirstStage
    conditioner: Conditioner
    backbone: Backbone
    schedule: Schedule
    loss: Loss
    sampler: Sampler
    guidance: Guidance


def build_parts(wiring: Wiring) -> Parts:
    """Builds every component, and says which kernels they use."""
    root = wiring.root
    registry.create(root.kernels).apply()
    groups = ("vae", "conditioning", "backbone", "schedule", "loss", "sampler", "guidance")
    return Parts(*(build(group, root) for group in groups))


def build(group: str, root: Root) -> Any:
    """One component; its initial weights depend on (seed, its group) alone.

    So a run with another first stage starts its backbone from the same weights.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(_mix(root.seed, group))
        return registry.create(getattr(root, group))


def _mix(seed: int, group: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=7).digest(), "little"
    )
