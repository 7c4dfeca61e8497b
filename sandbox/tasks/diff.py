"""task=diff: differences between two runs, and the first step with different numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig


@register("task", "diff")
class Diff:
    """Compares two run folders: settings, code, data, environment, first differing step, scores."""

    @dataclass
    class Config(TaskConfig):
        """runs: two run folders, [A,B]."""

        needs_torch: ClassVar[bool] = False
        runs: tuple[str, ...] = ()

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if len(self.runs) != 2:
                yield f"runs=[{','.join(self.runs)}]: want two run folders: runs=[A,B]"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.runs.diff import compare_runs

        run_diff = compare_runs(*map(Path, self.cfg.runs))
        print(run_diff)
        return {"same_result": run_diff.same_result}
