"""Initial weights of a new run (`init_from=`).

Only weights are loaded: the run starts at step 0 with its own optimizer, EMA and data order, and
may differ in everything except the shapes. Resuming, in contrast, continues the full state of a run
bit for bit (`sandbox.runs.resume`, resume.run=FOLDER).
"""

import logging
from collections.abc import Set
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.config.root import Root
from sandbox.contracts import ConfigError, State, StorageError
from sandbox.model.trainable import Trainable, without_method
from sandbox.runs.lookup import task_of
from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.first_stage_files import cache_path
from sandbox.storage.published import compare, files_of, read_model, read_parts, translate_names
from sandbox.storage.weight_check import shown
from sandbox.storage.weight_contents import match_names, plain_name
from sandbox.weights import system_files

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
FIRST_STAGE_TASK = "task/train_vae"  # its runs have no backbone
log = logging.getLogger(__name__)


def init_from(system: Trainable, path: Path | str) -> None:
    """Loads the trainable weights at `path` into a new system.

    `path`: a run folder (its newest valid checkpoint), a checkpoint, an exported .safetensors file,
    or a published system or backbone, as a file or folder (the folder of a system gives the
    backbone alone). EMA weights are preferred. Strict: raises StorageError with the first names
    and shapes that differ, and where a frozen part, such as the first stage, differs from the one
    in training. Only the backbone's `additions` may be missing, each as a unit.
    """
    which = load_weights(system, Path(path))
    weight_files.log_once(
        f"starting at step 0 from the {which} of {path}; optimizer, EMA and data order are new (to "
        "continue a run instead: resume.run=FOLDER)"
    )


def check_first_stage(system: Trainable, path: Path | str) -> None:
    """Raises StorageError where exported weights were trained with another first stage.

    Training may continue with another one, but samples would be decoded wrongly.
    """
    with weight_files.named("init_from"):
        recorded = weight_files.header(Path(path)).get("first_stage")
    here = system.first_stage_hash().get("first_stage")
    if recorded is not None and recorded != here:
        raise StorageError(
            f"init_from={path}: trained with another first stage than this one (SHA-256 "
            f"{recorded[:12]}, here {here and here[:12]}); name its file or run with vae.weights="
        )


def check_first_stage_is_given(root: Root, path: Path, is_sampled: bool = False) -> None:
    """Raises ConfigError where a first stage would be trained although `path` was trained with one.

    Exported weights only count where the system `is_sampled`: training may use another first stage.
    """
    is_trained = root.vae.weights == "auto" and root.vae.fitted() == "trained"
    if not is_trained or root.data.stored() is not None or cache_path(root).is_file():
        return
    is_checkpoint = _has_manifest(path)
    run = Run(path.parent.parent if is_checkpoint else path)
    fix = "name its file or run with vae.weights="
    if run.config_file.is_file():
        vae = run.config().get("vae") or {}
        own, weights = vae.get("plugin", root.vae.plugin), vae.get("weights", "auto")
        if weights not in (None, "auto") and run.started_in() != Path.cwd():
            weights = run.started_in() / weights
        other = f"vae={own.rpartition('/')[2]} " if own != root.vae.plugin else ""
        fix = f"use {other}vae.weights={run.folder if weights == 'auto' else weights or 'null'}"
    elif not is_checkpoint and not (is_sampled and "first_stage" in weight_files.header(path)):
        return
    raise ConfigError(
        f"vae.weights=auto: it would train a first stage, but init_from={path} was trained with "
        f"one of its own: {fix}"
    )


def check_fits(planned: Trainable, path: Path | str) -> None:
    """Raises StorageError as `init_from` does, for a system on the meta device.

    Compares names, shapes and the schedule's tables without loading the weights.
    """
    load_weights(planned, Path(path))


def load_weights(system: Any, path: Path) -> str:
    """Loads the weights at `path` into `system`, as `init_from`; returns what they are."""
    if not path.exists():
        raise StorageError(f"init_from={path}: no such file or folder")
    mapped = any(p.is_meta for p in system.parameters())
    if path.is_dir() and not Run(path).config_file.is_file():
        return _load_published(system, path)
    if path.is_dir() and task_of(path) == FIRST_STAGE_TASK:
        raise StorageError(
            f"init_from={path}: a run of a first stage alone; use vae.weights={path}"
        )
    if (parts := system_files.read(path, mapped)) is not None:
        return f"{system_files.load_parts(system, parts, path)} weights"
    if path.is_dir() or _has_manifest(path):
        weights, which = _read_checkpoint(system, path, mapped)
    else:
        weights, which = weight_files.read(path, mapped), "exported"
        if any(plain_name(name).startswith(system_files.OURS) for name in weights):
            weights = match_names(weights, system.trainable_state())
        else:
            _load_backbone(system, weights, path)
            return "backbone weights"
    own, weights = without_method(system.trainable_state()), without_method(weights)
    if getattr(system, "adapter", None) is not None:  # the backbone is frozen, but initialised
        own = {k: v for k, v in own.items() if not k.startswith("backbone.")}
        own |= {f"backbone.{k}": v for k, v in system.base_state().items()}
    _copy(system, own, weights, path)
    return f"{which} weights"


