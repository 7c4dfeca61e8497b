"""Benchmarks that need a GPU take the same path at tiny size on a CPU."""

import json

import pytest

from benchmarks.gpu_training_steps import MEASURED, SYSTEMS, configured, main


@pytest.mark.slow
def test_training_steps_of_a_tiny_recipe_are_measured(tmp_path):
    main(["--tiny", "ldm_celebahq_vq4", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "training_steps.json").read_text())["rows"]
    assert len(row["seconds"]) == MEASURED and min(row["seconds"]) > 0
    assert abs(sum(row["kinds"].values()) - 1) < 1e-9
    assert row["kinds"]["convolution"] > 0
    assert "tiny sibling" in (tmp_path / "training_steps.md").read_text()


def test_every_case_of_every_system_is_a_configuration_of_its_full_size():
    for name, system in SYSTEMS.items():
        for case in system.cases:
            root = configured(name, case, "init_from=base")  # which an adapter wants
            assert root.recipe == name and root.data.height >= 256
            assert root.trainer.processes == 1
