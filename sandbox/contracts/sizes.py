"""Sizes of clips and latents, and the slots of conditioning, as plain numbers."""

from dataclasses import dataclass

# Pixel sizes of a clip; the loader and the samplers set them for every clip.
SIZES = ("height", "width", "aspect_ratio")  # aspect_ratio: height / width
SCALARS = frozenset({"fps", "frame_stride", "ofs", *SIZES})
LABEL = "label"  # number of the class of a clip
NUMBERS = SCALARS | {LABEL}  # numbers of a sample and of Batch.scalars


@dataclass(frozen=True)
class Clip:
    """Size of pixels or latents: (channels, frames, height, width). An image has frames=1."""

    channels: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Tokens:
    """A token sequence from conditioning: `length` tokens of `width` for each of `frames`.

    frames=1: all frames share the tokens.
    """

    width: int
    length: int
    masked: bool = False
    frames: int = 1


@dataclass(frozen=True)
class Hidden:
    """The output of a block of a backbone.

    axes: its axes as einops names them, of b, t, h, w and d: "b t (h w) d". channels: the length of
    d. cells: latent cells (frames, rows, columns) per position.
    """

    axes: str
    channels: int
    cells: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Slots:
    """The conditions that a backbone receives; 0 or None is absent.

    `concat` is a number of channels, `vector` a width. Conditioning gives `scalars`, the training
    method and the sampler `time_scalars`, which have the unit of the backbone's time.
    """

    context: Tokens | None = None
    image_context: Tokens | None = None
    concat: int = 0
    vector: int = 0
    scalars: frozenset[str] = frozenset()
    time_scalars: frozenset[str] = frozenset()

    def names(self) -> frozenset[str]:
        """Names of the filled slots and the scalars."""
        filled = {n for n in ("context", "image_context", "concat", "vector") if getattr(self, n)}
        return frozenset(filled) | self.scalars
