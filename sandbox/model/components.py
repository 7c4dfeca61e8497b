"""The components of a wired system, built from their complete Configs."""

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
    Features,
    FirstStage,
    Guidance,
    Loss,
    Method,
    Sampler,
    Schedule,
)
from sandbox.model.cached_latents import CachedLatents, reads_only_cached_latents

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Parts:
    first_stage: FirstStage
    conditioner: Conditioner
    backbone: Backbone
    schedule: Schedule
    loss: Loss
    method: Method
    sampler: Sampler
    guidance: Guidance
    adapter: Adapter | None = None
    features: Features | None = None


def build_parts(wiring: Wiring, empty: bool = False) -> Parts:
    """Builds every component and sets the kernels.

    `empty`: leaves the backbone's weights uninitialised (not an adapter's), in the dtype they keep.
    The caller loads all of them.
    """
    root = wiring.root
    use_kernels(root)
    groups = ("vae", "conditioning", "backbone", "schedule", "loss", "method", "sampler",
              "guidance")  # fmt: skip
    special = {"vae": _first_stage, "backbone": _empty if empty else build}
    parts = Parts(*(special.get(group, build)(group, root) for group in groups))
    # sandbox.config.conformance compares what the plugins return with these
    parts.backbone._outputs = root.schedule.outputs()  # type: ignore[attr-defined]
    parts.conditioner._slots = wiring.slots[0]  # type: ignore[attr-defined]
    parts.first_stage._latents = dict(  # type: ignore[attr-defined]
        zip(wiring.clips, wiring.latents, strict=True)
    )
    if root.features is not None:
        parts.features = build("features", root)
    if root.adapter is not None:
        parts.adapter = adapter = registry.create(root.adapter)
        with seeded(root, "adapter"):
            targets, dtype = root.backbone.adapter_targets(), DTYPES[root.precision]
            adapter.apply(parts.backbone, targets, dtype)
    return parts


def use_kernels(root: Root) -> None:
    """Selects the implementation of each hot operation. ConfigError where it cannot run here."""
    registry.create(root.kernels).apply()


def _first_stage(group: str, root: Root) -> Any:
    return CachedLatents(root) if reads_only_cached_latents(root) else build(group, root)


def _empty(group: str, root: Root) -> Any:
    """A component with uninitialised memory, since its weights are loaded next.

    A component with tensors outside its state dict, or with additions, is built as usual.
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
    """One component. Its initial weights depend only on the seed and its group.

    So runs that differ in another component start from the same weights here.
    """
    with seeded(root, group):
        return registry.create(getattr(root, group))


@contextmanager
def seeded(root: Root, group: str) -> Iterator[None]:
    """Seeds the global generator inside the block from (seed, group) alone."""
    with torch.random.fork_rng(devices=()):
        digest = hashlib.blake2b(f"{root.seed}/{group}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))
        yield
