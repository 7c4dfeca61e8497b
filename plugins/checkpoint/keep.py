"""When to save a checkpoint and which ones to keep."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import PluginConfig, in_range
from sandbox.registry import register


@register("checkpoint", "keep")
class Keep:
    """A checkpoint every so many steps; the newest few are kept, milestones for good."""

    @dataclass
    class Config(PluginConfig):
        """every: optimizer steps; keep: newest ones; milestones: steps between kept ones, or 0.

        attempts, wait: how often a write is tried and the seconds in between.
        """

        every: int = 200
        keep: int = 2
        milestones: int = 0
        attempts: int = 3
        wait: float = 2.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("every", "keep", "attempts"):
                yield from in_range(name, getattr(self, name), 1)
            for name in ("milestones", "wait"):
                yield from in_range(name, getattr(self, name), 0, 1e9)
            if self.milestones > 0 and self.every > 0 and self.milestones % self.every:
                yield f"milestones={self.milestones}: want a multiple of every={self.every}, or 0"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after optimizer step `step`, counted from 1."""
        return step % self.cfg.every == 0
