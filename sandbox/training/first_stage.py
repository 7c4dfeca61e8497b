"""The weights of a first stage: from a file, from the cache, or trained now (`vae.weights`).

With weights=auto a first stage is trained once for its (configuration, data, seed, code) and stored
in the cache. Later runs and the other jobs of a sweep use it, whatever optimizer or schedule they
compare. A lock keeps concurrent jobs from training it twice.
"""

import logging
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sandbox.config import registry
from sandbox.config.compatibility import first_stage_alone
from sandbox.config.param_groups import lr_factors
from sandbox.config.root import Root, clips_per_step
from sandbox.contracts import StorageError
from sandbox.data.batching import lines, reasons, summary
from sandbox.data.loader import SHOWN, batches
from sandbox.distributed.rank import Rank
from sandbox.evaluation.evaluate import first_clips, paired_metric, reconstruct
from sandbox.model.autoencoding import Autoencoding, psnr
from sandbox.model.components import build, use_kernels
from sandbox.model.trainable import fingerprint
from sandbox.reports import media
from sandbox.runs.resume import open_on_rank0, resumes
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.atomic import replacing, storage_errors
from sandbox.storage.first_stage_files import (
    FIRST_STAGE_FILE,
    cache_folder,
    cache_path,
    init_first_stage,
    load_weights,
)
from sandbox.storage.locks import locked
from sandbox.training.loop import fit
from sandbox.training.setup import checked_loader, start

CALIBRATION_BATCHES = 8  # of 64 clips
TRAINED_WITH = {
    "task": "train_vae",
    "optimizer": "adamw",
    "lr_schedule": "warmup_cosine",
    "ema": "warmup",
    "resume": "auto",
}

log = logging.getLogger(__name__)


def prepare_first_stage(
    root: Root, first_stage: nn.Module, folder: Path | None = None, rank: Rank | None = None
) -> None:
    """Loads the weights of `first_stage`. Raises StorageError for a file that does not fit.

    A run stores a copy of its first stage in its `folder` and always uses that: latents of another
    first stage would be incompatible. Damaged files of run and cache are replaced.
    """
    cfg, own = root.vae, folder / FIRST_STAGE_FILE if folder else None
    if cfg.weights is None or cfg.fitted() == "none":
        return
    if own and own.is_file() and _loads(first_stage, own):
        return
    if cfg.weights != "auto":
        load_weights(first_stage, Path(cfg.weights))
        return
    path = cache_path(root)
    _load_cached(root, first_stage, path, rank)
    if folder and own:
        _check_recorded(first_stage, folder)
        with storage_errors(own), replacing(own) as part:
            shutil.copyfile(path, part)  # no hard link: damage of the cache must not reach the run


def _load_cached(root: Root, first_stage: Any, path: Path, rank: Rank | None) -> None:
    """Loads the file in the cache; makes it where it is missing or damaged."""
    cfg = root.vae
    if path.is_file() and _loads(first_stage, path):  # needs no lock: writes are atomic
        return
    with locked(path):
        if not path.is_file() or _is_damaged(path):
            how = "Fitting" if cfg.fitted() == "closed_form" else "Training"
            print(f"{how} first stage {cfg.plugin} (cached in {path})", flush=True)
            fit_or_train(root, first_stage, rank)
            weight_files.write(first_stage.state_dict(), path, hashed=True)
        load_weights(first_stage, path)


def _loads(first_stage: nn.Module, path: Path) -> bool:
    """Loads a file; False where it is damaged. Raises StorageError where it does not fit."""
    try:
        load_weights(first_stage, path)
    except StorageError as e:
        if not _is_damaged(path):
            raise
        log.warning("skipped first stage: %s", e)
        return False
    return True


def _is_damaged(path: Path) -> bool:
    try:
        weight_files.read(path)
    except StorageError:
        return True
    return False


def _check_recorded(first_stage: nn.Module, folder: Path) -> None:
    """Raises StorageError where the run in `folder` was trained with another first stage."""
    newest = checkpoint.newest(folder / "checkpoints")
    recorded = checkpoint.load_mapped(newest)["frozen"].get("first_stage") if newest else None
    if recorded not in (None, fingerprint(first_stage)):
        raise StorageError(
            f"{folder / FIRST_STAGE_FILE}: damaged or lost, and the first stage in the cache is "
            "not the one of this run; copy the file again"
        )


def fit_or_train(root: Root, first_stage: Any, rank: Rank | None = None) -> None:
    """Fits or trains `first_stage` on the training split, in this process alone."""
    if root.vae.fitted() == "closed_form":
        train = registry.create(root.data.all_clips()).split("train")
        first_stage.fit(b.video for b in batches(train, 256, root.seed))
        return
    load_weights(first_stage, train_in_cache(root, (rank or Rank()).as_single()))


