"""task=export: the weights of a run, as a file or as the folder of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import TaskConfig, in_range, one_of
from sandbox.registry import register

FORMATS = ("original", "safetensors", "diffusers")
WEIGHTS = ("both", "ema", "live")
DTYPES = ("fp32", "bf16", "fp16")


@register("task", "export")
class Export:
    """Writes a run's weights (task.run, else the newest) as a file or folder of a known format."""

    @dataclass
    class Config(TaskConfig):
        """format: original is a file that the code of layout=NAME loads; diffusers is the folder of
        a pipeline, with its adapter merged, which from_pretrained opens (and what original is for
        layout=diffusers); safetensors is one file with our names.

        weights: "ema" or "live" ones as the model's, or "both": the live ones with the average
        beside them, as originals with an average save it (without an average the live ones; in a
        folder of diffusers, which has one set, the average where there is one). dtype: of the
        numbers in such a folder, null as they are here; shard_mb: size that a file of it does not
        exceed. to: the file or folder; null is "export" in the run folder.
        """

        format: str = "original"
        weights: str = "both"
        dtype: str | None = None
        shard_mb: int = 5000
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("format", self.format, FORMATS)
            yield from one_of("weights", self.weights, WEIGHTS)
            yield from one_of("dtype", self.dtype, (None, *DTYPES))
            yield from in_range("shard_mb", self.shard_mb, 1)
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

        from sandbox import registry, weight_files
        from sandbox.contracts import ConfigError
        from sandbox.exporting import write_folder
        from sandbox.parts import DTYPES
        from sandbox.systems import load_state, restored_system
        from sandbox.whole_systems import taken_apart

        cfg, folder = self.cfg, Path(self.cfg.run or "")
        chosen = wiring.root.layout
        if cfg.format == "diffusers":
            chosen = registry.default("layout", "diffusers")
        elif cfg.format == "original" and chosen is None:
            known = " or ".join(f"layout={p.name}" for p in registry.plugins("layout"))
            raise ConfigError(f"layout=null: task=export task.format=original wants one, {known}")
        layout = registry.create(chosen) if cfg.format != "safetensors" else None
        is_folder = hasattr(layout, "described")
        one = (
            "live"
            if cfg.weights == "live" or (cfg.weights, is_folder) == ("both", False)
            else "ema"
        )
        state = load_state(folder)
        system = restored_system(folder, state, one, wiring).cpu()
        step, ema = state["step"], state["ema"] if cfg.weights == "both" else None
        del state  # its optimizer is as large as two models
        ending = "" if is_folder else ".ckpt" if layout else ".safetensors"
        to = Path(cfg.to or folder / f"export{ending}")
        if is_folder:
            dtype = DTYPES[cfg.dtype] if cfg.dtype else None
            for name in write_folder(system, layout, to, dtype, cfg.shard_mb):
                print(f"{name}/ is not in it (none is here): from_pretrained(..., {name}=None)")
        elif layout is None:
            weight_files.write(system.trainable_state(), to, system.made_with())
        else:
            whole = layout.join(taken_apart(system, ema))
            weight_files.write_pickled(layout.file(whole, step), to)
        print(f"{cfg.format} weights in {to}")
        return {"folder": str(folder), "file": str(to)}
