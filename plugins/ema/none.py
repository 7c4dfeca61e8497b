"""No average: samples come from the trained weights themselves."""

from dataclasses import dataclass

from sandbox.contracts import EMAConfig
from sandbox.registry import register


@register("ema", "none")
class NoAverage:
    """No average of the weights; it costs no memory and no time."""

    @dataclass
    class Config(EMAConfig):
        def keeps_ema(self) -> bool:
            return False

    decay = None
    every = "step"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
