"""Writes checkpoints in a thread, so that training waits only for a copy of the tensors.

`checkpoint.save_and_prune` does the writing; when a checkpoint is valid does not change. A process
that is killed during the write leaves what a kill during any write leaves: a temporary file, which
the next save removes, and the earlier checkpoints.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class BackgroundWriter:
    """Runs one write at a time. An error of it is raised by the next call of any method, once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], Any]) -> None:
        """Waits for the write before, then runs `write` in a thread."""
        self.wait()
        # A daemon: an exit that does not wait (a second Ctrl-C) is not delayed by it.
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a write that has ended; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises the error of the last write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except BaseException as e:  # raised in the thread that trains
            self._error = e


def copied_state(state: Any) -> Any:
    """A copy of plain containers and tensors, with the tensors in memory of the CPU.

    Tensors that share their storage do so in the copy, so that the file is the same. Needs as much
    memory as the state.
    """
    return _copied(state, {})


def _copied(value: Any, storages: dict[tuple[str, int], torch.UntypedStorage]) -> Any:
    if isinstance(value, dict):
        found = copy.copy(value)  # keeps the type, such as OrderedDict
        for key, item in value.items():
            found[key] = _copied(item, storages)
        return found
    if type(value) in (list, tuple):
        return type(value)(_copied(item, storages) for item in value)
    if type(value) is Tensor and value.layout == torch.strided and not value.is_meta:
        return _copied_tensor(value, storages)
    return copy.deepcopy(value)


def _copied_tensor(value: Tensor, storages: dict[tuple[str, int], torch.UntypedStorage]) -> Tensor:
    if value.is_quantized or value.is_conj() or value.is_neg():
        return value.detach().clone().cpu()
    storage = value.untyped_storage()
    key = (str(storage.device), storage.data_ptr())
    if key not in storages or not storage.nbytes():
        storages[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
    found = torch.empty(0, dtype=value.dtype)
    found.set_(storages[key], value.storage_offset(), value.size(), value.stride())
    return found.requires_grad_(value.requires_grad)
