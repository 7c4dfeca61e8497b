"""Settings that trainer=deepspeed refuses; training is tested in tests/slow."""

import pytest
import torch
from torch import nn

from plugins.trainer.deepspeed import Sharded
from sandbox.contracts import ConfigError
from sandbox.model.offload import freeze
from tests.training_sessions import small

pytest.importorskip("deepspeed")


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as e:
        small(
            "trainer=deepspeed_zero2", "trainer.stage=4", "trainer.bad_step=skip",
            "trainer.bucket=0", "optimizer=muon", "precision=fp16",
        )  # fmt: skip
    message = str(e.value)
    for part in (
        "trainer.stage=4",
        "trainer.bad_step='skip'",
        "trainer.bucket=0",
    ):
        assert part in message


def test_muon_and_fp16_are_refused():
    with pytest.raises(ConfigError) as e:
        small("trainer=deepspeed_zero2", "optimizer=muon", "precision=fp16")
    message = str(e.value)
    assert "trainer=deepspeed: shards weights into flat pieces" in message
    assert "optimizer=muon" in message
    assert "trainer=deepspeed: does not support the gradient scaler of fp16" in message


@pytest.mark.parametrize("stage", [2, 3])
def test_presets_match_the_published_stages_2_and_3(stage):
    for name, offload in (("", False), ("_offload", True)):
        cfg = small(f"trainer=deepspeed_zero{stage}{name}").trainer
        assert (cfg.stage, cfg.offload) == (stage, offload)


class Joined(nn.Module):
    """A frozen and a trained child."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = freeze(nn.Linear(2, 2)), nn.Linear(2, 2)


def test_the_largest_modules_without_a_frozen_child_are_sharded():
    trained, untrained = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2).requires_grad_(False)
    system = nn.ModuleList([trained, joined := Joined(), untrained])
    (parts,) = Sharded(system).children()
    assert [*parts.children()] == [trained, joined.trained]


def test_trained_weights_next_to_a_frozen_child_are_refused():
    joined = Joined()
    joined.token = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="Joined has trained weights and a frozen child"):
        Sharded(nn.ModuleList([joined]))
