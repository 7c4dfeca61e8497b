"""stage=[split]: all clips of a source are in one split."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox import config, registry
from sandbox.contracts import VideoFile

config.setup()


def sides(sources, **settings):
    stage = registry.create(replace(registry.default("stage", "split"), **settings))
    rows = [{"source": s, "info": VideoFile(s.split("/")[-1], 8, 8, 8, 1.0, 8.0)} for s in sources]
    return [verdict["split"] for verdict in stage.judge(rows)]


def test_clips_of_a_source_stay_together_when_others_are_added():
    sources = [f"s{i % 50}" for i in range(200)]
    found = sides(sources, fraction=0.3)
    side = dict(zip(sources, found, strict=True))
    assert found == [side[s] for s in sources]
    assert 5 <= [*side.values()].count("val") <= 25
    more = sides([*sources, *(f"t{i}" for i in range(50))], fraction=0.3)
    assert more[:200] == found


def test_identical_files_are_one_source():
    found = sides([f"{folder}/f{i}" for i in range(20) for folder in "ab"], fraction=0.5)
    assert found[::2] == found[1::2]


def test_files_of_a_folder_can_be_one_source():
    found = sides([f"{i % 10}/f{i}" for i in range(100)], fraction=0.4, source="folder")
    assert all(len({*found[i::10]}) == 1 for i in range(10))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_sources_give_one_for_validation(count):
    assert sides([f"s{i}" for i in range(count)]).count("val") == (count > 1)
