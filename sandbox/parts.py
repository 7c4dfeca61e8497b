"""The components of a wired system, built from their complete Configs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sandbox import registry
from sandbox.config import Root
from sandbox.contracts import (
    Adapter,
    Backbone,
    Conditioner,
    FirstStage,
    Guidance,
    Loss,
    Sampler,
    Schedule,
)
from sandbox.stored import StoredLatents, needs_no_pixels
from sandbox.wiring import Wiring

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Parts:
    first_stage: FirstStage
    conditioner: Conditioner
    backbone: Backbone
    schedule: Schedule
    loss: Loss
    sampler: Sampler
    guidance: Guidance
    adapter: Adapter | None = None


def build_parts(wiring: Wiring) -> Parts:
    """Builds every component, and says which kernels they use."""
    root = wiring.root
    use_kernels(root)
    groups = ("vae", "conditioning", "backbone", "schedule", "loss", "sampler", "guidance")
    parts = Parts(*(_component(group, root) for group in groups))
    if root.adapter is not None:
        parts.adapter = adapter = registry.create(root.adapter)
        with seeded(root, "adapter"):
            targets, dtype = root.backbone.adapter_targets(), DTYPES[root.precision]
            adapter.apply(parts.backbone, targets, dtype)
    return parts


def use_kernels(root: Root) -> None:
    """Sets which implementation runs each hot operation. Raises ConfigError where it cannot."""
    registry.create(root.kernels).apply()


def _component(group: str, root: Root) -> Any:
    return StoredLatents(root) if group == "vae" and needs_no_pixels(root) else build(group, root)


def build(group: str, root: Root) -> Any:
    """One component; its initial weights depend on (seed, its group) alone.

    So a run with another first stage starts its backbone from the same weights.
    """
    with seeded(root, group):
        return registry.create(getattr(root, group))


@contextmanager
def seeded(root: Root, group: str) -> Iterator[None]:
    """The global generator inside the block depends on (seed, group) alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(_mix(root.seed, group))
        yield


def _mix(seed: int, group: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=7).digest(), "little"
    )
