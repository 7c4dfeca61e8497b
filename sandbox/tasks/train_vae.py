"""task=train_vae: trains a first stage; vae.weights=auto does the same into the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sandbox.contracts import DataConfig, FirstStageConfig, TaskConfig, in_range
from sandbox.registry import register

if TYPE_CHECKING:
    from pathlib import Path

    from sandbox.autoencoding import Autoencoding
    from sandbox.config import Root
    from sandbox.rank import Rank


@register("task", "train_vae")
class TrainVAE:
    """Trains a first stage alone: reconstructions, PSNR, weights that vae.weights=FILE takes."""

    @dataclass
    class Config(TaskConfig):
        """batch_size: null takes the first stage's own; clips: measured, held out; shown: on the
        sheet.
        """

        trains_first_stage: ClassVar[bool] = True
        batch_size: int | None = None
        clips: int = 192
        shown: int = 12

        def problems(self) -> Iterator[str]:
            yield from in_range("batch_size", self.batch_size, 1)
            yield from in_range("clips", self.clips, 1)
            yield from in_range("shown", self.shown, 1)

        def micro_batch(self, data: DataConfig, first_stage: FirstStageConfig) -> int:
            return self.batch_size or first_stage.recipe().batch_size

        def defaults(self, first_stage: FirstStageConfig) -> dict[str, float]:
            return {"lr": first_stage.recipe().lr, "steps": first_stage.recipe().steps}

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from sandbox.launch import launch_run

        return launch_run("sandbox.tasks.train_vae:train_vae", wiring.root, overrides, group)


def train_vae(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """All of the work of one rank; `settings` are those of `sandbox.launch.launch_run`."""
    from sandbox.config import received

    return train_first_stage(received(settings["root"]), settings["group"], rank)


def train_in_cache(root: Root, rank: Rank) -> Path:
    """The weights of the first stage of `root`, trained with this task's own settings in a run
    folder of the cache.
    """
    from pathlib import Path

    from sandbox import registry
    from sandbox.wiring import first_stage_alone

    task, recipe = registry.default("task", "train_vae"), root.vae.recipe()
    own = replace(
        root,
        task=task,
        lr=recipe.lr,
        base_lr=None,
        steps=recipe.steps,
        recipe=root.vae.plugin.replace("/", "-"),
        out=str(Path(root.cache) / "runs"),
        vae=replace(root.vae, weights=None),
        init_from=None,
        trainable=None,
        adapter=None,
        metric=None,
        reconstruction=None,
        callbacks={},
        logger=None,
        resume=registry.default("resume", "auto"),
    )
    done = train_first_stage(first_stage_alone(own), None, rank)
    return Path(done["folder"]) / "first_stage.safetensors"


def train_first_stage(root: Root, group: str | None, rank: Rank) -> dict[str, Any]:
    """Trains a wired `root`, measures, and writes a run folder; returns its result."""
    from pathlib import Path

    from sandbox.evaluation import by_pairs
    from sandbox.first_stages import init_first_stage
    from sandbox.fitting import fit
    from sandbox.runs import continues, opened
    from sandbox.training import start

    check_weights(root, begins=not continues(root))
    by_pairs(root)  # weights that it lacks are missed now
    with opened(root, rank) as run:
        print(f"first stage: {run.folder}" + (" (continued)" if run.resumed else ""), flush=True)
        system = build_autoencoding(root)

        def initialise() -> None:
            if root.init_from is not None:
                init_first_stage(system.first_stage, Path(root.init_from))

        with start(system, run, group, rank, initialise) as training:
            fit(training)
            result: dict[str, Any] = {}
            with rank.first():
                if rank.index == 0:
                    result = _finish(training)
            return result


def check_weights(root: Root, begins: bool = True) -> None:
    """Raises ConfigError where `trainable` names no weights that are there, and StorageError where
    those of `init_from`, where it `begins`, have other names or shapes; makes none.
    """
    from pathlib import Path

    import torch

    from sandbox.first_stages import init_first_stage
    from sandbox.parts import build
    from sandbox.selection import rates

    with torch.device("meta"):
        planned = build("vae", root)
    if root.trainable is not None:
        rates([f"first_stage.{name}" for name, _ in planned.named_parameters()], root.trainable)
    if root.init_from is not None and begins:
        init_first_stage(planned, Path(root.init_from))


def build_autoencoding(root: Root) -> Autoencoding:
    """A first stage with its loss, of a complete `root`, with fresh weights."""
    from sandbox.autoencoding import Autoencoding
    from sandbox.parts import build, use_kernels
    from sandbox.systems import clips_per_step

    use_kernels(root)
    return Autoencoding(
        root, build("vae", root), build("reconstruction", root), clips_per_step(root)
    )


def _finish(training: Any) -> dict[str, Any]:
    """Writes weights and reconstructions of held-out clips; the result file last."""
    import torch

    from sandbox import media, registry, weight_files
    from sandbox.autoencoding import psnr
    from sandbox.evaluation import by_pairs, gather, reconstructed
    from sandbox.first_stages import calibrate

    root, run, system = training.root, training.run, training.system
    task, first_stage = root.task, system.first_stage
    with training.averaged(), torch.no_grad():
        system.eval()
        calibrate(root, first_stage, system.device)
        val = gather(registry.create(root.data).split("val"), task.clips, root.seed)
        video = val.video
        assert video is not None  # gathered
        made = reconstructed(first_stage, video, system.device)
        weight_files.write(first_stage.state_dict(), run.folder / "first_stage.safetensors")
    decibels = psnr(made, video).mean().item()
    scores: dict[str, float] = {}
    if metric := by_pairs(root):
        metric.set_references(video)
        scores = metric.score(made, val.captions or [""] * val.size)
    sheet, shown = run.folder / "reconstructions.png", slice(task.shown)
    captions = (val.captions or [])[shown]
    media.reconstruction_sheet(sheet, [*video[shown]], [*made[shown]], captions)
    training.trackers.summary({"psnr_db": decibels} | {f"score/{k}": v for k, v in scores.items()})
    result = {"folder": str(run.folder), "steps": training.step, "psnr_db": decibels}
    result["objective"] = decibels
    result |= {"scores": scores} if scores else {}
    run.finish(result)
    said = "".join(f", {name} {value:.4g}" for name, value in scores.items())
    measured = f"{decibels:.1f} dB{said} on {val.size} held-out clips"
    print(f"first stage: {measured}; sheet {sheet}", flush=True)
    return result
