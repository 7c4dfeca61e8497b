"""task=diff: differences between two runs, and the first step with different numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig


@register("task", "diff")
@dataclass
class Diff:
    """Compares two run folders: settings, code, data, environment, first differing step, scores."""

    @dataclass
    class Config(TaskConfig):
        """runs: two run folders, [A,B]."""

        needs_torch: ClassVar[bool] = False
        runs: tuple[str, ...] = ()

        def problems(self) -> Iterator[str]:
            if len(self.runs) != 2:
                yield f"runs=[{','.join(self.runs)}]: want two run folders: runs=[A,B]"

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.runs.diff import compare_runs

        run_diff = compare_runs(*map(Path, self.cfg.runs))
        print(run_diff)
        return {"same_result": run_diff.same_result}
