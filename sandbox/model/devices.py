"""The device of a system, and the number of torch threads."""

import os

import torch

from sandbox.config.root import Root
from sandbox.contracts import ConfigError
from sandbox.distributed.pool import cores


def device_of(root: Root, index: int = 0) -> torch.device:
    """The device of `trainer.accelerator`; auto takes CUDA, then MPS, then CPU. ConfigError."""
    is_available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [name for name, is_there in is_available.items() if is_there]
    chosen = root.trainer.accelerator
    chosen = available[0] if chosen == "auto" else chosen
    if chosen not in available:
        raise ConfigError(
            f"trainer.accelerator={chosen}: this machine has no such device (or torch was "
            f"installed without it); use auto or {' or '.join(available)}"
        )
    return torch.device(chosen, index) if chosen == "cuda" else torch.device(chosen)


def use_threads(root: Root) -> None:
    """Sets the torch threads: trainer.threads, else OMP_NUM_THREADS, or a fair share.

    The share is the process's part of the cores without its data workers. Sampling uses the same
    number as training, so that sums are in the same order.
    """
    share = max(1, cores() // root.trainer.processes - root.data.num_workers)
    variable = os.environ.get("OMP_NUM_THREADS", "")
    chosen = root.trainer.threads or (int(variable) if variable.isdigit() else 0)
    torch.set_num_threads(chosen or share)
