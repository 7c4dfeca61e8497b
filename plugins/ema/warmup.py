"""Moving average of the weights with a warm-up, as CompVis latent-diffusion trains."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import EMAConfig, in_range, one_of
from sandbox.registry import register


@register("ema", "warmup")
class Warmup:
    """Average of the weights whose decay grows: min(decay, (1 + n) / (10 + n)) at update n."""

    @dataclass
    class Config(EMAConfig):
        """decay: 0 to 1; warmup: whether it grows to that; every: "step" or "micro_batch"."""

        decay: float = 0.995
        warmup: bool = True
        every: str = "step"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("decay", self.decay, 0, 1)
            yield from one_of("every", self.every, ("step", "micro_batch"))

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.every = cfg, cfg.every

    def decay(self, n: int) -> float:
        """Decay of update `n`; the first is 1."""
        return min(self.cfg.decay, (1 + n) / (10 + n)) if self.cfg.warmup else self.cfg.decay
