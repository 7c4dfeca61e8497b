"""The training objective as formulas with the configured numbers, and numerical checks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.contracts import PluginConfig

TARGETS = {
    "eps": "eps",
    "v": "alpha(t) eps - sigma(t) z0",
    "x0": "z0",
    "velocity": "eps - z0",
    "edm": "(z0 - c_skip x) / c_out,  x = z_t / alpha(t)",
}
SHOWN = 5  # times in the table
ROUNDING = 1e-4  # float32 tolerance for values of magnitude 1


@dataclass(frozen=True)
class Check:
    """A property that must hold, with the measured value."""

    what: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Level:
    """The noise process at one time; `weight`: loss weight, `of_x0`: weight of the z0 error."""

    t: float
    alpha: float
    sigma: float
    snr: float
    weight: float
    of_x0: float


@dataclass(frozen=True)
class Objective:
    formulas: dict[str, str]
    levels: tuple[Level, ...]
    checks: tuple[Check, ...]


def objective(root: Root) -> Objective:
    """Formulas, table and checks; needs no network."""
    schedule = registry.create(root.schedule)
    t = times(root.schedule, SHOWN)
    return Objective(dict(formulas(root)), tuple(levels(root, schedule, t)),
                     tuple(checks(root, schedule, t)))  # fmt: skip


def times(cfg: Any, count: int | None = None) -> Tensor:
    """(count,) training times in order of increasing noise; None: all, or 1001 of [0, 1]."""
    if cfg.kind == "discrete":
        return torch.linspace(0, cfg.timesteps - 1, count or cfg.timesteps).round().long()
    return torch.linspace(0, 1, count or 1001)


def formulas(root: Root) -> Iterator[tuple[str, str]]:
    schedule, prediction = root.schedule, root.schedule.predicts()
    interval = f"0..{schedule.timesteps - 1}" if schedule.kind == "discrete" else "[0, 1]"
    yield "noise", f"z_t = alpha(t) z0 + sigma(t) eps,  t in {interval}"
    yield "process", settings(schedule)
    yield "network", f"out = f(z_t, t, conditions), trained on {prediction}"
    target = TARGETS[prediction]
    yield "target", target if target == prediction else f"{prediction} = {target}"
    yield "loss", f"E over z0, eps, t of weight(t) |out - target|^2; {settings(root.loss)}"
    passes = len(root.guidance.passes(root.conditioning.signals()))
    yield "guidance", f"{settings(root.guidance)}; {passes} passes per step"
    calls = root.sampler.steps * passes
    yield "sampler", f"{settings(root.sampler)}; {calls} network calls per clip"


def settings(cfg: PluginConfig) -> str:
    """A plugin's name and all settings."""
    own = ", ".join(
        f"{f.name}={_format(getattr(cfg, f.name))}" for f in fields(cfg) if f.name != "plugin"
    )
    return cfg.plugin.rpartition("/")[2] + (f" ({own})" if own else "")


