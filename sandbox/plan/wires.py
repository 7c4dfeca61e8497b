"""Data flow of one micro-batch, with shapes, as boxes and arrows."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.config.root import Root
from sandbox.contracts import Clip
from sandbox.plan.build import Sizes, needs_first_stage


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


@dataclass(frozen=True)
class Diagram:
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def diagram(root: Root, sizes: Sizes) -> Diagram:
    """The training step, from left to right."""
    return Diagram(tuple(_boxes(root, sizes)), tuple(_arrows(root, sizes)))


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
    slots, b, grid = sizes.slots, sizes.batch, sizes.grid
    if (text := slots.context) is not None:
        yield f"context {b}x{text.length}x{text.width}" + (" (masked)" if text.masked else "")
    if (image := slots.image_context) is not None:
        yield f"image_context {b}x{image.frames}x{image.length}x{image.width}"
    if slots.concat:
        yield f"concat {b}x{slots.concat}x{_space(grid)}"
    if slots.vector:
        yield f"vector {b}x{slots.vector}"
    if slots.scalars:
        yield f"{', '.join(sorted(slots.scalars))} {b}"
