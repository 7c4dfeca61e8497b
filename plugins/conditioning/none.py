"""Unconditional generation."""

from dataclasses import dataclass

from torch import Tensor, nn

from sandbox.contracts import Batch, Clip, ConditioningConfig, Conditions, Draws, Encode
from sandbox.registry import register


@register("conditioning", "none")
class Unconditional(nn.Module):
    """No conditions: the backbone gets noisy latents and the timestep."""

    @dataclass
    class Config(ConditioningConfig):
        pass

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {}

    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        return Conditions()
