"""No EMA: samples use the live weights."""

from dataclasses import dataclass

from sandbox.contracts import EMAConfig
from sandbox.registry import register


@register("ema", "none")
class NoAverage:
    """No EMA of the weights."""

    @dataclass
    class Config(EMAConfig):
        def keeps_ema(self) -> bool:
            return False

    decay = None
    every = "step"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
