"""task=ui: a web page to sample from runs, compare two runs, and read reports."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import ConfigError, TaskConfig, in_range


@register("task", "ui")
@dataclass
class UI:
    """Serves a web page that samples from runs, compares two, and shows reports (extra ui)."""

    @dataclass
    class Config(TaskConfig):
        """run: the run to show first, or a folder of runs (null: out). The page can access only
        that folder, or the folder that contains the run.

        host: address to listen on; 0.0.0.0 accepts every machine, without a password. port: null
        is the first free one from 7860.
        """

        needs_torch: ClassVar[bool] = False
        host: str = "127.0.0.1"
        port: int | None = None

        def problems(self) -> Iterator[str]:
            if self.port is not None:
                yield from in_range("port", self.port, 1, 65535)

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        from importlib.util import find_spec
        from pathlib import Path
        from threading import Event

        from sandbox.runs.run import Run
        from sandbox.ui.requests import Runs

        if find_spec("gradio") is None:
            raise ConfigError("task=ui needs gradio: want the extra `ui` (pip install -e '.[ui]')")
        from sandbox.ui.page import serving

        folder = Path(self.cfg.run or root.out)
        if not folder.is_dir():
            raise ConfigError(f"task.run={folder}: no such folder; want a run, or a folder of runs")
        is_run = Run(folder).config_file.is_file()
        # resolve() first: the parent of `run=.`
        runs = Runs(folder.resolve().parent if is_run else folder, root.plugins_path)
        begin = folder.resolve().name if is_run else None
        with serving(runs, begin, self.cfg.host, self.cfg.port) as address:
            print(f"page    {address}\nruns    {runs.folder}\nPress Ctrl-C to stop", flush=True)
            Event().wait()
        return {"page": address}
