"""Guidance by text and image with a scale each (DynamiCrafter's multi-condition sampling)."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import rescaled
from sandbox.contracts import GuidanceConfig, in_range
from sandbox.registry import register


@register("guidance", "text_image")
class TextImage:
    """uncond + cfg_img (image - uncond) + guidance_scale (full - image), three passes."""

    @dataclass
    class Config(GuidanceConfig):
        """How far to go (Brooks et al. 2023, 2211.09800, eq. 3, image first).

        guidance_scale: from the image alone to text and image. cfg_img: from nothing to the image.
        guidance_rescale: how much of the full pass's standard deviation is restored, 0 to 1.
        Where there is no image to drop it is plain guidance by the text, in two passes.
        """

        guidance_scale: float = 7.5
        cfg_img: float = 3.0
        guidance_rescale: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)
            yield from in_range("cfg_img", self.cfg_img, 0, 1000)
            yield from in_range("guidance_rescale", self.guidance_rescale, 0, 1)

        def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
            if not signals:
                return (frozenset(),)
            if "image" not in signals or len(signals) == 1:
                return (frozenset(), frozenset(signals))
            return (frozenset(), frozenset(signals) - {"image"}, frozenset(signals))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
        return self.cfg.passes(signals)

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        """outs in the order of `passes`, each (B, C, T, H, W)."""
        if len(outs) == 1:
            return outs[0]
        full, *image, uncond = outs
        guided = uncond
        for out in image:
            guided = guided + self.cfg.cfg_img * (out - guided)
        nearer = image[0] if image else uncond
        guided = guided + self.cfg.guidance_scale * (full - nearer)
        return rescaled(guided, full, self.cfg.guidance_rescale)
