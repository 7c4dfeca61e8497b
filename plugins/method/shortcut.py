"""Shortcut models: steps of several sizes, consistent with their halves (Frans et al. 2024)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.average_velocity import average_velocity, squared_error, terms
from plugins._configs.average_velocity import AverageVelocityConfig
from sandbox.contracts import (
    AVERAGE,
    STUDENT,
    Conditions,
    Draws,
    Example,
    LossConfig,
    Model,
    Role,
    ScheduleConfig,
    Terms,
    in_range,
    one_of,
)
from sandbox.registry import register


@register("method", "shortcut")
class Shortcut:
    """Learns steps of 1, 1/2, 1/4, ... of the time, each consistent with two of half its size.

    Source: 2410.12557, algorithm 1. Sample with sampler=flow_map, in a power of two of steps. Other
    samplers use step size 0, where the network predicts the velocity of the flow.
    """

    @dataclass
    class Config(AverageVelocityConfig):
        """bootstrap: share of clips that train larger steps; the others train the velocity.

        finest: the number of steps, a power of two, whose size counts as 0: the halves of the
        smallest trained steps, 2 / finest of the time, are steps along the velocity.

        targets: whose half steps are the target: those of the "student", without a gradient, or of
        its "ema", as in the paper.
        """

        bootstrap: float = 0.25
        finest: int = 128
        targets: str = STUDENT

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("bootstrap", self.bootstrap, 0, 1)
            yield from one_of("targets", self.targets, (STUDENT, AVERAGE))
            if not 2 <= self.finest <= 2**20 or self.finest & (self.finest - 1):
                yield f"finest={self.finest}: want a power of two, 2 to 1048576"

        def accepts(self, schedule: ScheduleConfig, loss: LossConfig) -> Iterator[str]:
            yield from super().accepts(schedule, loss)
            if (shift := getattr(schedule, "shift", 1)) != 1:
                yield f"shortcut: steps have equal sizes, and schedule.shift={shift}: use 1"
            if schedule.depends_on_size():
                yield "shortcut: steps have equal sizes: use schedule.size_shift=none"

        def roles(self) -> Mapping[str, Role]:
            return {AVERAGE: Role(AVERAGE)} if self.targets == AVERAGE else {}

        def steps_problems(self, steps: int) -> Iterator[str]:
            trained = [2**i for i in range(self.finest.bit_length() - 1)]
            if steps not in trained:
                yield f"steps={steps}: want one of {trained}, or sampler=euler"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0, cond = example.z0, example.conditions()
        schedule, wide = model.schedule, torch.promote_types(z0.dtype, torch.float32)
        is_bootstrap, t, step = self.times(model, draws)
        eps = draws.normal("noise", z0)
        z_t = schedule.noised(z0, eps, t)
        out = average_velocity(model, z_t, t, step, cond)
        target = schedule.target(z0.to(wide), eps.to(wide), t)
        if self.cfg.bootstrap:
            cond = example.conditions(role=self.cfg.targets)
            halves = self.two_halves(model, z_t, t, step, cond).to(wide)
            target = torch.where(is_bootstrap.view(-1, 1, 1, 1, 1), halves, target)
        return terms(squared_error(out, target))

    def times(self, model: Model, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Which clips train larger steps, t and the step size, each (B,).

        The grid of the larger steps is that of sampling: fractions of the first time.
        """
        t = model.schedule.draw_t(draws)
        is_bootstrap = draws.stratified("bootstrap") < self.cfg.bootstrap
        level = draws.integers("shortcut_level", 0, self.cfg.finest.bit_length() - 1)
        count = 2.0**level  # steps of this size from noise to data
        place = (draws.uniform("shortcut_place") * count).floor() + 1
        first = model.schedule.times(1, "trailing").to(t)
        start, step = first * place / count, first / count
        return is_bootstrap, torch.where(is_bootstrap, start, t), torch.where(is_bootstrap, step, 0)

    @torch.no_grad()
    def two_halves(
        self, model: Model, z: Tensor, t: Tensor, step: Tensor, cond: Conditions
    ) -> Tensor:
        """The mean velocity of two steps of half the size, as z (B, C, T, H, W)."""
        half = step / 2
        # Section 3: the smallest steps are steps along the velocity.
        smallest = 1.5 * model.schedule.times(1, "trailing").to(t) / self.cfg.finest
        size = torch.where(half < smallest, 0, half)
        first = average_velocity(model, z, t, size, cond, self.cfg.targets)
        middle = z - half.view(-1, 1, 1, 1, 1) * first
        middle = middle.to(z.dtype)
        second = average_velocity(model, middle, t - half, size, cond, self.cfg.targets)
        return (first + second) / 2
