"""Which implementation of `kernels` runs each operation."""

from collections.abc import Iterator
from dataclasses import dataclass

import kernels
from sandbox.contracts import ConfigError, PluginConfig, one_of
from sandbox.registry import register

CHOICES = ("auto", "eager", "reference", "triton")


@register("kernels", "auto")
class Kernels:
    """`auto` uses Triton where it supports a call and is faster, otherwise eager PyTorch."""

    @dataclass
    class Config(PluginConfig):
        """`strict`: raise an error for a call that Triton cannot run, instead of using eager."""

        group_norm: str = "auto"
        temporal_attention: str = "auto"
        strict: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for op in ("group_norm", "temporal_attention"):
                yield from one_of(op, getattr(self, op), CHOICES)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def apply(self) -> kernels.use:
        """Selects the implementations for the process, or for a `with` block.

        Raises ConfigError for an implementation that cannot run on this machine.
        """
        cfg = self.cfg
        try:
            return kernels.use(
                group_norm=cfg.group_norm,
                temporal_attention=cfg.temporal_attention,
                strict=cfg.strict,
            )
        except ValueError as e:
            raise ConfigError(str(e)) from e

    def report(self) -> dict[str, object]:
        """For the run folder: the selection, the call counts, and why Triton did not run."""
        return {"chosen": kernels.chosen(), "calls": kernels.calls()}
