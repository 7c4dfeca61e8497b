"""Image files as 8-bit sRGB, for data plugins and prompts: `read_rgb`.

Ordinary 8-bit RGB images keep their bytes. Everything else is converted as follows:

- Bit depth: integers are scaled by the range of their type. Floats, and 32-bit integers, by the
  smallest of 1 (floats only), 255, 65535, and 2^31 - 1 and 2^32 - 1 (integers only) that covers
  them; otherwise, or with negative values, from their minimum to their maximum.
- Transparency, of any kind, is composited on white.
- An EXIF orientation is applied; of animations and multi-page files the first image is read.
- An ICC profile is converted to sRGB (perceptual); profiles that are damaged, or of another kind of
  pixels than the file's, are ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from sandbox.contracts import BadItem
from sandbox.data.file_kinds import kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Extensions of the images that data plugins read. A file's content decides how it is decoded.
IMAGES = (
    ".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".jfif"
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
ORIENTATION = 274
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLES = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1  # of TIFF_PHOTOMETRIC, of TIFF_SAMPLES

log = logging.getLogger(__name__)


class Media(Protocol):
    """A path, or a range of bytes in another file."""

    @property
    def suffix(self) -> str: ...
    def open(self, mode: Literal["rb"], /) -> IO[bytes]: ...


def read_rgb(path: Media) -> Image:
    """An image file as a Pillow image of mode RGB. Raises BadItem."""
    with _opened(path) as image:
        deep_colour = _has_deep_colour(image)
        try:
            image.load()
        except Exception as e:  # decoders raise struct.error, KeyError, RuntimeError, ..., too
            raise _unreadable(e) from e
        if deep_colour and "transparency" in image.info:  # Pillow keeps the upper 8 bits
            image.info["transparency"] = tuple(v >> 8 for v in image.info["transparency"])
        try:
            return _on_white(_upright(_eight_bits(image)))
        except (ValueError, OSError) as e:  # a mode that Pillow does not convert
            raise _unreadable(e) from e


def image_size(path: Media) -> tuple[int, int]:
    """Height and width as displayed (EXIF), from the header. Raises BadItem."""
    with _opened(path) as image:
        # Pillow applies the orientation of TIFF files itself.
        is_rotated = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if is_rotated else (image.height, image.width)


@contextmanager
def _opened(path: Media) -> Iterator[Image]:
    """The image, not decoded yet. Raises BadItem."""
    try:
        file = path.open("rb")
    except OSError as e:
        raise _unreadable(e) from e
    with file, _identified(file) as image:
        yield image


def _identified(file: IO[bytes]) -> Image:
    """Raises BadItem."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise _bad(f"more than {most} pixels; resize it") from e
    except UnidentifiedImageError as e:
        file.seek(0)
        raise _bad(_kind(file.read(64))) from e
    except Exception as e:
        raise _unreadable(e) from e


def _kind(start: bytes) -> str:
    found = kind_of(start)
    if found and found.endswith(" image"):
        return found.replace("it is a", "it is a damaged", 1)
    return found or f"it is damaged, or no {', '.join(FORMATS)} that Pillow reads"


def _unreadable(e: Exception) -> BadItem:
    reason = e.strerror if isinstance(e, OSError) else None
    return _bad(reason or str(e) or type(e).__name__)


def _bad(reason: str) -> BadItem:
    return BadItem(f"cannot be read as an image ({reason})")


def _has_deep_colour(image: Image) -> bool:
    """Whether a PNG has 16-bit RGB pixels, which Pillow reduces to 8 bits."""
    tile: Any = getattr(image, "tile", None)
    return image.mode == "RGB" and bool(tile) and tile[0][3] == "RGB;16B"


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata of a healthy image
        _warn_of_damage(getattr(image.fp, "name", "an image"))  # type: ignore[attr-defined]
        return 1


@cache
def _warn_of_damage(name: str) -> None:
    log.warning("%s: damaged EXIF data: its orientation is unknown, it is read as stored", name)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image


