"""Where a system computes: its device, and how many threads."""

from __future__ import annotations

import os

import torch

from sandbox.config.root import Root
from sandbox.contracts import ConfigError
from sandbox.distributed.pool import cores


def device_of(root: Root, index: int = 0) -> torch.device:
    """The device of `trainer.accelerator`; auto is the best there is. Raises ConfigError."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = root.trainer.accelerator
    if wanted == "auto":
        wanted = next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        choices = " or ".join(name for name, is_there in there.items() if is_there)
        raise ConfigError(
            f"trainer.accelerator={wanted}: this machine has no such device (or torch was "
            f"installed without it); use auto or {choices}"
        )
    return torch.device(wanted, index) if wanted == "cuda" else torch.device(wanted)


def use_threads(root: Root, threads: int | None = None) -> None:
    """Torch threads of this process: those asked for (also by OMP_NUM_THREADS), else its share.

    That is what the loader's workers leave of its part of the cores. Sampling uses as many as
    training did, which sums in the same order.
    """
    share = max(1, cores() // root.trainer.processes - root.data.num_workers)
    said = os.environ.get("OMP_NUM_THREADS", "")
    asked = threads or root.trainer.threads or (int(said) if said.isdigit() else 0)
    torch.set_num_threads(asked or share)
