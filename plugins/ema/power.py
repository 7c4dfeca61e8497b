"""Power-function averages and their synthesis after training (Karras et al. 2024, 2312.02696).

Section 3.1 defines the averages; section 3.2 and appendix C describe the synthesis.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sandbox.contracts import EMAConfig, Snapshot, above, in_range
from sandbox.registry import register

WIDEST = 12**-0.5  # sigma_rel of the plain mean over training, gamma = 0


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile with this relative width (algorithm 2).

    Solves sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def products(t: np.ndarray, gamma: np.ndarray, s: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Inner products of the profiles (gamma + 1) tau^gamma / t^(gamma + 1), tau in [0, t].

    The profiles of (t, gamma) and of (s, delta), elementwise with broadcasting.
    """
    exponent = np.where(t < s, delta, -gamma)
    shared = (gamma + 1) * (delta + 1) / (gamma + delta + 1)
    return shared * (t / s) ** exponent / np.maximum(t, s)


@register("ema", "power")
class PowerFunction:
    """Averages with a width proportional to the training so far; task=ema makes others afterwards.

    The weights of step tau count in proportion to tau^gamma after step t >= tau.
    """

    @dataclass
    class Config(EMAConfig):
        """sigma_rels: widths of the tracked averages relative to the training so far, in
        (0, 0.2886]; samples use the first. snapshot_every: optimizer steps between two snapshots of
        all averages in the folder `ema` of the run, which task=ema combines; the last step always
        has one.
        """

        sigma_rels: tuple[float, ...] = (0.05, 0.1)
        snapshot_every: int = 50

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for i, width in enumerate(self.sigma_rels):
                yield from above(f"sigma_rels[{i}]", width, 0, WIDEST)
            if len(set(self.sigma_rels)) < max(len(self.sigma_rels), 1):
                yield f"sigma_rels={list(self.sigma_rels)}: want one or more different widths"
            yield from in_range("snapshot_every", self.snapshot_every, 1)

        def writes_snapshot(self, step: int, steps: int) -> bool:
            return step == steps or step % self.snapshot_every == 0

        def synthesises(self) -> bool:
            return True

        def width_problems(self, sigma_rel: float) -> Iterator[str]:
            yield from above("sigma_rel", sigma_rel, 0, WIDEST)

    every = "step"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.gammas = {f"sigma_rel_{width:g}": gamma_of(width) for width in cfg.sigma_rels}
        rules = {name: partial(power_decay, gamma) for name, gamma in self.gammas.items()}
        self.name = next(iter(rules))
        self.decay: Callable[[int], float] = rules.pop(self.name)
        self.others = rules

    def synthesis(
        self, snapshots: Sequence[Snapshot], sigma_rel: float, updates: int
    ) -> tuple[list[float], float]:
        """Coefficients of `snapshots` for the average of width `sigma_rel` after `updates`.

        Least squares between profiles (algorithm 3). Also returns the norm of the difference
        between the two profiles, relative to that of the requested one.
        """
        t = np.array([s.updates for s in snapshots], dtype=np.float64)
        gamma = np.array([self.gammas[s.name] for s in snapshots])
        target = np.array(float(updates)), np.array(gamma_of(sigma_rel))
        gram = products(t[:, None], gamma[:, None], t, gamma)
        towards = products(t, gamma, *target)
        found = np.linalg.solve(gram, towards)
        square = products(*target, *target)
        left = square - 2 * found @ towards + found @ gram @ found
        return found.tolist(), float(np.sqrt(max(left, 0.0) / square))


def power_decay(gamma: float, n: int) -> float:
    """Decay of update `n`, counted from 1 (eq. 2)."""
    return (1 - 1 / n) ** (gamma + 1)
