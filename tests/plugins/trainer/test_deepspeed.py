"""What trainer=deepspeed refuses, before anything starts; how it trains: tests/slow."""

import pytest
import torch
from torch import nn

from plugins.trainer.deepspeed import Sharded
from sandbox.contracts import ConfigError
from sandbox.module import freeze
from tests.engine import small

pytest.importorskip("deepspeed")


def test_what_it_cannot_do_is_told_together():
    with pytest.raises(ConfigError) as e:
        small(
            "trainer=deepspeed_zero2", "trainer.stage=4", "trainer.bad_step=skip",
            "trainer.bucket=0", "optimizer=muon", "precision=fp16",
        )  # fmt: skip
    said = str(e.value)
    for part in (
        "trainer.stage=4",
        "trainer.bad_step='skip'",
        "trainer.bucket=0",
    ):
        assert part in said


def test_an_optimizer_of_whole_matrices_and_the_scaler_of_fp16_are_refused():
    with pytest.raises(ConfigError) as e:
        small("trainer=deepspeed_zero2", "optimizer=muon", "precision=fp16")
    said = str(e.value)
    assert "trainer=deepspeed: shards weights into flat pieces" in said
    assert "optimizer=muon" in said
    assert "trainer=deepspeed: does not support the gradient scaler of fp16" in said


@pytest.mark.parametrize("stage", [2, 3])
def test_its_presets_are_the_published_ones_of_stages_2_and_3(stage):
    for name, offload in (("", False), ("_offload", True)):
        cfg = small(f"trainer=deepspeed_zero{stage}{name}").trainer
        assert (cfg.stage, cfg.offload) == (stage, offload)


class Joined(nn.Module):
    """A frozen part beside a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = freeze(nn.Linear(2, 2)), nn.Linear(2, 2)


def test_weights_are_cut_in_the_largest_parts_without_a_frozen_one():
    trained, untrained = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2).requires_grad_(False)
    system = nn.ModuleList([trained, joined := Joined(), untrained])
    (parts,) = Sharded(system).children()
    assert [*parts.children()] == [trained, joined.trained]


def test_weights_of_its_own_in_a_part_with_a_frozen_one_are_refused():
    joined = Joined()
    joined.token = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="Joined has trained weights and a frozen child"):
        Sharded(nn.ModuleList([joined]))
