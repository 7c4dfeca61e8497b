"""From a Wiring, or from a run folder, to a system that can train and sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sandbox.config.root import Root, clips_per_step
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import StorageError
from sandbox.distributed.rank import Rank
from sandbox.model.cached_latents import prepare_stored
from sandbox.model.components import build, build_parts
from sandbox.model.devices import device_of, use_threads
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.runs.lookup import read_root
from sandbox.storage import checkpoint
from sandbox.storage.first_stage_files import fitting_weights
from sandbox.training.first_stage import prepare_first_stage
from sandbox.weights.init_from import (
    check_first_stage,
    check_first_stage_is_there,
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
    """Fresh weights on the CPU, but a ready first stage.

    That of the run `folder`, else from the cache, from a file, or trained now, by `rank` alone.
    Below an adapter the backbone has the weights of `init_from`. `empty`: what is trained gets
    weights next, and has none of its own. seed: of weights; None is that of the configuration.
    """
    root = wiring.root if seed is None else replace(wiring.root, seed=seed)
    start = root.init_from if root.adapter is not None else None
    parts = build_parts(replace(wiring, root=root), empty or start is not None)
    if root.data.stored() is not None:
        prepare_stored(root, parts.first_stage)
    else:
        prepare_first_stage(root, parts.first_stage, folder, rank)  # type: ignore[arg-type]
    system = LatentDiffusion(wiring, parts, clips_per_step(wiring.root))
    if start is not None:
        init_from(system, start)  # no checkpoint holds a frozen backbone
    return system


def check_weights(wiring: Wiring, begins: bool = True, is_sampled: bool = False) -> None:
    """Raises ConfigError where `trainable` names no weights that are there, or a first stage would
    be trained that is not that of `init_from`; StorageError where the weights of `init_from` or
    `vae.weights` have other names, shapes or tables. Makes none.

    `begins`: whether the run has no weights of its own yet, so that it looks at `init_from`;
    `is_sampled`: whether it is not trained, either.
    """
    root = wiring.root
    start = root.init_from if begins or root.adapter is not None else None
    if root.vae.fitted() != "none" and "weights" in root.vae.files():
        with torch.device("meta"):
            fitting_weights(build("vae", root), Path(root.vae.weights), mapped=True)
    if start is not None or root.trainable is not None:
        with torch.device("meta"):
            planned = LatentDiffusion(wiring, build_parts(wiring), 1)
        if start is not None:
            check_fits(planned, start)
    if start is not None and begins:
        check_sources(root)
        check_first_stage_is_there(root, Path(start), is_sampled)


def load_system(
    folder: Path, weights: str = "ema", wiring: Wiring | None = None, step: int | None = None
) -> LatentDiffusion:
    """The system of a run folder with the weights of a checkpoint, as `restored_system`.

    step: that of the checkpoint; None is the newest good one. Raises StorageError where there is
    no checkpoint, ConfigError for a `step` of none.
    """
    return restored_system(folder, load_state(folder, step), weights, wiring)


def load_state(folder: Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint of a run folder holds; raises as `load_system`."""
    kept = folder / "checkpoints"
    if step is not None:
        return checkpoint.load(checkpoint.of_step(kept, step))
    state = checkpoint.load_newest(kept)
    if state is None:
        raise StorageError(
            f"{folder}: it has no good checkpoint; train it first, or name another task.run=FOLDER"
        )
    return state


def restored_system(
    folder: Path, state: dict[str, Any], weights: str = "ema", wiring: Wiring | None = None
) -> LatentDiffusion:
    """The system of a run folder with the weights of `state`, to sample from.

    `weights`: "ema" or "live"; the live ones where the run has no average. It is on its device, in
    eval mode, with the threads of training.
    """
    own = read_root(folder)
    wiring = wiring or wire(own)
    device = _device(wiring.root)
    # random weights that are not trained are those of its seed, whatever samples are drawn with
    system = build_system(wiring, folder, empty=True, seed=own.seed)
    restore_weights(system, state, weights)
    return system.to(device).eval()


def begun_system(wiring: Wiring) -> LatentDiffusion:
    """The system of a configuration with the weights of its `init_from`, to sample from."""
    root = wiring.root
    assert root.init_from is not None  # else there would be a run
    check_weights(wiring, is_sampled=True)
    device = _device(root)
    system = build_system(wiring, empty=True)
    if system.adapter is None:
        init_from(system, root.init_from)
        check_first_stage(system, root.init_from)
    return system.to(device).eval()


def _device(root: Root) -> torch.device:
    """Where samples are made, with the threads of training."""
    use_threads(root)
    return device_of(root)


def restore_weights(system: LatentDiffusion, state: dict[str, Any], weights: str = "ema") -> None:
    """Puts the weights of a checkpoint, or their average where there is one, into a system."""
    known = state["frozen"]
    # a text encoder in the place of the embeddings that the run was trained on
    new = {k: v for k, v in system.frozen_parts().items() if k.startswith("conditioner")}
    system.check_frozen(new | known)
    average = state["ema"]["average"] if weights == "ema" and state["ema"] else {}
    system.load_trainable(state["weights"] | average)
    system.finished_steps = state["step"]
