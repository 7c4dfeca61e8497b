"""stage=[captions]: a caption belongs to a file by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox import config, registry
from sandbox.contracts import DataError, VideoFile

config.setup()

INFO = VideoFile("", 96, 64, 40, 4.0, 10.0)


def said(root, *sources, **settings):
    stage = registry.create(replace(registry.default("stage", "captions"), **settings))
    rows = [
        {"source": s, "path": root / s, "info": INFO, "start": 0.0, "end": 4.0} for s in sources
    ]
    return [x.get("caption", x.get("drop")) for x in stage.decide(rows)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a red\nball\n")
    (tmp_path / "sub" / "a.txt").write_text("a blue ball")
    (tmp_path / "captions.csv").write_text('file,caption\nb.mp4,"two dogs, one cat"\n')
    return tmp_path


def test_captions_come_from_files_and_the_table_by_name(root):
    found = said(root, "sub/a.mp4", "b.mp4", "a.mp4", "a.mp4", "c.mp4")
    assert found == ["a blue ball", "two dogs, one cat", "a red ball", "a red ball", ""]


def test_what_becomes_of_clips_without_one_is_a_setting(root):
    assert said(root, "c.mp4", missing="drop") == ["has no caption"]
    text = "{name} of {folder}, {width}x{height}, {seconds} s"
    assert said(root, "sub/my_red-dog.mp4", missing="template", template=text) == [
        "my red dog of sub, 96x64, 4.0 s"
    ]


def test_a_table_with_two_captions_for_a_file_is_refused(root):
    (root / "captions.csv").write_text("file,caption\nb.mp4,one\nb.mp4,two\n")
    with pytest.raises(DataError, match="two captions"):
        said(root, "b.mp4")


@pytest.mark.parametrize("template", ["{nmae}", "{name", "{}"])
def test_a_template_that_cannot_be_filled_is_refused_at_once(template):
    cfg = replace(registry.default("stage", "captions"), template=template)
    assert [p for p in cfg.problems() if p.startswith("template=")]
