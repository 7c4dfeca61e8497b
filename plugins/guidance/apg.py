"""Adaptive projected guidance (Sadat et al. 2024, 2410.02416)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.diffusion import Guided, rescale_std
from plugins._configs.guidance import TwoPassConfig
from sandbox.contracts import GuidanceConfig, Pass, in_range
from sandbox.registry import register

AXES = (1, 2, 3, 4)


@register("guidance", "apg")
class AdaptiveProjected(Guided):
    """Projects the guidance update on the full pass and scales the parallel part down.

    The parallel part causes over-saturation at large scales (section 4). As in the reference code,
    the update is applied to the raw outputs.
    """

    @dataclass
    class Config(TwoPassConfig):
        """eta: factor of the part parallel to the full pass, 0 to 1; 1 is plain guidance.

        momentum: factor of the average of earlier updates, negative in the paper (reverse
        momentum); 0 is off. norm_threshold: largest norm of an update; 0 is off.
        """

        guidance_scale: float = 4.0
        eta: float = 0.0
        momentum: float = -0.5
        norm_threshold: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("eta", self.eta, 0, 1)
            yield from in_range("momentum", self.momentum, -1, 1)
            yield from in_range("norm_threshold", self.norm_threshold, 0, 1e6)

    cfg: Config

    def __init__(self, cfg: GuidanceConfig) -> None:
        super().__init__(cfg)
        self.average: Tensor | float = 0.0

    def passes(self, signals: tuple[str, ...]) -> tuple[Pass | frozenset[str], ...]:
        self.average = 0.0
        return super().passes(signals)

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        update = self.average = full - uncond + self.cfg.momentum * self.average
        if self.cfg.norm_threshold:
            norm = torch.linalg.vector_norm(update, dim=AXES, keepdim=True)
            update = update * (self.cfg.norm_threshold / norm).clamp_max(1)
        direction = torch.nn.functional.normalize(full.double(), dim=AXES)  # type: ignore[arg-type]
        parallel = ((update * direction).sum(AXES, keepdim=True) * direction).to(update)
        update = update - parallel + self.cfg.eta * parallel
        return rescale_std(
            uncond + self.cfg.guidance_scale * update, full, self.cfg.guidance_rescale
        )
