"""Guidance with separate text and image scales (DynamiCrafter's multi-condition sampling)."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Guided, rescale_std
from sandbox.contracts import FULL, GuidanceConfig, Pass, in_range
from sandbox.registry import register


@register("guidance", "text_image")
class TextImage(Guided):
    """uncond + cfg_img (image - uncond) + guidance_scale (full - image), three passes."""

    @dataclass
    class Config(GuidanceConfig):
        """Scales of Brooks et al. 2023 (2211.09800), eq. 3, image first.

        guidance_scale: from image to text and image. cfg_img: from unconditional to image.
        guidance_rescale: how far the standard deviation is restored to that of the full pass, 0 to
        1.
        Without an image signal it is plain classifier-free guidance, in two passes.
        """

        guidance_scale: float = 7.5
        cfg_img: float = 3.0
        guidance_rescale: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)
            yield from in_range("cfg_img", self.cfg_img, 0, 1000)
            yield from in_range("guidance_rescale", self.guidance_rescale, 0, 1)

        def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
            if not signals:
                return (FULL,)
            if "image" not in signals or len(signals) == 1:
                return (FULL, Pass(frozenset(signals)))
            everything = frozenset(signals)
            return (FULL, Pass(everything - {"image"}), Pass(everything))

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, *image, uncond = outs
        guided = uncond
        for out in image:
            guided = guided + self.cfg.cfg_img * (out - guided)
        base = image[0] if image else uncond
        guided = guided + self.cfg.guidance_scale * (full - base)
        return rescale_std(guided, full, self.cfg.guidance_rescale)
