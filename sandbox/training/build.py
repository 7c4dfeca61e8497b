"""Builds a system from a Wiring or a run folder, for training or sampling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sandbox.config.root import clips_per_step
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import WEIGHTS, StorageError
from sandbox.distributed.rank import Rank
from sandbox.model.cached_latents import load_matching_weights
from sandbox.model.components import build, build_parts
from sandbox.model.devices import device_of, use_threads
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.sharding import load_tensors
from sandbox.model.trainable import without_method
from sandbox.runs.lookup import read_root
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.first_stage_files import matching_weights
from sandbox.storage.weight_check import checking_weight_files
from sandbox.training.first_stage import prepare_first_stage
from sandbox.training.roles import add_guides, check_roles
from sandbox.weights.init_from import (
    check_first_stage,
    check_first_stage_is_given,
    check_fits,
    init_from,
)
from sandbox.weights.system_files import check_sources


def build_system(
    wiring: Wiring,
    folder: Path | None = None,
    rank: Rank | None = None,
    empty: bool = False,
    seed: int | None = None,
) -> LatentDiffusion:
    """A system on the CPU with initial weights and a loaded first stage.

    The first stage is that of the run `folder`, a file, the cache, or trained now by `rank` alone.
    A backbone below an adapter has the weights of `init_from`. `empty`: trained weights are not
    initialised, as the caller loads them. `seed` replaces that of the configuration for them.
    """
    root = wiring.root if seed is None else replace(wiring.root, seed=seed)
    start = root.init_from if root.adapter is not None else None
    parts = build_parts(replace(wiring, root=root), empty or start is not None)
    if root.data.stored() is not None:
        load_matching_weights(root, parts.first_stage)
    else:
        prepare_first_stage(root, parts.first_stage, folder, rank)  # type: ignore[arg-type]
    system = LatentDiffusion(wiring, parts, clips_per_step(wiring.root))
    if start is not None:
        init_from(system, start)  # no checkpoint has the frozen backbone
    add_guides(system)
    return system


def check_weights(wiring: Wiring, begins: bool = True, is_sampled: bool = False) -> None:
    """Checks weight files against the system on the meta device, before anything expensive.

    Raises ConfigError where an entry of `trainable` matches no weights, or where a first stage
    would be trained although `init_from` has one; StorageError where the weights of `init_from`,
    `vae.weights` or `conditioning.weights` have other names, shapes, tables, or values that are not
    finite. `begins`: whether the run loads `init_from` because it has no checkpoint;
    `is_sampled`: whether it is sampled without training.
    """
    root = wiring.root
    check_roles(root)
    start = root.init_from if begins or root.adapter is not None else None
    with checking_weight_files(), torch.device("meta"):
        if root.vae.fitted() != "none" and "weights" in root.vae.files():
            matching_weights(build("vae", root), Path(root.vae.weights), mapped=True)
        planned = None
        if start is not None or root.trainable is not None:
            planned = LatentDiffusion(wiring, build_parts(wiring), 1)
        elif "weights" in root.conditioning.files():
            build("conditioning", root)
    if start is None or planned is None:
        return
    check_fits(planned, start)
    if begins:
        check_sources(root)
        check_first_stage_is_given(root, Path(start), is_sampled)


def load_system(
    folder: Path, weights: str = "ema", wiring: Wiring | None = None, step: int | None = None
) -> LatentDiffusion:
    """`restored_system` with the checkpoint of `step`, by default the newest valid one.

    Raises StorageError where there is no checkpoint, ConfigError where none is of this step.
    """
    return restored_system(folder, load_state(folder, step), weights, wiring)


def load_state(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The state of a checkpoint in a run folder; raises as `load_system`."""
    checkpoints = folder / "checkpoints"
    if step is not None:
        return checkpoint.load(checkpoint.of_step(checkpoints, step))
    state = checkpoint.load_newest(checkpoints)
    if state is None:
        raise StorageError(
            f"{folder}: it has no valid checkpoint; train it first, or name another task.run=FOLDER"
        )
    return state


def restored_system(
    folder: Path, state: dict[str, Any], weights: str = "ema", wiring: Wiring | None = None
) -> LatentDiffusion:
    """The system of a run folder with the weights of `state`, on its device in eval mode.

    `weights`: "ema", which means the live ones in a run without EMA, "live", or a file with all
    weights of the run, as task=ema writes it. Sets the number of threads. Raises StorageError for a
    file with other weights.
    """
    own = read_root(folder)
    wiring = wiring or wire(own)
    wiring = replace(wiring, root=replace(wiring.root, features=None))  # of training alone
    use_threads(wiring.root)
    device = device_of(wiring.root)
    # weights that are random and untrained come from the run's seed, not from that of the samples
    system = build_system(wiring, folder, empty=True, seed=own.seed)
    # the run may have been trained on text embeddings, in place of this text encoder
    new = {k: v for k, v in system.frozen_hashes().items() if k.startswith("conditioner")}
    system.check_frozen(new | state["frozen"])
    average = state["ema"]["average"] if weights == "ema" and state["ema"] else {}
    if weights in WEIGHTS:
        own = without_method(system.trainable_state())
        load_tensors(own, without_method(state["weights"] | average))
    else:
        _load_file(system, Path(weights))
    system.finished_steps = state["step"]
    return system.to(device).eval()


def _load_file(system: LatentDiffusion, path: Path) -> None:
    """Loads all weights of a run from `path`. Raises StorageError where they are of another run."""
    with weight_files.named("task.weights"):
        found, stage = weight_files.read(path), weight_files.header(path).get("first_stage")
    if stage != system.first_stage_hash().get("first_stage"):
        raise StorageError(
            f"task.weights={path}: its first stage is not that of this run; want a file that "
            "task=ema wrote for this run"
        )
    try:
        load_tensors(without_method(system.trainable_state()), without_method(found))
    except StorageError as e:
        raise StorageError(f"task.weights={path}: {e}") from e


def initialised_system(wiring: Wiring) -> LatentDiffusion:
    """The system of a configuration with the weights of `init_from`, for sampling."""
    root = wiring.root
    assert root.init_from is not None  # else there is a run
    check_weights(wiring, is_sampled=True)
    use_threads(root)
    device = device_of(root)
    system = build_system(wiring, empty=True)
    if system.adapter is None:
        init_from(system, root.init_from)
        check_first_stage(system, root.init_from)
    return system.to(device).eval()
