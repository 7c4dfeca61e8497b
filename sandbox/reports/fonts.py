"""Text on images: DejaVu Sans, and for other characters a font of the system that has them."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.config.secrets import without_secrets

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

ELLIPSIS = "..."

log = logging.getLogger(__name__)


@cache
def font(size: int, bold: bool = False, path: str | None = None) -> FreeTypeFont:
    """The font of a file, by default DejaVu Sans, which comes with matplotlib."""
    from PIL import ImageFont

    return ImageFont.truetype(path or _default(bold), size)


@cache
def _default(bold: bool) -> str:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))


@cache
def _glyphs(path: str) -> Any:
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


def _has(path: str, character: str) -> bool:
    return _glyphs(path).get_char_index(ord(character)) != 0


@cache
def _font_with(character: str) -> str | None:
    """A font file of the system with a glyph for a character; None without one, said once."""
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        try:
            if _has(path, character) and font(14, path=path).getlength(character):
                return path
        except (OSError, RuntimeError, ValueError):  # damaged, or of bitmaps alone
            continue
    _warn_of_boxes()
    return None


@cache
def _warn_of_boxes() -> None:
    log.warning(
        "captions have characters that no font of this system has; they are drawn as boxes "
        "(install a font, such as Noto Sans CJK)"
    )


def runs(text: str, size: int, bold: bool = False) -> list[tuple[FreeTypeFont, str]]:
    """The text in parts of one font each."""
    default = _default(bold)

    def path_of(character: str) -> str | None:
        plain = character.isspace() or not character.isprintable() or _has(default, character)
        return None if plain else _font_with(character)

    parts = [(path, "".join(part)) for path, part in groupby(text, path_of)]
    return [(font(size, bold and path is None, path), part) for path, part in parts]


def length(text: str, size: int, bold: bool = False) -> float:
    """Width in pixels."""
    return sum(face.getlength(part) for face, part in runs(text, size, bold))


def draw_text(
    draw: ImageDraw, at: tuple[int, int], text: str, ink: Any, size: int, bold: bool = False
) -> None:
    """Draws a line of text; `at` is its upper left corner."""
    left, top = float(at[0]), at[1]
    ascent = font(size, bold).getmetrics()[0]
    for face, part in runs(text, size, bold):
        draw.text((left, top + ascent), part, ink, face, anchor="ls")
        left += face.getlength(part)


def wrap(text: str, width: int, size: int, most: int, bold: bool = False) -> list[str]:
    """Lines of at most `width` pixels, without secrets; text beyond `most` lines is cut with an
    ellipsis.
    """
    text = without_secrets(text)

    def fits(line: str) -> bool:
        return length(line, size, bold) <= width

    lines: list[str] = []
    for paragraph in text[: (most + 1) * width].splitlines():  # a character has a pixel or more
        line = ""
        for word in paragraph.split():
            if fits(f"{line} {word}".strip()):
                line = f"{line} {word}".strip()
                continue
            lines += [line] if line else []
            while len(word) > 1 and not fits(word):  # wider than the column: cut anywhere
                cut = max(1, _longest(word[:width], fits))
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    cut = _longest(last, lambda line: fits(line + ELLIPSIS))
    return [*lines[: most - 1], last[:cut].rstrip() + ELLIPSIS]


def _longest(text: str, fits: Callable[[str], bool]) -> int:
    """The number of first characters that fit."""
    return bisect_left(range(1, len(text) + 1), True, key=lambda n: not fits(text[:n]))
