"""Text on images: characters that DejaVu Sans lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2]
TEXTS = {
    "Chinese": "\u4e00\u53ea\u732b",
    "Japanese": "\u306d\u3053",
    "Korean": "\uace0\uc591\uc774",
    "Hindi": "\u092c\u093f",
    "Thai": "\u0e41\u0e21\u0e27",
    "emoji": "\U0001f9a7",
}
DRAW = """
import sys
from PIL import Image, ImageDraw
from sandbox.reports.fonts import draw_text, runs
image = Image.new("L", (300, 30))
for _ in range(2):
    draw_text(ImageDraw.Draw(image), (5, 5), sys.argv[1], 255, 14)
print([(face.getname()[0], len(part)) for face, part in runs(sys.argv[1], 14)])
"""


def write_font(path: Path, characters: str) -> None:
    """A font whose glyphs are squares."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for i, at in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if i else pen.moveTo)(at)
    pen.closePath()
    square, names = pen.glyph(), [f"g{i}" for i in range(len(characters))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *names])
    font.setupCharacterMap({ord(c): n for c, n in zip(characters, names, strict=True)})
    font.setupGlyf(dict.fromkeys([".notdef", *names], square))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True)
    font.save(path)


def drawn(text: str, data_home: Path) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", DRAW, text], cwd=HOME, capture_output=True, text=True, check=True,
        env=os.environ | {"XDG_DATA_HOME": str(data_home), "HOME": str(data_home)},
    )  # fmt: skip
    return done.stdout, done.stderr


def test_a_font_of_the_system_draws_what_the_usual_one_lacks(tmp_path):
    letters = "".join(TEXTS.values())
    write_font(tmp_path / "fonts" / "squares.ttf", "".join(sorted({*letters})))
    out, err = drawn(f"a cat, {letters}!", tmp_path)
    assert "boxes" not in err
    wanted = [("DejaVu Sans", 7), ("Squares", len(letters)), ("DejaVu Sans", 1)]
    assert out.strip() == str(wanted) or "Squares" not in out  # the system has such a font


@pytest.mark.parametrize("script", ["Chinese", "emoji"])
def test_boxes_are_said_once(tmp_path, script):
    _, err = drawn(f"a cat, {TEXTS[script]} {TEXTS[script]}", tmp_path)
    assert err.count("boxes") <= 1
    if not _is_known(TEXTS[script]):
        assert err.count("drawn as boxes") == 1


def _is_known(text: str) -> bool:
    from sandbox.reports.fonts import _font_with

    return all(_font_with(c) for c in text)


def test_usual_text_is_drawn_as_before():
    from PIL import Image, ImageDraw

    from sandbox.reports.fonts import draw_text, font

    text = "a red 3 \u00c4\u00e9\u0416 moving (qj), x\u00b2"
    plain, ours = (Image.new("L", (300, 30)) for _ in range(2))
    ImageDraw.Draw(plain).text((5, 5), text, 255, font(14))
    draw_text(ImageDraw.Draw(ours), (5, 5), text, 255, 14)
    assert plain.tobytes() == ours.tobytes()
