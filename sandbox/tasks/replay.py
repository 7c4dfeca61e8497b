"""task=replay: a finished run once more, from its recorded settings, and whether it is equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import ConfigError, SandboxError, TaskConfig


@register("task", "replay")
class Replay:
    """Runs a finished run again (run=FOLDER) and says whether it came out equal bit for bit."""

    @dataclass
    class Config(TaskConfig):
        """The new run lies below out= of this command; settings are those of the run. An unequal
        outcome is an error (exit code 1).
        """

        needs_torch: ClassVar[bool] = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.run is None:
                yield "run=null: want the folder of a finished run"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        from contextlib import chdir
        from pathlib import Path

        from sandbox.cli.jobs import perform
        from sandbox.config import registry
        from sandbox.runs.diff import compared, told
        from sandbox.runs.lookup import read_root
        from sandbox.runs.run import Run

        folder = Path(self.cfg.run or "")
        if not Run(folder).config_file.is_file():
            raise ConfigError(f"task.run={folder}: no run there (it has no config.yaml)")
        if not Run(folder).finished:
            raise ConfigError(f"task.run={folder}: it is not finished; the same command goes on")
        start, here, run = Run(folder).started_in(), Path.cwd(), folder.absolute()
        places = {"out": root.out, "cache": root.cache}
        if start != here:
            places = {name: str(here / place) for name, place in places.items()}
        with chdir(start):  # so that its files are recorded, and are a part of scores, as they were
            again = replace(
                read_root(run),
                **places,
                logger=root.logger,
                resume=replace(registry.default("resume", "auto"), mode="never"),
            )
            result = perform(again)
        twins = compared(folder, Path(result["folder"]))
        print(told(twins))
        if not twins.same_result:
            raise SandboxError(f"{folder}: the replay in {result['folder']} is not equal to it")
        print(f"{result['folder']} is equal to {folder} bit for bit: every step, score and weight")
        return {"folder": result["folder"], "same_result": True}
