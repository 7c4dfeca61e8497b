"""Skip-layer guidance: spatio-temporal skip guidance (Hyung et al. 2024, 2411.18664)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from plugins._blocks.diffusion import rescale_std
from plugins._configs.backbone import block_at, check_blocks
from plugins._configs.guidance import TwoPassConfig, interval_problems, is_within
from sandbox.contracts import BackboneConfig, Pass, in_range
from sandbox.registry import register


@register("guidance", "skip_layer")
class SkipLayer:
    """Classifier-free guidance, and guidance away from a network that skips some layers.

    full + (guidance_scale - 1) (full - uncond) + skip_scale (full - skipped). The pass that skips
    layers has all conditions.
    """

    @dataclass
    class Config(TwoPassConfig):
        """skip: names of the backbone's modules to skip, such as [blocks.2]; null: the middle
        one.

        skip_scale: 0 is plain classifier-free guidance. start, stop: the steps with the skipping
        pass, as fractions of all steps; Stable Diffusion 3.5 uses 0.01 to 0.2.
        """

        skip: tuple[str, ...] | None = None
        skip_scale: float = 1.0
        start: float = 0.0
        stop: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.skip == ():
                yield "skip=[]: want the names of modules of the backbone, or null"
            yield from in_range("skip_scale", self.skip_scale, 0, 1000)
            yield from interval_problems("start", self.start, "stop", self.stop)

        def skipped(self) -> tuple[str, ...]:
            return self.skip or ()

        def wired(self, backbone: BackboneConfig) -> Self:
            check_blocks(self.skipped(), backbone, "skip")
            return self if self.skip else replace(self, skip=(block_at(backbone, 0.5, "skip"),))

        def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
            skipping = (Pass(skip=self.skipped()),) if self.skip_scale and self.skip else ()
            return (*super().passes(signals), *skipping)

        def active(self, passes: tuple[Pass, ...], step: int, steps: int) -> tuple[Pass, ...]:
            skips = is_within(step, steps, self.start, self.stop)
            return tuple(p for p in passes if skips or not p.skip)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
        return self.cfg.passes(signals)

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        full, *others = outs
        guided, cfg = full, self.cfg
        if others and cfg.skip_scale and is_within(step, steps, cfg.start, cfg.stop):
            guided = guided + cfg.skip_scale * (full - others.pop())
        if others:
            guided = guided + (cfg.guidance_scale - 1) * (full - others.pop())
        return rescale_std(guided, full, cfg.guidance_rescale) if len(outs) > 1 else full
