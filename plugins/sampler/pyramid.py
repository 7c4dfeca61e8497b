"""Sampling with a noise level for each frame (Chen et al. 2024, 2407.01392, section 3.2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plugins._blocks.diffusion import CLEAN, Solver, Trajectory, per_sample
from sandbox.contracts import Draws, SamplerConfig, in_range
from sandbox.registry import register


@register("sampler", "pyramid")
class Pyramid(Solver):
    """Euler steps in which each frame starts `delay` steps after the frame before it.

    The levels form a matrix of steps x frames (figure 3): steps + (T - 1) * delay rows, one model
    call each. For a network that takes a time for each frame, such as one trained with
    method=diffusion_forcing.
    """

    @dataclass
    class Config(SamplerConfig):
        """delay: 0 denoises all frames together (full sequence); `steps` or more denoises one frame
        after the other (autoregressive); a number between keeps the future uncertain (pyramid).
        """

        delay: int = 1

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("delay", self.delay, 0, 10_000)

        def frame_times(self) -> bool:
            return True

    cfg: Config

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        steps = len(run.times)
        places = frame_levels(z.shape[2], steps, self.cfg.delay)
        times = torch.cat((run.times, run.times.new_zeros(1)))  # clean frames have time 0
        alpha, sigma = torch.tensor([*run.levels[:steps], CLEAN], device=z.device).to(z.dtype).T
        for row, (now, after) in enumerate(pairwise(places)):
            t = times[now].expand(len(z), -1)  # (B, T)
            if run.hooks:
                z = run.hooks.before(z, t)
            step = row * steps // (len(places) - 1)
            d = run.schedule.denoised(run.model(z.to(run.dtype), t, step), z, t)
            d = run.hooks.denoised(d, t) if run.hooks else d
            moved = per_sample(alpha[after][None]) * d.z0 + per_sample(sigma[after][None]) * d.eps
            z = torch.where(per_sample((now != after)[None].to(z.device)), moved, z)
        return z


def frame_levels(frames: int, steps: int, delay: int) -> Tensor:
    """(rows + 1, frames) int64: the level of each frame before each row, 0 noise to `steps` clean.

    Frame i moves in the rows from i * delay to i * delay + steps - 1.
    """
    rows = torch.arange(steps + (frames - 1) * delay + 1)
    return (rows[:, None] - delay * torch.arange(frames)).clamp(0, steps)
