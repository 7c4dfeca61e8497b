"""task=ema: an average of the weights with another width, made after training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, above, in_range


@register("task", "ema")
@dataclass
class SynthesiseEMA:
    """Writes EMA weights of any width from the snapshots of a run with ema=power."""

    @dataclass
    class Config(TaskConfig):
        """run: the run (null: the newest finished). sigma_rel: width of the average relative to the
        training until then. step: the snapshot at which it ends (null: the last). to: the file
        (null: ema/sigma_rel_WIDTH.safetensors in the run folder), which task=sample and
        task=evaluate use with task.weights=FILE.
        """

        sigma_rel: float = 0.15
        step: int | None = None
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from above("sigma_rel", self.sigma_rel, 0, 1)
            yield from in_range("step", self.step, 1)
            if self.to is not None and not self.to.endswith(".safetensors"):
                yield f"to={self.to}: want a file that ends in .safetensors"

        def uses_run(self) -> bool:
            return True

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.config import registry
        from sandbox.contracts import ConfigError
        from sandbox.runs.lookup import read_root
        from sandbox.storage import weight_files
        from sandbox.storage.atomic import check_writable
        from sandbox.storage.snapshots import FOLDER, combined, find_snapshots
        from sandbox.training.build import load_state, restored_system

        cfg, folder = self.cfg, Path(self.cfg.run or "")
        ema = read_root(folder).ema  # the one that it was trained with
        if not ema.synthesises():
            raise ConfigError(
                f"task.run={folder}: trained with {ema.plugin.replace('/', '=')}, whose averages "
                "cannot be combined; want a run with ema=power"
            )
        if problems := [f"task.{text}" for text in ema.width_problems(cfg.sigma_rel)]:
            raise ConfigError(*problems)
        step, files = find_snapshots(folder, cfg.step)
        name = f"sigma_rel_{cfg.sigma_rel:g}" + (f"_step_{step}" if cfg.step else "")
        to = Path(cfg.to or folder / FOLDER / f"{name}.safetensors")
        check_writable(to.parent, "task.to")
        updates = max(s.updates for s in files.values())
        coefficients, error = registry.create(ema).synthesis(
            [*files.values()], cfg.sigma_rel, updates
        )
        average = combined(files, coefficients)
        system = restored_system(folder, load_state(folder), "live", wiring).cpu()
        state = system.trainable_state() | average
        weight_files.write(state, to, system.first_stage_hash(), hashed=True)
        print(
            f"average of sigma_rel={cfg.sigma_rel:g} after step {step} from {len(files)} "
            f"snapshots, profile error {error:.2%}\nweights  {to}"
        )
        return {"folder": str(folder), "file": str(to), "profile_error": error}
