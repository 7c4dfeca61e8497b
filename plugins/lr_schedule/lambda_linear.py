"""Cycles of linear warm-up and linear fall (CompVis latent-diffusion, LambdaLinearScheduler)."""

from dataclasses import dataclass

from plugins._configs.cycles import CyclesConfig
from sandbox.registry import register


@register("lr_schedule", "lambda_linear")
class LambdaLinear:
    """CompVis latent-diffusion's cycles: linear warm-up, then a linear fall."""

    @dataclass
    class Config(CyclesConfig):
        """As published there is no factor after the last cycle, and the run stops."""

        def fall(self, i: int, n: int) -> float:
            # as published: measured from the cycle's start, so the factor jumps where the warm-up
            # ends
            return (self.cycle_lengths[i] - n) / self.cycle_lengths[i]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
