"""Diffusion forcing: independent noise levels for each frame (Chen et al. 2024, 2407.01392)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.diffusion import Renamed
from sandbox.contracts import Draws, Example, MethodConfig, Model, Terms, in_range
from sandbox.registry import register


@register("method", "diffusion_forcing")
class DiffusionForcing:
    """Denoising with a time drawn for each frame, so that sampling may give each its own.

    Sample with sampler=pyramid; sampler=euler and the others denoise all frames together.
    """

    @dataclass
    class Config(MethodConfig):
        """independent: share of clips whose frames have independent times (algorithm 1).

        The frames of the others have one time, as in full-sequence diffusion; 0 is
        method=denoising.
        """

        independent: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("independent", self.independent, 0, 1)

        def frame_times(self) -> bool:
            return self.independent > 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0 = example.z0
        t, eps = self.times(model, draws, z0.shape[2]), draws.normal("noise", z0)
        z_t = model.schedule.noised(z0, eps, t)
        out = model(z_t, t, example.conditions())
        return model.loss(model.schedule, out.raw, z0, eps, t)

    def times(self, model: Model, draws: Draws, frames: int) -> Tensor:
        """(B, T), each frame distributed as the schedule draws times; (B,) without any."""
        shared = model.schedule.draw_t(draws)
        if not self.cfg.independent:
            return shared
        each = [model.schedule.draw_t(Renamed(draws, f"_frame_{i}")) for i in range(frames)]
        t = torch.stack(each, 1)
        if self.cfg.independent == 1:
            return t
        is_independent = draws.uniform("independent_times") < self.cfg.independent
        return torch.where(is_independent[:, None], t, shared[:, None])
