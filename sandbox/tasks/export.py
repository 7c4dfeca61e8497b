"""task=export: writes the weights of a run as a file or pipeline folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range, one_of

FORMATS = ("original", "safetensors", "diffusers")
WEIGHTS = ("both", "ema", "live")
DTYPES = ("fp32", "bf16", "fp16")


@register("task", "export")
@dataclass
class Export:
    """Writes a run's weights (task.run, else the newest run) as a file or pipeline folder."""

    @dataclass
    class Config(TaskConfig):
        """format: "original" is a file for the code of layout=NAME (with layout=diffusers a
        folder); "diffusers" is a pipeline folder for from_pretrained, with the adapter merged;
        "safetensors" is one file with our names.

        weights: "ema", "live", or "both": the live weights with the EMA next to them, as original
        checkpoints have it (without an EMA the live ones; a diffusers folder has one set, the EMA
        if there is one). dtype and shard_mb: of the numbers and files in such a folder; dtype null
        keeps theirs. to: the file or folder; null is "export" in the run folder.
        """

        format: str = "original"
        weights: str = "both"
        dtype: str | None = None
        shard_mb: int = 5000
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from one_of("format", self.format, FORMATS)
            yield from one_of("weights", self.weights, WEIGHTS)
            yield from one_of("dtype", self.dtype, (None, *DTYPES))
            yield from in_range("shard_mb", self.shard_mb, 1)
            if self.format == "safetensors" and self.weights == "both":
                yield "weights='both': format=safetensors has one set; want 'ema' or 'live'"

        def uses_run(self) -> bool:
            return True

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.config import registry
        from sandbox.contracts import ConfigError
        from sandbox.model.components import DTYPES
        from sandbox.model.trainable import without_method
        from sandbox.storage import weight_files
        from sandbox.storage.atomic import check_writable
        from sandbox.training.build import load_state, restored_system
        from sandbox.weights.export import write_folder
        from sandbox.weights.system_files import split

        cfg, folder = self.cfg, Path(self.cfg.run or "")
        chosen = wiring.root.layout
        if cfg.format == "diffusers":
            chosen = registry.default("layout", "diffusers")
        elif cfg.format == "original" and chosen is None:
            known = " or ".join(f"layout={p.name}" for p in registry.plugins("layout"))
            raise ConfigError(f"layout=null: task=export task.format=original needs one: {known}")
        layout = registry.create(chosen) if cfg.format != "safetensors" else None
        is_folder = hasattr(layout, "described")
        ending = "" if is_folder else ".ckpt" if layout else ".safetensors"
        to = Path(cfg.to or folder / f"export{ending}")
        check_writable(to if is_folder else to.parent, "task.to")
        use_live = cfg.weights == "live" or (cfg.weights == "both" and not is_folder)
        state = load_state(folder)
        system = restored_system(folder, state, "live" if use_live else "ema", wiring).cpu()
        step, ema = state["step"], state["ema"] if cfg.weights == "both" else None
        del state  # its optimizer is as large as two models
        if is_folder:
            dtype = DTYPES[cfg.dtype] if cfg.dtype else None
            for name in write_folder(system, layout, to, dtype, cfg.shard_mb):
                print(f"{name}/ is missing here: use from_pretrained(..., {name}=None)")
        elif layout is None:
            own = without_method(system.trainable_state())
            weight_files.write(own, to, system.first_stage_hash(), hashed=True)
        else:
            weights = layout.join(split(system, ema))
            weight_files.write_pickled(layout.file(weights, step), to)
        print(f"{cfg.format} weights in {to}")
        return {"folder": str(folder), "file": str(to)}
