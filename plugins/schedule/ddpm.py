"""Discrete diffusion (Ho et al. 2020, 2006.11239) as in LDM, DynamiCrafter and CogVideoX."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import cos, exp, log1p, pi
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from plugins._blocks.diffusion import Table, per_sample
from sandbox.contracts import (
    ConfigError,
    Denoised,
    Draws,
    ScheduleConfig,
    above,
    added,
    in_range,
    one_of,
    same_length,
)
from sandbox.registry import register

BETA_SCHEDULES = ("linear", "scaled_linear", "sqrt", "cosine")
PREDICTIONS = ("eps", "v", "x0")
IN_DIFFUSERS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
LEAST_SIGNAL = 1e-10  # smallest abar at the end; less is lost to float32 rounding
T_DRAWS = ("independent", "stratified")
REACH_T = ("trailing", "linspace")
MIN_START = 0.7  # sampling must start at this fraction of the times or later
SPACINGS = (*REACH_T, "leading", "uniform", "quad")


def raw_betas(
    timesteps: int, beta_schedule: str, ends: tuple[float, float], cosine_s: float
) -> list[float]:
    """Betas before any shift. LDM calls scaled_linear "linear", and linear "sqrt_linear"."""
    low, high = ends
    grid = [i / (timesteps - 1) for i in range(timesteps)]  # 0 to 1
    if beta_schedule == "linear":
        return [low + x * (high - low) for x in grid]
    if beta_schedule == "scaled_linear":
        return [(low**0.5 + x * (high**0.5 - low**0.5)) ** 2 for x in grid]
    if beta_schedule == "sqrt":
        return [(low + x * (high - low)) ** 0.5 for x in grid]
    # cosine: Nichol & Dhariwal 2021, eq. 17
    angles = [(i / timesteps + cosine_s) / (1 + cosine_s) * pi / 2 for i in range(timesteps + 1)]
    return [min(1 - (cos(b) / cos(a)) ** 2, 0.999) for a, b in pairwise(angles)]


@register("schedule", "ddpm")
class DDPM:
    """Discrete diffusion, z_t = alpha z0 + sigma eps from betas; predicts eps, v or x0.

    z_t = sqrt(abar) x_start + sqrt(1 - abar) eps with x_start = rescale(t) z0, where rescale is 1
    except in DynamiCrafter. So alpha = sqrt(abar) rescale, and `x0` predicts x_start.
    """

    @dataclass
    class Config(ScheduleConfig):
        """Noise levels, prediction target and the distribution of training times.

        betas: first and last (cosine uses cosine_s instead); scaled_linear is linear in the square
        root.
        snr_shift: divides the signal-to-noise ratio (CogVideoX, before the terminal SNR is zeroed).
        base_scale: z0 is scaled down linearly to this factor over turning_step times
        (DynamiCrafter); 1 is off.
        t_draw: "independent" as in the published recipes, or "stratified" over an optimizer step.
        v_posterior: share of beta in the posterior variance of LDM: in its tables, the variational
        bound and ancestral sampling.
        rescale_timesteps: the backbone gets t * 1000 / timesteps instead of t (guided-diffusion).
        """

        may_differ: ClassVar[tuple[str, ...]] = ("min_snr_gamma", "t_draw", "v_posterior")

        timesteps: int = 1000
        beta_schedule: str = "scaled_linear"
        betas: tuple[float, float] = (0.00085, 0.012)
        cosine_s: float = 0.008
        snr_shift: float = 1.0
        zero_terminal_snr: bool = False
        prediction: str = "eps"
        learned_variance: bool = False
        min_snr_gamma: float | None = None
        base_scale: float = 1.0
        turning_step: int = 400
        t_draw: str = "independent"
        v_posterior: float = added(0.0)
        rescale_timesteps: bool = added(False, lambda old: old.get("timesteps", 1000) != 1000)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            noise = [
                *in_range("timesteps", self.timesteps, 2, 100_000),
                *one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES),
                *self._betas_problems(),
                *above("cosine_s", self.cosine_s, 0, 1),
            ]
            yield from noise or self._signal_problems()
            yield from in_range("snr_shift", self.snr_shift, 1e-3, 1e3)
            yield from one_of("prediction", self.prediction, PREDICTIONS)
            if self.prediction == "eps" and self.zero_terminal_snr:
                yield (
                    "prediction='eps': is undefined at the pure noise of zero_terminal_snr=true; "
                    "want one of ['v', 'x0'], or zero_terminal_snr=false"
                )
            yield from above("min_snr_gamma", self.min_snr_gamma, 0)
            yield from above("base_scale", self.base_scale, 0, 1)
            yield from in_range("turning_step", self.turning_step, 1, 100_000)
            yield from one_of("t_draw", self.t_draw, T_DRAWS)
            yield from in_range("v_posterior", self.v_posterior, 0, 1)
            if self.v_posterior and self.learned_variance:
                yield (
                    f"v_posterior={self.v_posterior}: the variance is learned; want 0, or "
                    "learned_variance=false"
                )

        def _betas_problems(self) -> Iterator[str]:
            yield from same_length("betas", self.betas, 2, "end of the schedule")
            for beta in self.betas:
                yield from in_range("betas", beta, 1e-8, 0.999)
            if len(self.betas) == 2 and self.betas[0] > self.betas[1]:
                yield f"betas={tuple(self.betas)}: want the smaller one first"

        def _signal_problems(self) -> Iterator[str]:
            raw = raw_betas(self.timesteps, self.beta_schedule, self.betas, self.cosine_s)
            left = exp(sum(log1p(-beta) for beta in raw))
            if self.beta_schedule != "cosine" and left < LEAST_SIGNAL:
                yield (
                    f"betas={tuple(self.betas)}: leave {left:.0e} of the signal after "
                    f"{self.timesteps} times; want smaller betas, for at least {LEAST_SIGNAL:.0e}"
                )

        def outputs(self) -> int:
            return 2 if self.learned_variance else 1

        def predicts(self) -> str:
            return self.prediction

        def takes_frame_times(self) -> bool:
            return True

        def ends_in_noise(self) -> bool:
            return self.zero_terminal_snr

        def diffusers_config(self) -> dict[str, Any]:
            if self.beta_schedule not in ("linear", "scaled_linear"):
                raise ConfigError(
                    f"beta_schedule={self.beta_schedule!r}: diffusers has another form; want "
                    "'scaled_linear' or 'linear'"
                )
            if self.base_scale != 1.0 or self.learned_variance or self.v_posterior:
                raise ConfigError(
                    "base_scale, learned_variance, v_posterior: CogVideoX's schedulers in "
                    "diffusers have none of these"
                )
            if self.rescale_timesteps and self.timesteps != 1000:
                raise ConfigError(
                    "rescale_timesteps=True: diffusers does not rescale times; want False, or "
                    "timesteps=1000"
                )
            return {
                "num_train_timesteps": self.timesteps,
                "beta_schedule": self.beta_schedule,
                "beta_start": self.betas[0],
                "beta_end": self.betas[1],
                "snr_shift_scale": self.snr_shift,
                "rescale_betas_zero_snr": self.zero_terminal_snr,
                "prediction_type": IN_DIFFUSERS[self.prediction],
                "set_alpha_to_one": True,
                "clip_sample": False,
                "steps_offset": 0,
            }

        def spacing_problems(self, steps: int, spacing: str) -> Iterator[str]:
            """Problems with `times(steps, spacing)`, under the names of the sampler's settings."""
            if self.ends_in_noise() and spacing in SPACINGS and spacing not in REACH_T:
                yield (
                    f"spacing={spacing!r}: does not start at the pure noise of the schedule; "
                    f"want one of {list(REACH_T)}"
                )
            else:
                yield from one_of("spacing", spacing, SPACINGS)
            if steps > self.timesteps:
                yield f"steps={steps}: want 1 to {self.timesteps}, as many as the schedule has"
            elif spacing == "leading" and not self.ends_in_noise():
                first = (steps - 1) * (self.timesteps // max(steps, 1))
                if first < MIN_START * self.timesteps:
                    yield (
                        f"spacing='leading': with steps={steps} the first time is {first} of "
                        f"{self.timesteps}, far from noise; want spacing=trailing, or other steps"
                    )

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.v_posterior = cfg, cfg.v_posterior
        abar = alphas_cumprod(*_beta_settings(cfg))
        snr = abar / (1 - abar)
        self._signal = Table(np.sqrt(abar))
        self._sigma = Table(np.sqrt(1 - abar))
        self._snr = Table(snr)
        self._rescale = Table(rescale(cfg.timesteps, cfg.base_scale, cfg.turning_step))
        self._weight = Table(min_snr_weights(snr, cfg.prediction, cfg.min_snr_gamma))

    @cached_property
    def _elbo_weight(self) -> Table:
        return Table(buffers(self.cfg)["lvlb_weights"])

    @cached_property
    def _log_variances(self) -> tuple[Table, Table]:
        tables = buffers(self.cfg)
        variance = tables["posterior_variance"]
        variance = np.append(variance[0] or variance[1], variance[1:])  # 0 without v_posterior
        return Table(np.log(variance)), Table(np.log(tables["betas"]))

    @cached_property
    def _posterior_mean(self) -> tuple[Table, Table]:
        tables = buffers(self.cfg)
        return Table(tables["posterior_mean_coef1"]), Table(tables["posterior_mean_coef2"])

    def tables(self) -> dict[str, Tensor]:
        """The float32 tables of a published LDM or DynamiCrafter state dict, by name."""
        tables = {k: v for k, v in buffers(self.cfg).items() if k != "lvlb_weights"}
        return {name: torch.from_numpy(table).float() for name, table in tables.items()}

    # training

    def draw_t(self, draws: Draws) -> Tensor:
        """(B,) int64 in [0, timesteps)."""
        if self.cfg.t_draw == "stratified":
            return (draws.stratified("t") * self.cfg.timesteps).long()
        return draws.integers("t", 0, self.cfg.timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        return per_sample(self._signal(t) * self._rescale(t))

    def sigma(self, t: Tensor) -> Tensor:
        return per_sample(self._sigma(t))

    def snr(self, t: Tensor) -> Tensor:
        """abar / (1 - abar), (B, 1, 1, 1, 1), without the rescaling of z0."""
        return per_sample(self._snr(t))

    def noised(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (self.alpha(t) * z0 + self.sigma(t) * eps).to(z0.dtype)

    def inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the backbone: t in [0, timesteps), as published, or in [0, 1000)."""
        rescaled = self.cfg.rescale_timesteps and self.cfg.timesteps != 1000
        return z_t, t * (1000 / self.cfg.timesteps) if rescaled else t

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.cfg.prediction == "eps":
            return eps
        x_start = per_sample(self._rescale(t)) * z0
        if self.cfg.prediction == "x0":
            return x_start
        # v: Salimans & Ho 2022, appendix D
        return per_sample(self._signal(t)) * eps - self.sigma(t) * x_start

    def weight(self, t: Tensor) -> Tensor:
        """Min-SNR weights (Hang et al. 2023, 2303.09556); ones without `min_snr_gamma`."""
        return self._weight(t)

    def elbo_weight(self, t: Tensor) -> Tensor:
        """(B,) weight of the squared error in the variational bound, as in LDM."""
        return self._elbo_weight(t)

    # sampling

    def denoised(self, out: Tensor, z_t: Tensor, t: Tensor) -> Denoised:
        out, frac = out.chunk(2, dim=1) if self.cfg.learned_variance else (out, None)
        signal, sigma = per_sample(self._signal(t)), self.sigma(t)
        if self.cfg.prediction == "eps":
            x_start, eps = (z_t - sigma * out) / signal, out
        elif self.cfg.prediction == "x0":
            x_start, eps = out, (z_t - signal * out) / sigma
        else:
            x_start, eps = signal * z_t - sigma * out, signal * out + sigma * z_t
        log_variance = None if frac is None else self._log_variance(frac, t)
        return Denoised(x_start / per_sample(self._rescale(t)), eps, log_variance)

    def _log_variance(self, frac: Tensor, t: Tensor) -> Tensor:
        """Between the bounds of one step (Nichol & Dhariwal 2021, eq. 15); frac in [-1, 1]."""
        low, high = self.log_variances(t)
        return low + (frac + 1) / 2 * (high - low)

    def log_variances(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of a learned log-variance of the step from t to t - 1, each (B, 1, 1, 1, 1)."""
        low, high = self._log_variances
        return per_sample(low(t)), per_sample(high(t))

    def posterior(self, z0: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z_{t-1} | z_t, z0) (Ho et al. 2020, eq. 7).

        The log-variance is (B, 1, 1, 1, 1). At t = 0, if the variance is 0, it is that of t = 1.
        """
        coef1, coef2 = (per_sample(table(t)) for table in self._posterior_mean)
        mean = coef1 * per_sample(self._rescale(t)) * z0 + coef2 * z_t
        return mean, self.log_variances(t)[0]

    def times(self, steps: int, spacing: str) -> Tensor:
        """(N,) int64, decreasing; N is `steps` except for the published uniform and quad.

        trailing and linspace start at T - 1. uniform: every (T // steps)-th time plus 1, as in LDM;
        N > steps if steps does not divide T. quad: denser towards 0, as in DDIM. Raises ValueError
        for invalid `steps` or `spacing`.
        """
        timesteps = self.cfg.timesteps
        if not 1 <= steps <= timesteps:
            raise ValueError(f"steps={steps}: want 1 to {timesteps}, as many as the schedule has")
        if spacing == "trailing":  # Lin et al. 2023, table 2
            times = np.round(timesteps - timesteps / steps * np.arange(steps)) - 1
        elif spacing == "linspace":
            times = np.round(np.linspace(timesteps - 1, 0, steps))
        elif spacing == "leading":
            times = np.arange(steps) * (timesteps // steps)
        elif spacing == "uniform":
            times = np.arange(0, timesteps, timesteps // steps) + 1
            times = times[times < timesteps]  # the published code reads past the end
        elif spacing == "quad":
            times = np.floor(np.linspace(0, np.sqrt(timesteps * 0.8), steps) ** 2) + 1
            times = np.minimum(times, timesteps - 1)
        else:
            raise ValueError(f"spacing={spacing!r}: want one of {list(SPACINGS)}")
        return torch.from_numpy(np.unique(times.astype(np.int64))[::-1].copy())


def _beta_settings(cfg: DDPM.Config) -> tuple[int, str, tuple[float, ...], float, float, bool]:
    raw = cfg.timesteps, cfg.beta_schedule, tuple(cfg.betas), cfg.cosine_s
    return *raw, cfg.snr_shift, cfg.zero_terminal_snr


@cache
def alphas_cumprod(
    timesteps: int,
    beta_schedule: str,
    ends: tuple[float, float],
    cosine_s: float,
    snr_shift: float,
    zero_terminal_snr: bool,
) -> np.ndarray:
    """(timesteps,) float64 abar."""
    abar = np.cumprod(1 - np.array(raw_betas(timesteps, beta_schedule, ends, cosine_s)))
    abar = abar / (snr_shift + (1 - snr_shift) * abar)  # divides abar / (1 - abar)
    if zero_terminal_snr:  # Lin et al. 2023, 2305.08891, algorithm 1
        signal = np.sqrt(abar)
        abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return abar


def rescale(timesteps: int, base_scale: float, turning_step: int) -> np.ndarray:
    """(timesteps,) float64 factors of z0, from 1 to `base_scale` at `turning_step`."""
    fade = np.linspace(1, base_scale, turning_step)
    return np.concatenate([fade, np.full(timesteps, base_scale)])[:timesteps]


def min_snr_weights(snr: np.ndarray, prediction: str, gamma: float | None) -> np.ndarray:
    """(timesteps,) min(snr, gamma), divided by the weight of the prediction in terms of x0."""
    if gamma is None:
        return np.ones_like(snr)
    return np.minimum(snr, gamma) / {"eps": snr, "v": snr + 1, "x0": 1}[prediction]


def buffers(cfg: DDPM.Config) -> dict[str, np.ndarray]:
    """The float64 tables of a published LDM or DynamiCrafter state dict, by name.

    `lvlb_weights` is not saved there, and `scale_arr` only if z0 is rescaled.
    """
    settings = cfg.prediction, cfg.base_scale, cfg.turning_step, cfg.v_posterior
    return dict(_buffers(_beta_settings(cfg), *settings))


@cache
def _buffers(
    noise: tuple, prediction: str, base_scale: float, turning_step: int, v_posterior: float
) -> dict[str, np.ndarray]:
    abar = alphas_cumprod(*noise)
    prev = np.append(1.0, abar[:-1])
    betas = 1 - abar / prev
    variance = (1 - v_posterior) * betas * (1 - prev) / (1 - abar) + v_posterior * betas
    # as published: zeros for v-prediction, where a zero terminal SNR gives infinities
    recip = np.zeros_like(abar) if prediction == "v" else 1 / np.maximum(abar, 1e-300)
    tables = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(np.maximum(recip - 1, 0)),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(1 - betas) / (1 - abar),
        "lvlb_weights": _elbo_weights(abar, betas, variance, prediction),
    }
    if base_scale != 1:
        length = len(abar) + turning_step  # as published; only the first `timesteps` are used
        tables["scale_arr"] = rescale(length, base_scale, turning_step)
    return tables


def _elbo_weights(
    abar: np.ndarray, betas: np.ndarray, variance: np.ndarray, prediction: str
) -> np.ndarray:
    """As published: in float32, from float32 buffers (float64 differs by up to 5e-6)."""
    if prediction == "v":
        return np.ones_like(abar)
    abar, betas, alphas, variance = (
        x.astype(np.float32) for x in (abar, betas, 1 - betas, np.append(variance[1], variance[1:]))
    )
    if prediction == "x0":
        return 0.5 * np.sqrt(abar) / (2 * 1 - abar)  # as published; 2 * (1 - abar) may be meant
    noise = np.maximum(1 - abar, np.finfo(np.float32).epsneg)  # abar may round to 1
    weights = betas**2 / (2 * variance * alphas * noise)
    weights[0] = weights[1]
    return weights
