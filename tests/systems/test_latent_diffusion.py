"""Latent diffusion against its formulas, for published settings that no recording covers.

The formulas are those of latent-diffusion's DDPM and DDIM sampler, in float64. A recorded
trajectory checks them.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from plugins.guidance.none import NoGuidance
from plugins.loss.ldm import LDMLoss
from plugins.sampler.ddim import DDIM
from plugins.sampler.ddpm import Ancestral
from plugins.schedule.ddpm import DDPM, buffers
from sandbox.contracts import FULL, Conditions
from sandbox.data.randomness import Recorded
from sandbox.model.sampling import denoise
from tests.golden_weights import recording

BETAS = (0.0015, 0.0195)
FACTS, TENSORS = recording("ldm", "ddim")
X_T = TENSORS["in/x_T"].double().numpy()


@dataclass
class Original:
    """The tables of latent-diffusion's `register_schedule` (schedule "linear")."""

    timesteps: int
    v_posterior: float = 0.0

    def __post_init__(self) -> None:
        low, high = np.sqrt(BETAS)
        self.betas = np.linspace(low, high, self.timesteps, dtype=np.float64) ** 2
        self.abar = np.cumprod(1 - self.betas)
        self.prev = np.append(1.0, self.abar[:-1])
        v = self.v_posterior
        lower = self.betas * (1 - self.prev) / (1 - self.abar)
        self.variance = (1 - v) * lower + v * self.betas
        self.coef1 = self.betas * np.sqrt(self.prev) / (1 - self.abar)
        self.coef2 = (1 - self.prev) * np.sqrt(1 - self.betas) / (1 - self.abar)
        with np.errstate(divide="ignore"):
            weights = self.betas**2 / (2 * self.variance * (1 - self.betas) * (1 - self.abar))
        self.lvlb = np.append(weights[1], weights[1:])

    def x0(self, x, out, t):
        return (x - np.sqrt(1 - self.abar[t]) * out) / np.sqrt(self.abar[t])

    def ddim(self, x, steps: int, eta: float, noise) -> list:
        """The states after each step of `DDIMSampler` with uniform times."""
        times = np.arange(0, self.timesteps, self.timesteps // steps) + 1
        before = np.append(self.abar[0], self.abar[times[:-1]])
        states = []
        for i in range(len(times))[::-1]:
            a, a_prev = self.abar[times[i]], before[i]
            sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
            out = stub(x, times[i])
            direction = np.sqrt(1 - a_prev - sigma**2) * out
            x = np.sqrt(a_prev) * self.x0(x, out, times[i]) + direction
            x = x + sigma * noise[len(states)]
            states.append(x)
        return states

    def ancestral(self, x, noise) -> np.ndarray:
        """The result of `p_sample_loop`."""
        for i, t in enumerate(range(self.timesteps)[::-1]):
            x = self.coef1[t] * self.x0(x, stub(x, t), t) + self.coef2[t] * x
            x = x + (t > 0) * np.sqrt(self.variance[t]) * noise[i]
        return x


def stub(x, t):
    """A network that depends on the time; the original passes t itself."""
    return 0.8 * x + 0.3 * np.cos(t / 200) - 0.1


def backbone(z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    return 0.8 * z_t + 0.3 * torch.cos(t / 200).view(-1, 1, 1, 1, 1) - 0.1


def sampled(schedule: DDPM, sampler, steps: int, noise) -> Tensor:
    z = torch.from_numpy(X_T).float()[:, :, None]
    draws = Recorded(
        {f"sampler_noise_{i}": torch.from_numpy(n).float()[:, :, None] for i, n in enumerate(noise)}
    )
    guidance = NoGuidance(NoGuidance.Config())
    passes = [(FULL, Conditions())]
    return denoise(backbone, schedule, guidance, passes, sampler, z, steps, draws)[:, :, 0]


def near(got, want, tolerance: float = 2e-5) -> None:
    got, want = (np.asarray(x, dtype=np.float64) for x in (got, want))
    assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


def made(timesteps: int, v_posterior: float = 0.0) -> DDPM:
    cfg = DDPM.Config(betas=BETAS, timesteps=timesteps, v_posterior=v_posterior)
    assert not list(cfg.problems())
    return DDPM(cfg)


def noises(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *X_T.shape))


def test_the_formulas_give_the_recorded_levels():
    for name in ("eta0", "eta1"):
        case = FACTS["cases"][name]
        alphas = Original(1000).abar[case["timesteps_visited"]][::-1]
        near(alphas, case["ddim_alphas"], 1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    ("timesteps", "steps"), [(600, 20), (600, 7), (250, 25), (1000, 20), (1500, 30), (2000, 11)]
)
def test_ddim_trajectories_equal_the_published_ones_for_any_schedule_length(timesteps, steps, eta):
    noise = noises(steps + 20)
    sampler = DDIM(DDIM.Config(spacing="uniform", end="first", eta=eta))
    got = sampled(made(timesteps), sampler, steps, noise)
    near(got, Original(timesteps).ddim(X_T, steps, eta, noise)[-1], 1e-4)


@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("timesteps", [200, 600, 1000])
def test_ancestral_trajectories_equal_the_published_ones(timesteps, v_posterior):
    noise = noises(timesteps)
    got = sampled(made(timesteps, v_posterior), Ancestral(Ancestral.Config()), timesteps, noise)
    near(got, Original(timesteps, v_posterior).ancestral(X_T, noise), 1e-4)


@pytest.mark.parametrize("v_posterior", [0.0, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("timesteps", [600, 1000])
def test_tables_equal_the_published_ones(timesteps, v_posterior):
    schedule, want = made(timesteps, v_posterior), Original(timesteps, v_posterior)
    tables = buffers(schedule.cfg)
    assert {x.shape for x in schedule.tables().values()} == {(timesteps,)}
    near(tables["posterior_variance"], want.variance, 1e-9)
    clipped = np.log(np.maximum(want.variance, 1e-20))
    near(tables["posterior_log_variance_clipped"], clipped, 1e-6)
    np.testing.assert_allclose(tables["lvlb_weights"], want.lvlb, rtol=1e-3)
    t = torch.tensor([0, 1, timesteps // 2, timesteps - 1])
    mean, log_variance = schedule.posterior(torch.ones(4, 1, 1, 1, 1), torch.ones(4, 1, 1, 1, 1), t)
    near(mean.flatten(), want.coef1[t] + want.coef2[t], 1e-5)
    first = want.variance[0] or want.variance[1]
    near(log_variance.exp().flatten()[0], first, 1e-6)
    near(log_variance.exp().flatten()[1:], want.variance[t[1:]], 1e-6)


@pytest.mark.parametrize(("timesteps", "v_posterior"), [(600, 0.0), (600, 0.5), (1000, 1.0)])
def test_the_variational_bound_of_a_training_step_equals_the_published_one(timesteps, v_posterior):
    schedule, want = made(timesteps, v_posterior), Original(timesteps, v_posterior)
    t = torch.tensor([0, 1, timesteps - 1])
    z0, eps = (torch.from_numpy(x).float()[:1, :, None].expand(3, -1, -1, -1, -1)
               for x in noises(2))  # fmt: skip
    z_t = schedule.noised(z0, eps, t)
    out = backbone(*schedule.inputs(z_t, t), Conditions())
    terms = LDMLoss(LDMLoss.Config(original_elbo_weight=0.5))(schedule, out, z0, eps, t)
    x_t = (np.sqrt(want.abar[t]).reshape(-1, 1, 1, 1, 1) * z0.double().numpy()
           + np.sqrt(1 - want.abar[t]).reshape(-1, 1, 1, 1, 1) * eps.double().numpy())  # fmt: skip
    times = t.double().numpy().reshape(-1, 1, 1, 1, 1)
    simple = ((stub(x_t, times) - eps.double().numpy()) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(terms.log["loss_simple"], simple.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms.log["loss_vlb"], (want.lvlb[t] * simple).mean(), rtol=1e-3)
    total = (simple + 0.5 * want.lvlb[t] * simple).mean()
    np.testing.assert_allclose(terms.total, total, rtol=1e-3)


@pytest.mark.parametrize(("timesteps", "want"), [(10, 900), (600, 15), (1000, 9), (4000, 2.25)])
def test_rescaled_timesteps_are_an_option(timesteps, want):
    """As in guided-diffusion, for a network trained with 1000 timesteps."""
    z, t = torch.zeros(1, 1, 1, 1, 1), torch.tensor([9])
    cfg = {"timesteps": timesteps, "betas": (1e-4, 1e-3)}
    assert DDPM(DDPM.Config(**cfg, rescale_timesteps=True)).inputs(z, t)[1].item() == want
    assert DDPM(DDPM.Config(**cfg)).inputs(z, t)[1] is t
