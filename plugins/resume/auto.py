"""Which run a command continues."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import PluginConfig, one_of
from sandbox.registry import register


@register("resume", "auto")
class Resume:
    """Continues the newest unfinished run of the same configuration, else starts one."""

    @dataclass
    class Config(PluginConfig):
        """`run`: a run folder to continue, also with more steps; `allow`: settings that may differ
        from it.
        """

        mode: str = "auto"
        run: str | None = None
        allow: tuple[str, ...] = ()

        def problems(self) -> Iterator[str]:
            yield from one_of("mode", self.mode, ("auto", "never"))
            if self.allow and self.run is None:
                yield f"allow={list(self.allow)}: only with resume.run=FOLDER, the run to continue"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def which(self) -> str:
        """What `runs.open_run` takes: "auto", "never" or a folder."""
        return self.cfg.run or self.cfg.mode
