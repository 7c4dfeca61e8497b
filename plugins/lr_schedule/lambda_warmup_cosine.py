"""Cycles of linear warm-up and cosine decay (CompVis latent-diffusion).

LambdaWarmUpCosineScheduler2; with one cycle LambdaWarmUpCosineScheduler.
"""

import math
from dataclasses import dataclass

from plugins._configs.cycles import CyclesConfig
from sandbox.registry import register


@register("lr_schedule", "lambda_warmup_cosine")
class LambdaWarmupCosine:
    """CompVis latent-diffusion's cycles: linear warm-up, then cosine decay."""

    @dataclass
    class Config(CyclesConfig):
        f_min: tuple[float, ...] = (0.01,)
        cycle_lengths: tuple[int, ...] = (1200,)

        def decay(self, i: int, n: int) -> float:
            warm_up = self.warm_up_steps[i]
            done = (n - warm_up) / (self.cycle_lengths[i] - warm_up)
            return (1 + math.cos(math.pi * done)) / 2

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
