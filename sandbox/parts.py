"""The components of a wired system, built from their complete Configs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from sandbox import registry
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
    """Builds every component; each one's initial weights depend on (seed, its group) alone.

    So a run with another first stage starts its backbone from the same weights.
    """
    root = wiring.root
    registry.create(root.kernels).apply()
    made = {}
    with torch.random.fork_rng(devices=()):
        for group in ("vae", "conditioning", "backbone", "schedule", "loss", "sampler", "guidance"):
            torch.manual_seed(_mix(root.seed, group))
            made[group] = registry.create(getattr(root, group))
    first_stage, conditioner, backbone, *rest = made.values()
    return Parts(first_stage, conditioner, backbone, *rest)


def _mix(seed: int, group: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=7).digest(), "little")
