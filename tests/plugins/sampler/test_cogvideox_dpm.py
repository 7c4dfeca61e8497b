"""The CogVideoX sampler against recorded trajectories."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plugins.sampler.cogvideox_dpm import CogVideoXDPM
from plugins.schedule.ddpm import DDPM
from sandbox.data.randomness import Recorded
from sandbox.model.sampling import PlainHooks

GOLDEN = Path(__file__).parents[2] / "golden/cogvideox/scheduler.safetensors"


class States(PlainHooks):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        self.seen.append(z_t)
        return z_t


@pytest.mark.parametrize(("variant", "shift"), [("2b", 3.0), ("5b", 1.0)])
@pytest.mark.parametrize("steps", [5, 7])
def test_recorded_trajectories_are_reproduced(variant, shift, steps):
    want = {k.removeprefix(f"{variant}/N{steps}/"): v for k, v in load_file(GOLDEN).items()}
    schedule = DDPM(DDPM.Config(zero_terminal_snr=True, prediction="v", snr_shift=shift))
    draws = Recorded({f"sampler_noise_{i}": n for i, n in enumerate(want["dpm_noise"])})
    states = States()
    end = CogVideoXDPM(CogVideoXDPM.Config())(
        lambda z, t, step: want["model_outputs_v"][step],
        schedule,
        want["x_T"],
        steps,
        draws,
        states,
    )
    got = torch.stack([*states.seen[1:], end])
    torch.testing.assert_close(got, want["dpm_x"], atol=1e-5, rtol=1e-5)
