"""Classifier-free guidance (Ho & Salimans 2022, 2207.12598)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Guided, rescale_std
from plugins._configs.guidance import TwoPassConfig
from sandbox.registry import register


@register("guidance", "cfg")
class ClassifierFree(Guided):
    """Classifier-free guidance: uncond + guidance_scale (full - uncond), two passes."""

    @dataclass
    class Config(TwoPassConfig):
        """guidance_scale: 1 uses the conditional output alone, in one pass.

        guidance_rescale: how far the standard deviation is restored to that of the full pass, 0 to
        1.
        """

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        return rescale_std(
            uncond + self.cfg.guidance_scale * (full - uncond), full, self.cfg.guidance_rescale
        )
