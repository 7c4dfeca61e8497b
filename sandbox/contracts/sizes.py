"""Sizes of clips and latents, and what conditioning offers: plain numbers that Configs agree on."""

from __future__ import annotations

from dataclasses import dataclass

# Of the pixels of a clip; the loader, and sampling, tell them of every clip.
SIZES = ("height", "width", "aspect_ratio")  # aspect_ratio: height / width
SCALARS = frozenset({"fps", "frame_stride", "ofs", *SIZES})


@dataclass(frozen=True)
class Clip:
    """A size, of pixels or of latents: (channels, frames, height, width). An image has frames=1."""

    channels: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Tokens:
    """A sequence that conditioning offers: `length` tokens of `width`, for each of `frames` (1: the
    same for all).
    """

    width: int
    length: int
    masked: bool = False
    frames: int = 1


@dataclass(frozen=True)
class Slots:
    """What conditioning offers a backbone. `concat` counts channels, `vector` is a width, 0 or None
    is absent.
    """

    context: Tokens | None = None
    image_context: Tokens | None = None
    concat: int = 0
    vector: int = 0
    scalars: frozenset[str] = frozenset()

    def names(self) -> frozenset[str]:
        """The filled slots and the scalars."""
        filled = {n for n in ("context", "image_context", "concat", "vector") if getattr(self, n)}
        return frozenset(filled) | self.scalars
