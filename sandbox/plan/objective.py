"""The objective of a configuration as formulas with its numbers, and checks of them by numbers."""

from __future__ import annotations

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
}
SHOWN = 5  # times of the table
ROUNDING = 1e-4  # of float32 numbers of size 1


@dataclass(frozen=True)
class Check:
    """Something that must hold, with the number that says so."""

    what: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Level:
    """The noise process at one time; `weight` is that of the loss, `of_x0` its share per error of
    z0.
    """

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
    """Formulas, numbers and checks; nothing of it needs the network."""
    schedule = registry.create(root.schedule)
    t = times(root.schedule, schedule)
    return Objective(dict(formulas(root)), tuple(levels(root, schedule, t)),
                     tuple(checks(root, schedule, t)))  # fmt: skip


def times(cfg: Any, schedule: Any) -> Tensor:
    """(SHOWN,) times of training from the least noisy to the noisiest."""
    if cfg.kind == "discrete":
        return torch.linspace(0, cfg.timesteps - 1, SHOWN).round().long()
    return torch.linspace(0, 1, SHOWN)


def formulas(root: Root) -> Iterator[tuple[str, str]]:
    schedule, prediction = root.schedule, root.schedule.predicts()
    if schedule.kind == "discrete":
        yield "noise", f"z_t = alpha(t) z0 + sigma(t) eps,  t in 0..{schedule.timesteps - 1}"
    else:
        yield "noise", "z_t = alpha(t) z0 + sigma(t) eps,  t in [0, 1]"
    yield "process", settings(schedule)
    yield "network", f"out = f(z_t, t, conditions), trained on {prediction}"
    target = TARGETS[prediction]
    yield "target", target if target == prediction else f"{prediction} = {target}"
    yield "loss", f"E over z0, eps, t of weight(t) |out - target|^2; {settings(root.loss)}"
    passes = len(root.guidance.passes(root.conditioning.signals()))
    yield "guidance", f"{settings(root.guidance)}; {passes} passes a step"
    yield "sampler", f"{settings(root.sampler)}; {root.sampler.steps * passes} network calls a clip"


def settings(cfg: PluginConfig) -> str:
    """A plugin as one would type it: its name and every setting."""
    own = ", ".join(
        f"{f.name}={_written(getattr(cfg, f.name))}" for f in fields(cfg) if f.name != "plugin"
    )
    return cfg.plugin.rpartition("/")[2] + (f" ({own})" if own else "")


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def levels(root: Root, schedule: Any, t: Tensor) -> Iterator[Level]:
    weights = schedule.weight(t)
    for i, at in enumerate(t):
        alpha, sigma, snr = (
            f(at[None]).double().item() for f in (schedule.alpha, schedule.sigma, schedule.snr)
        )
        weight = weights[i].double().item()
        share = per_x0(root.schedule.predicts(), alpha, sigma)
        yield Level(at.item(), alpha, sigma, snr, weight, weight * share)


def per_x0(prediction: str, alpha: float, sigma: float) -> float:
    """Squared error of the target over that of the z0 that it says, for a given z_t."""
    if prediction == "x0":
        return 1.0
    if not sigma:
        return math.inf
    if prediction == "eps":
        return (alpha / sigma) ** 2
    # alpha z_t - sigma v = (alpha^2 + sigma^2) z0;  z_t - sigma (eps - z0) = (alpha + sigma) z0
    scale = alpha**2 + sigma**2 if prediction == "v" else alpha + sigma
    return (scale / sigma) ** 2


def checks(root: Root, schedule: Any, t: Tensor) -> Iterator[Check]:
    """What follows from the contracts of a schedule, with random numbers where it needs some."""
    last = t[-1:]
    end = schedule.snr(last).item()
    if root.schedule.ends_in_noise():
        yield Check(f"SNR(T) = 0 at t = {_written(last.item())}", f"{end:.3g}", end == 0)
    else:
        yield Check(
            f"SNR(T) > 0 at t = {_written(last.item())}: some signal is left, which samples "
            "start without", f"{end:.3g}", end > 0,
        )  # fmt: skip
    dense = _dense(root.schedule)
    snr = schedule.snr(dense).flatten()
    falls = bool((snr[1:] < snr[:-1]).all())
    yield Check("SNR falls with t", f"{len(dense)} times", falls)
    yield from sums(root, schedule, dense)
    yield from there_and_back(root, schedule, dense)
    yield from reached(root, schedule, last)


def _dense(cfg: Any) -> Tensor:
    return torch.arange(cfg.timesteps) if cfg.kind == "discrete" else torch.linspace(0, 1, 1001)


def sums(root: Root, schedule: Any, t: Tensor) -> Iterator[Check]:
    """Whether the variance of z_t, or the sum of its factors, stays 1."""
    alpha, sigma = (f(t).double().flatten() for f in (schedule.alpha, schedule.sigma))
    if root.schedule.predicts() == "velocity":
        off = (alpha + sigma - 1).abs().max().item()
        yield Check("alpha(t) + sigma(t) = 1", f"off by {off:.1e}", off < ROUNDING)
    elif getattr(root.schedule, "base_scale", 1.0) == 1.0:
        off = (alpha.square() + sigma.square() - 1).abs().max().item()
        yield Check("alpha(t)^2 + sigma(t)^2 = 1", f"off by {off:.1e}", off < ROUNDING)


def there_and_back(root: Root, schedule: Any, dense: Tensor) -> Iterator[Check]:
    """A perfect prediction gives back z0 and eps, wherever it says something of both."""
    prediction = root.schedule.predicts()
    # eps says nothing of z0 where there is only noise, and x0 nothing of eps without any
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
        yield Check(f"a perfect {prediction} gives back {name}", f"off by {off:.1e}", off < 1e-2)
    if root.schedule.outputs() == 1:
        total = registry.create(root.loss)(schedule, out, z0, eps, t).total.item()
        yield Check("the loss of a perfect prediction", f"{total:.1e}", math.isfinite(total))


def reached(root: Root, schedule: Any, last: Tensor) -> Iterator[Check]:
    """Whether sampling begins where training ends."""
    spacing = getattr(root.sampler, "spacing", None)
    if spacing is None:
        return
    first = schedule.times(root.sampler.steps, spacing)[0].item()
    near = first >= 0.99 * last.item()
    words = f"sampling begins at t = {_written(first)}, training ends at {_written(last.item())}"
    yield Check(words, f"spacing={spacing}", near or not root.schedule.ends_in_noise())
