"""The components of a wired system, built from their complete Configs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.config.wiring import Wiring
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
from sandbox.model.cached_latents import StoredLatents, needs_no_pixels

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


def build_parts(wiring: Wiring, empty: bool = False) -> Parts:
    """Builds every component, and says which kernels they use.

    `empty`: the backbone's weights, those of an adapter apart, hold anything; all are put in place
    afterwards. Then they are made once, in the dtype that they stay in.
    """
    root = wiring.root
    use_kernels(root)
    groups = ("vae", "conditioning", "backbone", "schedule", "loss", "sampler", "guidance")
    special = {"vae": _first_stage, "backbone": _empty if empty else build}
    parts = Parts(*(special.get(group, build)(group, root) for group in groups))
    if root.adapter is not None:
        parts.adapter = adapter = registry.create(root.adapter)
        with seeded(root, "adapter"):
            targets, dtype = root.backbone.adapter_targets(), DTYPES[root.precision]
            adapter.apply(parts.backbone, targets, dtype)
    return parts


def use_kernels(root: Root) -> None:
    """Sets which implementation runs each hot operation. Raises ConfigError where it cannot."""
    registry.create(root.kernels).apply()


def _first_stage(group: str, root: Root) -> Any:
    return StoredLatents(root) if needs_no_pixels(root) else build(group, root)


def _empty(group: str, root: Root) -> Any:
    """A component without a first pass over its memory: numbers are written when they are known.

    Built as usual where it has tensors that no file of weights holds.
    """
    with torch.device("meta"):
        module = registry.create(getattr(root, group))
    tensors = {id(x) for x in (*module.parameters(), *module.buffers())}
    held = {id(x) for x in module.state_dict(keep_vars=True).values()}
    if tensors != held or getattr(root, group).additions():
        return build(group, root)
    if root.adapter is not None:
        module.to(DTYPES[root.precision])
    return module.to_empty(device="cpu")


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
