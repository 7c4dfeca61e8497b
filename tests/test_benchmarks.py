"""Benchmarks run at tiny size, those that need a GPU on a CPU."""

import json

import pytest

from benchmarks import decoding, gpu_first_stages
from benchmarks.gpu_training_steps import MEASURED, SYSTEMS, configured, main


@pytest.mark.slow
def test_training_steps_of_a_tiny_recipe_are_measured(tmp_path):
    main(["--tiny", "ldm_celebahq_vq4", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "training_steps.json").read_text())["rows"]
    assert len(row["seconds"]) == MEASURED and min(row["seconds"]) > 0
    assert abs(sum(row["kinds"].values()) - 1) < 1e-9
    assert row["kinds"]["convolution"] > 0
    assert "tiny sibling" in (tmp_path / "training_steps.md").read_text()


@pytest.mark.slow
def test_every_case_of_every_system_composes_at_full_size():
    for name, system in SYSTEMS.items():
        for case in system.cases:
            root = configured(name, case, "init_from=base")  # adapters need it
            assert root.recipe == name and root.data.height >= 128
            assert root.trainer.processes == 1


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [False, True])
def test_every_case_of_a_first_stage_composes(tiny):
    sizes = {(case.name, gpu_first_stages.configured(case).data.height)
             for case in gpu_first_stages.cases(tiny)}  # fmt: skip
    assert len(sizes) == (6 if tiny else 10)


@pytest.mark.slow
def test_every_decoder_returns_all_frames_or_a_reason(tmp_path):
    decoding.main(["--clips", "1", "--rounds", "1", "--out", str(tmp_path)])
    rows = {row["way"]: row for row in json.loads((tmp_path / "decoding.json").read_text())["rows"]}
    want = {"all 96 frames": 96, "16 frames of each": 16, "images": 8}
    for way, row in rows.items():
        expected = want[way.rpartition(", ")[2]]
        assert row.get("frames") == expected or row["cannot"], way
    ran = [way for way, row in rows.items() if "frames" in row]
    assert sum(way.startswith(("data=webdataset", "plain PyAV")) for way in ran) == 7
