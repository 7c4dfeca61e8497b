"""task=ui: a page in the browser to sample from runs, to compare two, and to read reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import ConfigError, TaskConfig, in_range


@register("task", "ui")
class UI:
    """Serves a page that samples from runs, compares two of them, and shows reports (extra ui)."""

    @dataclass
    class Config(TaskConfig):
        """run: the run that the page begins with, or a folder that holds runs (null: out). Nothing
        outside that folder, or the one that holds the run, can be named on the page.

        host: who may connect; 0.0.0.0 is everyone who reaches this machine, without a password.
        port: null is the first free one from 7860.
        """

        needs_torch: ClassVar[bool] = False
        host: str = "127.0.0.1"
        port: int | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.port is not None:
                yield from in_range("port", self.port, 1, 65535)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        from importlib.util import find_spec
        from pathlib import Path
        from threading import Event

        from sandbox.runs.run import Run
        from sandbox.ui.requests import Runs

        if find_spec("gradio") is None:
            raise ConfigError("task=ui needs gradio: want the extra `ui` (pip install -e '.[ui]')")
        from sandbox.ui.page import served

        folder = Path(self.cfg.run or root.out)
        if not folder.is_dir():
            raise ConfigError(
                f"task.run={folder}: no such folder; want a run, or one that has runs"
            )
        is_run = Run(folder).config_file.is_file()
        # resolved: `run=.` has a parent, too
        runs = Runs(folder.resolve().parent if is_run else folder, root.plugins_path)
        begin = folder.resolve().name if is_run else None
        with served(runs, begin, self.cfg.host, self.cfg.port) as address:
            print(f"page    {address}\nruns    {runs.folder}\nCtrl-C ends it", flush=True)
            Event().wait()
        return {"page": address}