def _format(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_format, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def levels(root: Root, schedule: Any, t: Tensor) -> Iterator[Level]:
    weights = schedule.weight(t)
    for i, at in enumerate(t):
        alpha, sigma, snr = (
            f(at[None]).double().item() for f in (schedule.alpha, schedule.sigma, schedule.snr)
        )
        weight = weights[i].double().item()
        prediction = root.schedule.predicts()
        share = (
            edm_per_x0(schedule, at) if prediction == "edm" else per_x0(prediction, alpha, sigma)
        )
        yield Level(at.item(), alpha, sigma, snr, weight, weight * share)


def per_x0(prediction: str, alpha: float, sigma: float) -> float:
    """Squared error of the target relative to that of the implied z0, for a given z_t."""
    if prediction == "x0":
        return 1.0
    if not sigma:
        return math.inf
    if prediction == "eps":
        return (alpha / sigma) ** 2
    # alpha z_t - sigma v = (alpha^2 + sigma^2) z0;  z_t - sigma (eps - z0) = (alpha + sigma) z0
    scale = alpha**2 + sigma**2 if prediction == "v" else alpha + sigma
    return (scale / sigma) ** 2


def edm_per_x0(schedule: Any, t: Tensor) -> float:
    """The same where z0 = c_skip x + c_out out: 1 / c_out^2."""
    zero = torch.zeros(1, 1, 1, 1, 1)
    return schedule.denoised(zero + 1, zero, t[None]).z0.double().item() ** -2


def checks(root: Root, schedule: Any, t: Tensor) -> Iterator[Check]:
    """Properties that the schedule's contract implies."""
    last = t[-1:]
    end = schedule.snr(last).item()
    if root.schedule.ends_in_noise():
        yield Check(f"SNR(T) = 0 at t = {_format(last.item())}", f"{end:.3g}", end == 0)
    else:
        yield Check(
            f"SNR(T) > 0 at t = {_format(last.item())}: some signal remains in training, "
            "but sampling starts from pure noise", f"{end:.3g}", end > 0,
        )  # fmt: skip
    dense = times(root.schedule)
    snr = schedule.snr(dense).flatten()
    falls = bool((snr[1:] < snr[:-1]).all())
    yield Check("SNR decreases with t", f"at {len(dense)} times", falls)
    yield from sums(root, schedule, dense)
    yield from round_trip(root, schedule, dense)
    yield from endpoints(root, schedule, last)


def sums(root: Root, schedule: Any, t: Tensor) -> Iterator[Check]:
    """Whether the variance of z_t, or the sum of its coefficients, is 1."""
    alpha, sigma = (f(t).double().flatten() for f in (schedule.alpha, schedule.sigma))
    if root.schedule.predicts() == "velocity":
        off = (alpha + sigma - 1).abs().max().item()
        yield Check("alpha(t) + sigma(t) = 1", f"error {off:.1e}", off < ROUNDING)
    elif getattr(root.schedule, "base_scale", 1.0) == 1.0:
        off = (alpha.square() + sigma.square() - 1).abs().max().item()
        yield Check("alpha(t)^2 + sigma(t)^2 = 1", f"error {off:.1e}", off < ROUNDING)


def round_trip(root: Root, schedule: Any, dense: Tensor) -> Iterator[Check]:
    """A perfect prediction recovers z0 and eps, at times where it determines both."""
    prediction = root.schedule.predicts()
    # eps does not determine z0 in pure noise, and x0 does not determine eps without noise
    t = dense[(dense > dense[-1] * 0.02) & (dense < dense[-1] * 0.9)]
    generator = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(len(t), 4, 1, 4, 4, generator=generator) for _ in range(2))
    z_t, target = schedule.noised(z0, eps, t), schedule.target(z0, eps, t)
    out = (
        torch.cat((target, torch.zeros_like(target)), 1) if root.schedule.outputs() == 2 else target
    )
    d = schedule.denoised(out, z_t, t)
    for name, own, found in (("z0", z0, d.z0), ("eps", eps, d.eps)):
        off = (own - found).abs().max().item()
        yield Check(f"a perfect {prediction} recovers {name}", f"error {off:.1e}", off < 1e-2)
    if root.schedule.outputs() == 1:
        total = registry.create(root.loss)(schedule, out, z0, eps, t).total.item()
        yield Check("the loss of a perfect prediction", f"{total:.1e}", math.isfinite(total))


def endpoints(root: Root, schedule: Any, last: Tensor) -> Iterator[Check]:
    """Whether sampling starts at the last training time."""
    spacing = getattr(root.sampler, "spacing", None)
    if spacing is None:
        return
    first = schedule.times(root.sampler.steps, spacing)[0].item()
    near = first >= 0.99 * last.item()
    words = f"sampling starts at t = {_format(first)}, training ends at {_format(last.item())}"
    yield Check(words, f"spacing={spacing}", near or not root.schedule.ends_in_noise())
