"""When to save a checkpoint and which ones to keep."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import CheckpointConfig
from sandbox.registry import register


@register("checkpoint", "keep")
class Keep:
    """A checkpoint every so many steps; the newest few are kept, milestones and the best for good.

    LDM and DynamiCrafter keep theirs by rules of Lightning that do not know of one another; so do
    `keep`, `milestones`, `best` and `weights_every`.
    """

    @dataclass
    class Config(CheckpointConfig):
        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.milestones > 0 and self.every > 0 and self.milestones % self.every:
                yield f"milestones={self.milestones}: want a multiple of every={self.every}, or 0"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after optimizer step `step`, counted from 1."""
        return step % self.cfg.every == 0
