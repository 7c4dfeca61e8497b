"""stage=[captions]: captions by file name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox import config, registry
from sandbox.contracts import DataError, VideoFile

config.setup()

INFO = VideoFile("", 96, 64, 40, 4.0, 10.0)


def captions_of(root, *sources, **settings):
    stage = registry.create(replace(registry.default("stage", "captions"), **settings))
    rows = [
        {"source": s, "path": root / s, "info": INFO, "start": 0.0, "end": 4.0} for s in sources
    ]
    return [x.get("caption", x.get("drop")) for x in stage.judge(rows)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a red\nball\n")
    (tmp_path / "sub" / "a.txt").write_text("a blue ball")
    (tmp_path / "captions.csv").write_text('file,caption\nb.mp4,"two dogs, one cat"\n')
    return tmp_path


def test_captions_come_from_text_files_and_the_table(root):
    found = captions_of(root, "sub/a.mp4", "b.mp4", "a.mp4", "a.mp4", "c.mp4")
    assert found == ["a blue ball", "two dogs, one cat", "a red ball", "a red ball", ""]


def test_missing_captions_follow_the_setting(root):
    assert captions_of(root, "c.mp4", missing="drop") == ["has no caption"]
    text = "{name} of {folder}, {width}x{height}, {seconds} s"
    assert captions_of(root, "sub/my_red-dog.mp4", missing="template", template=text) == [
        "my red dog of sub, 96x64, 4.0 s"
    ]


def test_a_table_with_two_captions_for_a_file_is_an_error(root):
    (root / "captions.csv").write_text("file,caption\nb.mp4,one\nb.mp4,two\n")
    with pytest.raises(DataError, match="two captions"):
        captions_of(root, "b.mp4")


@pytest.mark.parametrize("template", ["{nmae}", "{name", "{}"])
def test_a_bad_template_is_a_config_problem(template):
    cfg = replace(registry.default("stage", "captions"), template=template)
    assert [p for p in cfg.problems() if p.startswith("template=")]
