"""One process on one device."""

from collections.abc import Iterator
from dataclasses import dataclass

from plugins._blocks.processes import Processes
from sandbox.contracts import TrainerConfig
from sandbox.registry import register


@register("trainer", "single")
class Single(Processes):
    """One process on one device: a CPU, a GPU, or Apple's MPS."""

    @dataclass
    class Config(TrainerConfig):
        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.processes > 1:
                yield f"processes={self.processes}: want 1, or trainer=ddp, which starts several"