def _eight_bits(image: Image) -> Image:
    """Grey images of more than 8 bits as L, or LA with transparency. Raises BadItem."""
    from PIL import Image

    if image.mode not in DEEP:
        return image
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(TIFF_BITS) == (32,) and tags.get(TIFF_SAMPLES, (1,)) == (UNSIGNED,):
        values = values.view(np.uint32) if image.mode == "I" else values  # Pillow's are signed
    low, high = _range(values, image, tags)
    # Doubles: 2^31 - 1 is no float32.
    levels = np.rint((values.astype(np.float64) - low) * (255 / ((high - low) or 1)))
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    grey = Image.fromarray(levels.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    grey.info |= {k: v for k, v in image.info.items() if k != "transparency"}
    grey.getexif()[ORIENTATION] = _orientation(image)
    return grey


def _range(values: np.ndarray, image: Image, tags: Any) -> tuple[float, float]:
    """The values that become black and white. Raises BadItem."""
    if not np.isfinite(values).all():
        raise _bad("some values are not finite")
    low, high = float(values.min()), float(values.max())
    bits = tags.get(TIFF_BITS, (16,))[0]
    if image.mode.startswith("I;16"):  # of 12 bits, too
        return 0, 2**bits - 1
    if image.mode == "I" and bits == 16 and image.format == "TIFF" and low >= 0:  # signed
        return 0, 2**15 - 1
    if image.mode == "I" and image.format != "TIFF":
        return 0, 65535  # Pillow's mode for 16-bit PNG in some versions
    limits = (1, 255, 65535) if image.mode == "F" else (255, 65535, 2**31 - 1, 2**32 - 1)
    fitting = [limit for limit in limits if low >= 0 and high <= limit]
    return (0, fitting[0]) if fitting else (low, high)


def _on_white(image: Image) -> Image:
    """sRGB without transparency."""
    from PIL import Image

    icc = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return _srgb(image.convert("RGB") if image.mode in ("P", "1") else image, icc)
    if image.mode == "La":
        image = image.convert("LA")
    is_grey = image.mode in ("L", "LA")
    rgba = image.convert("RGBA")
    colours = rgba.getchannel("R") if is_grey else rgba.convert("RGB")
    rgb = _srgb(colours, icc)
    rgb.putalpha(rgba.getchannel("A"))
    white = Image.new("RGBA", rgb.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgb).convert("RGB")


def _srgb(image: Image, icc: bytes | None) -> Image:
    """RGB, from a mode without transparency."""
    from PIL import ImageCms

    if image.mode == "LAB":
        return _applied(image, _transform(None, "LAB"))
    try:
        mode, transform = _of_profile(icc) if icc else ("", None)
        if transform and mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if transform and mode == image.mode:
            return _applied(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        pass  # a damaged profile of a healthy image
    return image.convert("RGB")


def _applied(image: Image, transform: Any) -> Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is not in place
    return converted


@lru_cache(maxsize=16)
def _of_profile(icc: bytes) -> tuple[str, Any]:
    """The mode that a profile describes, and its transform to sRGB: None if it is sRGB.

    Raises Pillow's errors.
    """
    from PIL import Image, ImageCms

    profile = ImageCms.ImageCmsProfile(BytesIO(icc))
    core: Any = profile.profile
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(core.xcolor_space.strip())
    if mode is None:
        return "", None
    transform = _transform(profile, mode)
    if mode == "RGB":  # sRGB, up to rounding: the bytes stay as they are
        grid = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), -1).astype(np.uint8)
        probe = grid.reshape(1, -1, 3)
        got = np.asarray(_applied(Image.fromarray(probe), transform))
        if np.abs(got.astype(int) - probe).max() <= 2:
            return mode, None
    return mode, transform


def _transform(profile: Any, mode: str) -> Any:
    """Raises PyCMSError."""
    from PIL import ImageCms

    source = ImageCms.createProfile("LAB") if profile is None else profile
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
