"""What trainer=deepspeed refuses, before anything starts; how it trains: tests/slow."""

import pytest

from sandbox.contracts import ConfigError
from tests.engine import small

pytest.importorskip("deepspeed")


def test_what_it_cannot_do_is_told_together():
    with pytest.raises(ConfigError) as e:
        small(
            "trainer=deepspeed_zero2", "trainer.stage=3", "trainer.bad_step=skip",
            "trainer.bucket=0", "optimizer=muon", "precision=fp16",
        )  # fmt: skip
    said = str(e.value)
    for part in (
        "trainer.stage=3: want 1 or 2; trainer=fsdp2",
        "trainer.bad_step='skip'",
        "trainer.bucket=0",
    ):
        assert part in said


def test_an_optimizer_of_whole_matrices_and_the_scaler_of_fp16_are_refused():
    with pytest.raises(ConfigError) as e:
        small("trainer=deepspeed_zero2", "optimizer=muon", "precision=fp16")
    said = str(e.value)
    assert "trainer=deepspeed cuts weights into flat pieces" in said
    assert "optimizer=muon" in said
    assert "trainer=deepspeed: its engine does not know the scaler of fp16" in said


def test_its_presets_are_the_published_ones_of_stage_2():
    for name, offload in (("deepspeed_zero2", False), ("deepspeed_zero2_offload", True)):
        cfg = small(f"trainer={name}").trainer
        assert (cfg.stage, cfg.offload) == (2, offload)
