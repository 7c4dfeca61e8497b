"""guidance=cfg_pp against algorithm 2 of its paper, and what it is refused with."""

import pytest
import torch

from plugins.guidance.cfg_pp import GuidedClean
from plugins.sampler.ddim import DDIM
from plugins.sampler.euler import Euler
from plugins.schedule.ddpm import DDPM
from plugins.schedule.flow import Flow
from sandbox.cli.jobs import check_and_wire
from sandbox.contracts import Conditions, ConfigError
from sandbox.data.randomness import Keyed
from sandbox.model.sampling import denoise
from tests.helpers import composed

STEPS, SCALE = 6, 0.7


def network(z, t, cond):
    """Another linear function of z with conditions than without."""
    given = cond.vector.view(-1, 1, 1, 1, 1)
    return z * (0.3 + 0.2 * given) + 0.1 * given


def sampled(schedule, sampler, z, guidance):
    full, none = guidance.passes(("text",))
    passes = [(full, Conditions(vector=torch.ones(2))), (none, Conditions(vector=torch.zeros(2)))]
    draws = Keyed(0, 0, torch.arange(2), 2)
    return denoise(network, schedule, guidance, passes, sampler, z, STEPS, draws)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_step_adds_the_unconditional_noise_to_the_guided_estimate(name):
    if name == "ddim":
        schedule, sampler = DDPM(DDPM.Config()), DDIM(DDIM.Config(spacing="trailing"))
    else:
        schedule, sampler = Flow(Flow.Config()), Euler(Euler.Config())
    z = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    got = sampled(schedule, sampler, z, GuidedClean(GuidedClean.Config(guidance_scale=SCALE)))

    times = schedule.times(STEPS, "trailing")
    for i, t in enumerate(times):
        t = t.expand(2)
        full, uncond = (
            network(z, t, Conditions(vector=torch.full((2,), float(x)))) for x in (1, 0)
        )
        clean = schedule.denoised(uncond + SCALE * (full - uncond), z, t).z0
        eps = schedule.denoised(uncond, z, t).eps
        if i + 1 < STEPS:
            after = times[i + 1].expand(2)
            z = schedule.noised(clean, eps, after)
        else:
            z = clean
    torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-5)


def test_it_is_refused_with_a_sampler_that_steps_from_the_clean_estimate_alone():
    message = "guidance=cfg_pp chooses the noise .* sampler=dpmpp_2m steps .* use sampler=ddim or"
    with pytest.raises(ConfigError, match=message):
        check_and_wire(composed("guidance=cfg_pp", "schedule=ddpm", "sampler=dpmpp_2m"))


def test_its_scale_interpolates():
    (problem,) = GuidedClean.Config(guidance_scale=2.0).problems()
    assert problem.startswith("guidance_scale=2.0")
