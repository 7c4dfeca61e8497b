"""task=replay: repeats a finished run and checks that the result is bit-identical."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import ConfigError, SandboxError, TaskConfig


@register("task", "replay")
@dataclass
class Replay:
    """Repeats a finished run (run=FOLDER); an unequal result is an error."""

    @dataclass
    class Config(TaskConfig):
        """The new run is in out= of this command, with the settings of the run. Exit code 1 where
        the results differ.
        """

        needs_torch: ClassVar[bool] = False

        def problems(self) -> Iterator[str]:
            if self.run is None:
                yield "run=null: want the folder of a finished run"

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        from contextlib import chdir
        from pathlib import Path

        from sandbox.cli.jobs import perform
        from sandbox.config import registry
        from sandbox.runs.diff import compare_runs
        from sandbox.runs.lookup import read_root
        from sandbox.runs.run import existing_run

        folder = Path(self.cfg.run or "")
        recorded = existing_run(folder, "task.run")
        if not recorded.finished:
            raise ConfigError(f"task.run={folder}: not finished; its own command continues it")
        start, here, run = recorded.started_in(), Path.cwd(), folder.absolute()
        places = {"out": root.out, "cache": root.cache}
        if start != here:
            places = {name: str(here / place) for name, place in places.items()}
        with chdir(start):  # file paths are recorded as before, and belong to the protocols
            again = replace(
                read_root(run),
                **places,
                logger=root.logger,
                resume=replace(registry.default("resume", "auto"), mode="never"),
            )
            result = perform(again)
        run_diff = compare_runs(folder, Path(result["folder"]))
        print(run_diff)
        if not run_diff.same_result:
            raise SandboxError(f"{folder}: the replay in {result['folder']} is not equal to it")
        print(f"{result['folder']} equals {folder} bit for bit: every step, score and weight")
        return {"folder": result["folder"], "same_result": True}
