"""Which implementation runs each operation of `kernels`."""

from collections.abc import Iterator
from dataclasses import dataclass

import kernels
from sandbox.contracts import PluginConfig, one_of
from sandbox.registry import register

FAST: frozenset[str] = frozenset()  # operations that have a Triton implementation
CHOICES = ("auto", "eager", "reference", "triton")


@register("kernels", "auto")
class Kernels:
    """The fastest implementation that is there, for each operation."""

    @dataclass
    class Config(PluginConfig):
        """`strict`: an operation set to auto that has no fast implementation is an error."""

        group_norm: str = "auto"
        temporal_attention: str = "auto"
        strict: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for op in ("group_norm", "temporal_attention"):
                choice = getattr(self, op)
                yield from one_of(op, choice, CHOICES)
                if op not in FAST and choice == "triton":
                    yield f"{op}=triton: it has no Triton implementation; use kernels=auto or eager"
                if op not in FAST and choice == "auto" and self.strict:
                    yield f"{op}=auto: only eager is there, which strict=true forbids; use eager"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def apply(self) -> kernels.use:
        """Sets it for the process, or for a `with`. Raises ValueError for what cannot run."""
        return kernels.use(
            group_norm=self.cfg.group_norm,
            temporal_attention=self.cfg.temporal_attention,
            strict=self.cfg.strict,
        )
