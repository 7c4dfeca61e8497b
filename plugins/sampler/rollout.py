"""Sampling of long videos, chunk after chunk (Yin et al. 2024, 2412.07772, algorithm 2)."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory
from plugins._blocks.frame_cache import FrameCache
from sandbox.contracts import Draws, SamplerConfig, in_range
from sandbox.registry import register


@register("sampler", "rollout")
class Rollout(Solver):
    """Euler steps for a chunk of frames, which sees earlier frames through their keys and values.

    A chunk has steps + 1 model calls; the last one, at time 0, keeps its keys and values. Memory
    and time per frame do not depend on the length, which may exceed that of training. For a causal
    network trained with method=diffusion_forcing.
    """

    @dataclass
    class Config(SamplerConfig):
        """chunk: frames that are denoised together, at one time."""

        chunk: int = 1

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("chunk", self.chunk, 1, 10_000)

        def frame_times(self) -> bool:
            return True

        def caches_frames(self) -> bool:
            return True

    cfg: Config

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        past, z = FrameCache(), z.clone()
        for first in range(0, z.shape[2], self.cfg.chunk):
            frames = slice(first, first + self.cfg.chunk)
            for step, _, (alpha, sigma) in run:
                times = self.times(run, z, first, step)
                if run.hooks:
                    z = run.hooks.before(z, times)
                part, t = z[:, :, frames], times[:, frames]
                out = run.model(part.to(run.dtype), t, step, past=past)
                d = run.schedule.denoised(out, part, t)
                d = run.hooks.denoised(d, t) if run.hooks else d
                z[:, :, frames] = alpha * d.z0 + sigma * d.eps
            part = z[:, :, frames]
            clean = run.times.new_zeros(len(z), part.shape[2])
            with past.writing(part.shape[2]):
                run.model(part.to(run.dtype), clean, len(run.times) - 1, past=past)
        return z

    def times(self, run: Trajectory, z: Tensor, first: int, step: int) -> Tensor:
        """(B, T): 0 in earlier frames, that of the step in the chunk, the first one in later."""
        times = run.times[0].repeat(z.shape[2])
        times[:first] = 0
        times[first : first + self.cfg.chunk] = run.times[step]
        return times.expand(len(z), -1)
