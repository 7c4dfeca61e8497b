"""From a Wiring, or from a run folder, to a system that can train and sample."""

from __future__ import annotations

from pathlib import Path

import torch

from sandbox import checkpoint, registry
from sandbox.config import Root
from sandbox.contracts import StorageError
from sandbox.earlier import read_root
from sandbox.ema import EMA
from sandbox.first_stages import prepare_first_stage
from sandbox.latent_diffusion import LatentDiffusion
from sandbox.parts import build_parts
from sandbox.wiring import Wiring, wire


def build_system(wiring: Wiring, folder: Path | None = None) -> LatentDiffusion:
    """Fresh weights, but a ready first stage: that of the run `folder`, else from the cache, a file, or trained now."""
    parts = build_parts(wiring)
    prepare_first_stage(wiring.root, parts.first_stage, folder)
    return LatentDiffusion(wiring, parts, clips_per_step(wiring.root))


def clips_per_step(root: Root) -> int:
    """Clips in one optimizer step over all processes."""
    return root.data.batch_size * root.trainer.processes * root.trainer.accumulate


def load_system(folder: Path, weights: str = "ema", wiring: Wiring | None = None) -> LatentDiffusion:
    """The system of a run folder with the weights of its newest good checkpoint ("ema" or "live").

    Raises StorageError where there is none.
    """
    wiring = wiring or wire(read_root(folder))
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise StorageError(f"{folder}: it has no good checkpoint; train it first, or name another run=FOLDER")
    system = build_system(wiring, folder)
    restore_weights(system, checkpoint.load(newest), weights)
    return system


@torch.no_grad()
def restore_weights(system: LatentDiffusion, state: dict, weights: str = "ema") -> None:
    """Puts a checkpoint's live weights, or their average over them, into a system."""
    system.check_frozen(state["frozen"])
    system.load_trainable(state["weights"])
    if weights == "ema" and state["ema"] is not None:
        ema = EMA.of(system, registry.create(system.root.ema))
        if ema is not None:
            ema.load_state_dict(state["ema"])
            ema.copy_to(system)
