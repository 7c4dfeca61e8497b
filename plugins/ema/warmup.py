"""EMA of the weights with a decay warm-up, as in CompVis latent-diffusion."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import EMAConfig, in_range, one_of
from sandbox.registry import register


@register("ema", "warmup")
class Warmup:
    """EMA of the weights with decay min(decay, (1 + n) / (10 + n)) at update n."""

    @dataclass
    class Config(EMAConfig):
        """decay: in [0, 1]; warmup: increase the decay up to it; every: "step" or "micro_batch"."""

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
        """Decay of update `n`, counted from 1."""
        return min(self.cfg.decay, (1 + n) / (10 + n)) if self.cfg.warmup else self.cfg.decay
