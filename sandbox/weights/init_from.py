"""Weights to start from (`init_from=`). Resuming a run is another thing: see `sandbox.runs.run`.

Initialising takes weights and nothing else: the new run starts at step 0 with an optimizer, an
average and an order of samples of its own, and may differ in everything but the shapes. Resuming
goes on with all of a run, bit for bit; it finds its run by itself, or is told by resume.run=FOLDER.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.config.root import Root
from sandbox.contracts import ConfigError, State, StorageError
from sandbox.model.trainable import Trainable
from sandbox.runs.lookup import task_of
from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.first_stage_files import cached
from sandbox.storage.published import compare, files_of, read_model, read_parts
from sandbox.weights import system_files

FIRST_STAGE = "task/train_vae"  # whose runs have no network that makes latents
log = logging.getLogger(__name__)


def init_from(system: Trainable, path: Path | str) -> None:
    """Puts the trainable weights at `path` into a system that has not been trained.

    `path`: a run folder (its newest good checkpoint), a checkpoint of ours, an exported
    .safetensors file, the published file of a whole system or backbone, or the folder of one (of
    the folder of a system the backbone is taken). Averaged weights are taken where there are any.
    Strict: raises StorageError with the first ten names and shapes that differ, and where a frozen
    part, such as the first stage, is not the one that the weights were trained with. Only what the
    backbone names as its `additions` may be absent, each of them as a whole.
    """
    log.info(
        "starting at step 0 from the %s of %s; optimizer, average and data order are new "
        "(to continue a run instead: resume.run=FOLDER)",
        _begin(system, Path(path)),
        path,
    )


def check_first_stage(system: Trainable, path: Path | str) -> None:
    """Raises StorageError where exported weights at `path` were trained with another first stage.

    A new run may begin from them with one of its own; what it decodes of theirs is wrong.
    """
    recorded = weight_files.header(Path(path)).get("first_stage")
    here = system.made_with().get("first_stage")
    if recorded is not None and recorded != here:
        raise StorageError(
            f"init_from={path}: trained with another first stage than this one (SHA-256 "
            f"{recorded[:12]}, here {here and here[:12]}); name its file or run with vae.weights="
        )


def check_first_stage_is_there(root: Root, path: Path, is_sampled: bool = False) -> None:
    """Raises ConfigError where a first stage would be trained for weights that have one.

    Exported ones say so, too, but a new run may begin from them with one of its own: they count
    where it `is_sampled`.
    """
    is_trained = root.vae.weights == "auto" and root.vae.fitted() == "trained"
    if not is_trained or root.data.stored() is not None or cached(root).is_file():
        return
    is_checkpoint = path.with_suffix(".json").is_file()
    run = Run(path.parent.parent if is_checkpoint else path)
    cure = "name its file or run with vae.weights="
    if run.config_file.is_file():
        vae = run.config().get("vae") or {}
        own, weights = vae.get("plugin", root.vae.plugin), vae.get("weights", "auto")
        if weights not in (None, "auto") and run.started_in() != Path.cwd():
            weights = run.started_in() / weights
        other = f"vae={own.rpartition('/')[2]} " if own != root.vae.plugin else ""
        cure = f"use {other}vae.weights={run.folder if weights == 'auto' else weights or 'null'}"
    elif not is_checkpoint and not (is_sampled and "first_stage" in weight_files.header(path)):
        return
    raise ConfigError(
        f"vae.weights=auto: it would train a first stage, but init_from={path} was trained with "
        f"one of its own: {cure}"
    )


def check_fits(planned: Trainable, path: Path | str) -> None:
    """Raises StorageError as `init_from` does, for a system on the meta device.

    Names, shapes and the schedule's tables are compared; numbers are neither made nor read.
    """
    _begin(planned, Path(path))


def _begin(system: Any, path: Path) -> str:
    """Puts the weights at `path` into `system`, and says which those are."""
    if not path.exists():
        raise StorageError(f"init_from={path}: no such file or folder")
    mapped = any(p.is_meta for p in system.parameters())
    if path.is_dir() and not Run(path).config_file.is_file():
        return _of_published(system, path)
    if path.is_dir() and task_of(path) == FIRST_STAGE:
        raise StorageError(
            f"init_from={path}: a run of a first stage alone; use vae.weights={path}"
        )
    if (parts := system_files.read(path, mapped)) is not None:
        return f"{system_files.put(system, parts, path)} weights"
    if path.is_dir() or path.with_suffix(".json").is_file():
        weights, which = _of_checkpoint(system, _checkpoint(path), mapped)
    else:
        weights, which = weight_files.read(path, mapped), "exported"
        if not any(name.startswith(system_files.OURS) for name in weights):
            _put_backbone(system, weights, path)
            return "backbone's weights"
    _put(system, weights, path)
    return f"{which} weights"


def _of_published(system: Any, path: Path) -> str:
    """Puts the backbone of a published system into place, in the dtype that it has here."""
    parts = read_parts(path, "init_from")
    if parts is None and any(files_of(path)):
        parts = {"backbone": read_model(path, "init_from")}
    if parts is None or "backbone" not in parts:
        raise StorageError(
            f"init_from={path}: not a run folder (it has no config.yaml), nor that of a published "
            "system; want one, a checkpoint (step_*.ckpt), or exported weights (*.safetensors)"
        )
    _put_backbone(system, parts["backbone"], path)
    others = ", ".join(sorted(parts.keys() - {"backbone"})) or "nothing"
    return (
        f"published backbone (not {others}, which settings of their own choose: vae.weights, "
        "conditioning.weights)"
    )


def _put_backbone(system: Any, state: State, path: Path) -> None:
    """Puts published weights of the network alone into place, which may translate them."""
    if hasattr(system.backbone, "from_published"):
        state = system.backbone.from_published(state)
    own = _without_additions(system, system.base_state(), state)
    compare(own, state, path)
    for name, tensor in own.items():
        tensor.copy_(state[name])
    system.forget_fingerprints()


def _checkpoint(path: Path) -> Path:
    """The checkpoint that `path` stands for."""
    if not path.is_dir():
        return path
    newest = checkpoint.newest(Run(path).checkpoints)
    if newest is None:
        raise StorageError(f"init_from={path}: this run has no good checkpoint yet")
    return newest


def _of_checkpoint(system: Trainable, path: Path, mapped: bool) -> tuple[dict[str, Tensor], str]:
    """Weights of a checkpoint of ours, averaged ones over live ones, and which those are."""
    if not path.with_suffix(".json").is_file():
        raise StorageError(
            f"init_from={path}: not a checkpoint of this program (no manifest beside it); want a "
            "run folder, one of its checkpoints, or exported weights (*.safetensors)"
        )
    state: dict[str, Any] = checkpoint.skim(path) if mapped else checkpoint.load(path)
    if not {"weights", "frozen"} <= state.keys():
        raise StorageError(f"init_from={path}: holds no weights of a system")
    try:
        if not mapped:
            system.check_frozen(state["frozen"], but="backbone")  # it is what begins anew
    except StorageError as e:
        raise StorageError(
            f"init_from={path}: {e}. Where another is wanted on purpose, start from exported "
            "weights (*.safetensors); a first stage is taken over by vae.weights=FILE"
        ) from e
    average = (state.get("ema") or {}).get("average")
    return (state["weights"] | average, "averaged") if average else (state["weights"], "live")


def _put(system: Any, weights: dict[str, Tensor], path: Path) -> None:
    own = system.trainable_state()
    if getattr(system, "adapter", None) is not None:  # then the backbone is not trained, but begins
        own = {k: v for k, v in own.items() if not k.startswith("backbone.")}
        own |= {f"backbone.{k}": v for k, v in system.base_state().items()}
    own = _without_additions(system, own, weights)
    compare(own, weights, path)
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    system.forget_fingerprints()


def _without_additions(
    system: Any, own: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`own` without the backbone's additions of which `weights` know nothing: those stay new."""
    absent = [
        part
        for part in system.root.backbone.additions()
        if not any(part in name for name in weights)
    ]
    kept = {k: v for k, v in own.items() if not any(part in k for part in absent)}
    if len(kept) < len(own):
        log.info("%d weights are new, and add nothing at first", len(own) - len(kept))
    return kept
