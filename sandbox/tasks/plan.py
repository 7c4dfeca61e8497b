"""task=plan: what a configuration is and costs at full size, before anything is made or read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import TaskConfig
from sandbox.registry import register


@register("task", "plan")
class Plan:
    """Parameters, shapes, operations, memory and objective of a configuration, before it runs."""

    @dataclass
    class Config(TaskConfig):
        """to: folder of plan.json and plan.html; null is plans/<recipe>-<hash> below `out`."""

        to: str | None = None

        def reads_data(self) -> bool:
            return False

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
