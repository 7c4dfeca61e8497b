"""When to save checkpoints and which to keep."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import CheckpointConfig
from sandbox.registry import register


@register("checkpoint", "keep")
class Keep:
    """Checkpoints at a fixed interval; keeps the newest, the best and milestones.

    As with the separate Lightning callbacks of LDM and DynamiCrafter, the rules `keep`,
    `milestones`, `best` and `weights_every` are independent.
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
        """Whether to save a checkpoint after optimizer step `step`, counted from 1."""
        return step % self.cfg.every == 0
