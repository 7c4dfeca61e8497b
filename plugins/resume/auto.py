"""Which run to resume."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import PluginConfig, one_of
from sandbox.registry import register


@register("resume", "auto")
class Resume:
    """Resumes the newest unfinished run of the same configuration, or starts a new one."""

    @dataclass
    class Config(PluginConfig):
        """`run`: run folder to resume, also with more steps; `allow`: settings that may differ."""

        mode: str = "auto"
        run: str | None = None
        allow: tuple[str, ...] = ()

        def problems(self) -> Iterator[str]:
            yield from one_of("mode", self.mode, ("auto", "never"))
            if self.allow and self.run is None:
                yield f"allow={list(self.allow)}: only with resume.run=FOLDER, the run to resume"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def which(self) -> str:
        """The argument of `runs.open_run`: "auto", "never" or a folder."""
        return self.cfg.run or self.cfg.mode