def _load_published(system: Any, path: Path) -> str:
    """Loads the backbone of a published system, in the dtype that it has here."""
    parts = read_parts(path, "init_from")
    if parts is None and any(files_of(path)):
        parts = {"backbone": read_model(path, "init_from")}
    if parts is None or "backbone" not in parts:
        files = sorted(p.name for p in path.iterdir() if p.suffix in WEIGHTS)
        if files and files[0] in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
            raise StorageError(
                f"init_from={path}: the folder of a LoRA; use adapter=lora adapter.weights={path}"
            )
        there = f" It has {shown(files)}: name one of these" if files else ""
        raise StorageError(
            f"init_from={path}: not a run folder (it has no config.yaml), nor that of a published "
            "system; want one, a checkpoint (step_*.ckpt), or exported weights (*.safetensors)."
            f"{there}"
        )
    _load_backbone(system, parts["backbone"], path)
    others = ", ".join(sorted(parts.keys() - {"backbone"})) or "nothing"
    return f"published backbone (not {others}: set vae.weights and conditioning.weights)"


def _has_manifest(path: Path) -> bool:
    """Whether `path` is a checkpoint of this program, which has its manifest next to it."""
    return path.suffix != ".json" and path.with_suffix(".json").is_file()


def _load_backbone(system: Any, state: State, path: Path) -> None:
    """Loads published weights of the backbone alone, which may translate them."""
    own = system.base_state()
    _copy(system, own, translate_names(system.backbone, own, state, f"init_from={path}"), path)


def _copy(system: Any, own: State, weights: State, path: Path) -> None:
    """Copies `weights` into `own`, strictly, apart from the backbone's additions that they lack."""
    absent = [
        part
        for part in system.root.backbone.additions()
        if not any(part in name for name in weights)
    ]
    loaded = {k: v for k, v in own.items() if not any(part in k for part in absent)}
    if len(loaded) < len(own):
        _check_scalars_are_trained(system, own.keys() - loaded.keys(), path)
        log.info("%d weights are new, and add nothing at first", len(own) - len(loaded))
    compare(loaded, weights, path)
    for name, tensor in loaded.items():
        tensor.copy_(weights[name])
    system.forget_hashes()


def _check_scalars_are_trained(system: Any, new: Set[str], path: Path) -> None:
    """An adapter freezes the backbone, so that new weights stay zero; StorageError for a number
    that the method tells the network, which would then be ignored.
    """
    names = [n for n in system.root.method.scalars() if any(f".{n}." in key for key in new)]
    if names and getattr(system, "adapter", None) is not None:
        raise StorageError(
            f"init_from={path}: it has no weights for {', '.join(names)} of this method, and the "
            "adapter would freeze them at zero; use adapter=null, or weights of this method"
        )


def _read_checkpoint(system: Trainable, path: Path, mapped: bool) -> tuple[dict[str, Tensor], str]:
    """Weights of a checkpoint, or of the newest one in a run folder, and whether of the EMA."""
    file = checkpoint.newest(Run(path).checkpoints) if path.is_dir() else path
    if file is None:
        raise StorageError(f"init_from={path}: this run has no valid checkpoint yet")
    if not file.with_suffix(".json").is_file():
        raise StorageError(
            f"init_from={file}: not a checkpoint of this program (it has no manifest); want a "
            "run folder, one of its checkpoints, or exported weights (*.safetensors)"
        )
    state: dict[str, Any] = checkpoint.load_mapped(file) if mapped else checkpoint.load(file)
    if not {"weights", "frozen"} <= state.keys():
        raise StorageError(f"init_from={file}: it has no weights of a system")
    try:
        if not mapped:
            system.check_frozen(state["frozen"], but="backbone")  # it is loaded now
    except StorageError as e:
        raise StorageError(
            f"init_from={file}: {e}. To train with another one, use exported weights "
            "(*.safetensors)"
        ) from e
    average = (state.get("ema") or {}).get("average")
    return (state["weights"] | average, "EMA") if average else (state["weights"], "live")
