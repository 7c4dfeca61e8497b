"""Long prompts and many prompts: read from a file, done in seconds, shortened where shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL.ImageFont import FreeTypeFont

from sandbox.cli.command_line import parse
from sandbox.cli.jobs import check
from sandbox.config import composition, discovery
from sandbox.config.secrets import mask_text
from sandbox.contracts import ConfigError
from sandbox.evaluation.prompt_checks import read_prompts, short
from sandbox.reports.media import wrap
from sandbox.reports.sample_files import SHEET_ROWS, file_name, write_samples

LONG = {
    "words": "a red " * 17_000,
    "one word": "x" * 100_000,
    "wide word": "W" * 100_000,
    "lines": "a\n" * 50_000,
    "settings": "a=b " * 25_000,
    "dots": "a.b-c+" * 17_000,
    "chinese": "\u732b" * 100_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_prompt_of_100_kB_is_measured_a_few_times_only(tmp_path, kind, monkeypatch):
    text, measured = LONG[kind], []
    getlength = FreeTypeFont.getlength
    monkeypatch.setattr(
        FreeTypeFont, "getlength", lambda font, part: measured.append(part) or getlength(font, part)
    )
    video = torch.zeros(1, 3, 1, 8, 8)
    paths = write_samples(tmp_path / "out", [text], video, 8.0, {})
    assert len(wrap(text, 900, 18, most=3)) <= 3
    assert len(mask_text(text)) == len(text) and len(short([text])) < 100
    overrides = composition.expand_shorthands(["task=sample", f"prompts=[{text}]"])
    assert len(overrides[1]) >= len(text)
    assert all(len(p.name) < 80 for p in paths) and len(file_name(text)) <= 60
    assert sum(map(len, measured)) < 5 * len(text)


def test_a_sheet_of_many_prompts_shows_the_first_and_says_so(tmp_path, caplog):
    count = SHEET_ROWS + 50
    captions = [f"a red {i}" for i in range(count)]
    paths = write_samples(tmp_path / "out", captions, torch.zeros(count, 3, 1, 4, 4), 8.0, {})
    assert len(paths) == count + 1
    assert f"shows the first {SHEET_ROWS} of {count} clips" in caplog.text


FILES = {  # content, and its prompts or the words of the error
    "plain": (b"a red 3\nb\n", ("a red 3", "b")),
    "empty lines": (b"\n  a  \r\n\r\nb\n\n", ("a", "b")),
    "byte order mark": (b"\xef\xbb\xbfa\n", ("a",)),
    "special": ("a (red), \u732b: 'x' ${y}\n".encode(), ("a (red), \u732b: 'x' ${y}",)),
    "long": (b"x" * 200_000 + b"\na\n", ("x" * 200_000, "a")),
    "nothing": (b"\n\n", "no prompts in it; want one prompt a line"),
    "latin": (b"caf\xe9\n", "want UTF-8 text"),
    "binary": (b"\x89PNG\xff\xfe\x00", "want UTF-8 text"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_prompts_has_one_a_line(tmp_path, kind):
    content, found = FILES[kind]
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    if isinstance(found, tuple):
        assert read_prompts(str(path)) == found
        return
    with pytest.raises(ConfigError, match=found):
        read_prompts(str(path))


def test_a_file_of_prompts_that_is_missing_or_too_large_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(str(tmp_path))
    monkeypatch.setattr("sandbox.evaluation.prompt_checks.LARGEST", 3)
    (tmp_path / "a").write_text("a red 3")
    with pytest.raises(ConfigError, match="7 bytes; want at most 3"):
        read_prompts(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompts_file=lost.txt"], "task.prompts_file=lost.txt: no such file"),
        (["prompts_file=a.txt", "prompts=[a]"], "set prompts as well; keep one of them"),
    ],
)
def test_a_file_of_prompts_is_checked_before_anything_is_built(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a\n")
    Path("weights").mkdir()
    line = parse(["task=sample", "init_from=weights", "vae=identity", *words])
    discovery.setup(line.overrides)
    overrides = composition.expand_shorthands(line.overrides)
    with pytest.raises(ConfigError, match=said):
        check(line.compose(overrides), overrides)
