"""Data flow of one micro-batch, with shapes, as boxes and arrows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sandbox.config.root import Root
from sandbox.contracts import Clip
from sandbox.plan.build import Sizes, needs_first_stage
from sandbox.plan.step_inputs import conditions


@dataclass(frozen=True)
class Box:
    """A component at a (column, row) of the diagram."""

    name: str
    lines: tuple[str, ...]
    column: int
    row: int
    is_frozen: bool = False


@dataclass(frozen=True)
class Arrow:
    source: str
    target: str
    label: str


def diagram(root: Root, sizes: Sizes) -> dict[str, list[Any]]:
    """The boxes and arrows of the training step, from left to right."""
    return {"boxes": [*_boxes(root, sizes)], "arrows": [*_arrows(root, sizes)]}


def _name(group: str, root: Root) -> str:
    return f"{group}={getattr(root, group).plugin.rpartition('/')[2]}"


def _boxes(root: Root, sizes: Sizes) -> Iterator[Box]:
    yield Box("data", (_name("data", root), f"{sizes.batch} clips, {sizes.clip}"), 0, 0)
    stored = not needs_first_stage(root)
    first = "cached latents" if stored else f"{sizes.clip} -> {sizes.latents}"
    yield Box("first stage", (_name("vae", root), first), 1, 0, True)
    slots = len(sizes.slots.names())
    yield Box("conditioning", (_name("conditioning", root), f"condition slots: {slots}"), 1, 1)
    yield Box("schedule", (_name("schedule", root), "adds noise at t"), 2, 0)
    backbone = _name("backbone", root)
    adapter = f"with {_name('adapter', root)}" if root.adapter is not None else "all weights"
    yield Box("backbone", (backbone, adapter), 3, 1, root.adapter is not None)
    yield Box("loss", (_name("loss", root), f"on {root.schedule.predicts()}"), 4, 0)


def _arrows(root: Root, sizes: Sizes) -> Iterator[Arrow]:
    provides, b, grid = root.data.provides(), sizes.batch, sizes.grid
    if "stored" in provides:
        yield Arrow("data", "first stage", f"latents {b}x...x{_space(sizes.latents)}")
    else:
        yield Arrow("data", "first stage", f"video {b}x{sizes.clip}")
    fields = sorted(root.conditioning.needs() & provides) or ["nothing"]
    yield Arrow("data", "conditioning", ", ".join(fields))
    if root.conditioning.encodes():
        yield Arrow("first stage", "conditioning", "latents of images")
    yield Arrow("first stage", "schedule", f"z0 {b}x{grid}")
    yield Arrow("schedule", "backbone", f"z_t {b}x{grid}, t {b}")
    for label in _conditions(sizes):
        yield Arrow("conditioning", "backbone", label)
    out = f"{grid.channels * root.schedule.outputs()}x{_space(grid)}"
    yield Arrow("backbone", "loss", f"out {b}x{out}")
    yield Arrow("schedule", "loss", f"target {b}x{grid}, weight {b}")


def _space(clip: Clip) -> str:
    return f"{clip.frames}x{clip.height}x{clip.width}"


def _conditions(sizes: Sizes) -> Iterator[str]:
    with torch.device("meta"):
        cond = conditions(sizes)
    for name in ("context", "image_context", "concat", "vector"):
        if (tensor := getattr(cond, name)) is not None:
            is_masked = name == "context" and cond.context_mask is not None
            yield f"{name} {'x'.join(map(str, tensor.shape))}{' (masked)' * is_masked}"
    if cond.scalars:
        yield f"{', '.join(sorted(cond.scalars))} {sizes.batch}"
