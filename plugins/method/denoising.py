"""Denoising score matching (Ho et al. 2020, 2006.11239, algorithm 1) of any schedule."""

from dataclasses import dataclass

from sandbox.contracts import Draws, Example, MethodConfig, Model, Terms
from sandbox.registry import register


@register("method", "denoising")
class Denoising:
    """One model call per clip: predicts the schedule's target from noised latents."""

    @dataclass
    class Config(MethodConfig):
        pass

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0 = example.z0
        t, eps = model.schedule.draw_t(draws), draws.normal("noise", z0)
        z_t = model.schedule.noised(z0, eps, t)
        out = model(z_t, t, example.conditions())
        return model.loss(model.schedule, out.raw, z0, eps, t)