def calibrate(root: Root, first_stage: Any, device: torch.device) -> None:
    """Measures the latent scale on training clips, for a first stage that takes it from the data.

    `device`: that of the first stage.
    """
    train = registry.create(root.data.all_clips()).split("train")

    some = islice(batches(train, 64, root.seed), CALIBRATION_BATCHES)
    first_stage.calibrate(batch.video.to(device) for batch in some)  # type: ignore[union-attr]


def train_in_cache(root: Root, rank: Rank) -> Path:
    """Trains the first stage of `root` in a run folder in the cache; returns its weight file.

    Settings that a shared first stage must not depend on have their defaults.
    """
    fixed = {group: registry.default(group, name) for group, name in TRAINED_WITH.items()}
    machine = {name: getattr(root.trainer, name) for name in ("accelerator", "threads")}
    recipe = root.vae.recipe()
    own = replace(
        root,
        **fixed,
        trainer=replace(registry.default("trainer", "single"), **machine),
        data=root.data.all_clips(),
        precision="fp32",
        lr=recipe.lr,
        base_lr=None,
        steps=recipe.steps,
        recipe=root.vae.plugin.replace("/", "-"),
        out=str(cache_folder(root) / "runs"),
        vae=replace(root.vae, weights=None),
        init_from=None,
        trainable=None,
        adapter=None,
        metric=None,
        reconstruction=None,
        callbacks={},
        logger=None,
    )
    done = train_first_stage(first_stage_alone(own), None, rank)
    return Path(done["folder"]) / "first_stage.safetensors"


def train_first_stage(root: Root, group: str | None, rank: Rank) -> dict[str, Any]:
    """Trains the first stage of a wired `root` in a run folder; returns the result."""
    check_weights(root, begins=not resumes(root))
    paired_metric(root)  # raises now where the metric's weights are missing
    loader = checked_loader(root, rank)
    with open_on_rank0(root, rank) as run:
        print(f"first stage: {run.folder}" + (" (resumed)" if run.resumed else ""), flush=True)
        system = build_autoencoding(root)

        def initialise() -> None:
            if root.init_from is not None:
                init_first_stage(system.first_stage, Path(root.init_from))

        with start(system, run, group, rank, initialise, loader) as training:
            fit(training)
            with rank.rank0_first():
                return _finish(training) if rank.index == 0 else {}


def check_weights(root: Root, begins: bool = True) -> None:
    """Checks `trainable` on the meta device and, if the run `begins` (no resume), `init_from`.

    Raises ConfigError for an entry that matches no weights, StorageError for names or shapes that
    differ.
    """
    with torch.device("meta"):
        planned = build("vae", root)
    if root.trainable is not None:
        names = [f"first_stage.{name}" for name, _ in planned.named_parameters()]
        lr_factors(names, root.trainable)
    if root.init_from is not None and begins:
        init_first_stage(planned, Path(root.init_from))


def build_autoencoding(root: Root) -> Autoencoding:
    """A first stage and its loss with initial weights, of a wired `root`."""
    use_kernels(root)
    return Autoencoding(
        root, build("vae", root), build("reconstruction", root), clips_per_step(root)
    )


def _finish(training: Any) -> dict[str, Any]:
    """Writes weights, then reconstructions and metrics of held-out clips; the result file last."""
    root, run, system = training.root, training.run, training.system
    task, first_stage = root.task, system.first_stage
    with training.ema_weights(), torch.no_grad():
        system.eval()
        calibrate(root, first_stage, system.device)
        val = first_clips(registry.create(root.data).split("val"), task.clips, root.seed)
        video: Any = val.video
        made = reconstruct(first_stage, video, system.device)
        state = first_stage.state_dict()
        weight_files.write(state, run.folder / FIRST_STAGE_FILE, hashed=True)
    decibels = psnr(made, video).mean().item()
    scores: dict[str, float] = {}
    if metric := paired_metric(root):
        metric.set_references(video)
        scores = metric.score(made, val.captions or [""] * val.size)
    sheet, shown = run.folder / "reconstructions.png", slice(task.shown)
    captions = (val.captions or [])[shown]
    media.reconstruction_sheet(sheet, [*video[shown]], [*made[shown]], captions)
    training.trackers.summary({"psnr_db": decibels} | {f"score/{k}": v for k, v in scores.items()})
    result: dict[str, Any] = {"folder": str(run.folder), "steps": training.step}
    result |= {"psnr_db": decibels, "objective": decibels} | ({"scores": scores} if scores else {})
    run.finish(result)
    shown_scores = "".join(f", {name} {value:.4g}" for name, value in scores.items())
    measured = f"{decibels:.1f} dB{shown_scores} on {val.size} held-out clips"
    print(f"first stage: {measured}; sheet {sheet}", flush=True)
    if bad := reasons(val.bad) | training.loader.bad:
        print(f"data    {summary(bad)}: {'; '.join(lines(bad)[:SHOWN])}", flush=True)
    return result
