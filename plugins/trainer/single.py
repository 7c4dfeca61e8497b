"""One process on one device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import TrainerConfig, one_of
from sandbox.registry import register


@register("trainer", "single")
class Single:
    """One process on one device: a CPU, a GPU, or Apple's MPS."""

    @dataclass
    class Config(TrainerConfig):
        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("processes", self.processes, (1,))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def strategy(self) -> Any:
        """What Lightning's Trainer takes as its strategy."""
        return "auto"
