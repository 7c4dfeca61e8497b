"""task=export: the weights of a run as one file, for this program or for the original's code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import TaskConfig, one_of
from sandbox.registry import register

FORMATS = ("original", "safetensors")
WEIGHTS = ("both", "ema", "live")


@register("task", "export")
class Export:
    """Writes a run's weights (task.run, else the newest) as one file of a published format."""

    @dataclass
    class Config(TaskConfig):
        """format: original is a file that the code of layout=NAME loads; safetensors has our names.

        weights: "ema" or "live" ones as the model's, or "both": the live ones with the average
        beside them, as originals with an average save it (format=original; without an average the
        live ones). to: the file; null is export.ckpt or export.safetensors in the run folder.
        """

        format: str = "original"
        weights: str = "both"
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("format", self.format, FORMATS)
            yield from one_of("weights", self.weights, WEIGHTS)
            if self.format == "safetensors" and self.weights == "both":
                yield "weights='both': format=safetensors has one set; want 'ema' or 'live'"

        def uses_run(self) -> bool:
            return True

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from pathlib import Path

        from sandbox import checkpoint, registry
        from sandbox.contracts import ConfigError
        from sandbox.systems import load_system
        from sandbox.whole_systems import taken_apart

        cfg, folder = self.cfg, Path(self.cfg.run or "")
        original = cfg.format == "original"
        if original and wiring.root.layout is None:
            raise ConfigError("layout=null: task=export task.format=original wants one, see --help")
        system = load_system(folder, "ema" if cfg.weights == "ema" else "live", wiring).cpu()
        to = Path(cfg.to or folder / ("export.ckpt" if original else "export.safetensors"))
        if not original:
            checkpoint.export_weights(system.trainable_state(), to)
        else:
            newest = checkpoint.newest(folder / "checkpoints")
            assert newest is not None  # load_system has found it
            state = checkpoint.load(newest)
            ema = state["ema"] if cfg.weights == "both" else None
            layout = registry.create(wiring.root.layout)
            whole = layout.whole(taken_apart(system, ema))
            checkpoint.export_foreign(layout.file(whole, state["step"]), to)
        print(f"{cfg.format} weights in {to}")
        return {"folder": str(folder), "file": str(to)}
