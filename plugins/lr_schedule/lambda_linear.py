"""Cycles of linear warm-up and linear decay (CompVis latent-diffusion's LambdaLinearScheduler)."""

from dataclasses import dataclass

from plugins._configs.cycles import CyclesConfig
from sandbox.registry import register


@register("lr_schedule", "lambda_linear")
class LambdaLinear:
    """CompVis latent-diffusion's cycles: linear warm-up, then linear decay."""

    @dataclass
    class Config(CyclesConfig):
        """After the last cycle the last factor stays; the published code fails there."""

        def decay(self, i: int, n: int) -> float:
            # as published: measured from the start of the cycle, so the factor jumps after warm-up
            return (self.cycle_lengths[i] - n) / self.cycle_lengths[i]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
