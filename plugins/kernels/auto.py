"""Which implementation runs each operation of `kernels`."""

from collections.abc import Iterator
from dataclasses import dataclass

import kernels
from sandbox.contracts import ConfigError, PluginConfig, one_of
from sandbox.registry import register

CHOICES = ("auto", "eager", "reference", "triton")


@register("kernels", "auto")
class Kernels:
    """`auto` is Triton where it can run a call and gains by it, else plain torch."""

    @dataclass
    class Config(PluginConfig):
        """`strict`: a call that Triton should run and cannot is an error, not left to eager."""

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
        """Sets it for the process, or for a `with`. Raises ConfigError for what cannot run here."""
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
        """For the run folder: what is set, how often which ran, and why not Triton where not."""
        return {"chosen": kernels.chosen(), "calls": kernels.calls()}
