"""Files of weights, ours and others': written whole or not at all, read without running them.

Safetensors hold names and numbers. Pickled files (.ckpt, .pt, .pth, .bin) may hold anything: only
tensors and plain containers are taken from them, and no code of theirs runs.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sandbox.contracts import Diverged, StorageError
from sandbox.storage.atomic import replacing, storing

LIVE, AVERAGED = "weights.safetensors", "weights_ema.safetensors"  # exported weights of a run
PLAIN = (str, int, float, bool, bytes, type(None))
STATE_KEYS = ("state_dict", "module", "model")  # where foreign checkpoints keep their weights
# What torch.load was seen to raise on damaged files, besides UnpicklingError.
TORN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


# --- writing --------------------------------------------------------------------------------------


def write(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes weights as safetensors, atomically. `metadata` is text, in the header of the file.

    Raises StorageError when it cannot be written, Diverged where a tensor is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_savable(dict(state))
    tensors, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = (
            tensor.clone() if storage in seen else tensor
        )  # the format has no shared storage
        seen.add(storage)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            try:
                save_file(tensors, part, {"format": "pt", **(metadata or {})})
            except SafetensorError as e:  # its way to say a full disk
                raise OSError(str(e)) from e
            with part.open("r+b") as file:
                _sort_header(file)
    return path


def _sort_header(file: BinaryIO) -> None:
    """The same texts in the same order: the library writes them in a random one."""
    length = int.from_bytes(file.read(8), "little")
    found = json.loads(file.read(length))
    found["__metadata__"] = dict(sorted(found["__metadata__"].items()))
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length
    file.seek(8)
    file.write(text)


def write_pickled(content: Mapping[str, Any], path: Path) -> Path:
    """Writes tensors and plain containers as others' code unpickles them, atomically.

    Raises StorageError when it cannot be written, Diverged where a tensor is not finite.
    """
    check_savable(dict(content))
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            torch.save(dict(content), file)  # by its name, the file would hold that name
    return path


def check_savable(state: Mapping[str, Any]) -> None:
    """Raises TypeError for what is not plain, Diverged for tensors that are not finite."""
    floating = {}
    for name, tensor in _tensors(state, "state"):
        if tensor.is_floating_point() and tensor.numel():
            floating[name] = tensor.detach()
    if not floating:
        return
    # A sum is much faster than a look at each number; only where it overflows are they looked at.
    sums = torch.stack([t.sum(dtype=torch.float32).cpu() for t in floating.values()])
    if sums.isfinite().all():
        return
    bad = [name for name, tensor in floating.items() if not tensor.isfinite().all()]
    if not bad:
        return
    raise Diverged(
        f"not saved: {len(bad)} of {len(floating)} tensors are not finite: {', '.join(bad[:10])}"
    )


def _tensors(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor below `node` with its path. Raises TypeError for what is not plain."""
    if type(node) in (dict, OrderedDict):
        for key, value in node.items():
            if type(key) not in PLAIN:
                raise TypeError(f"{name}: a {type(key).__name__} cannot be a key in a checkpoint")
            yield from _tensors(value, f"{name}.{key}")
    elif type(node) in (list, tuple):
        for i, value in enumerate(node):
            yield from _tensors(value, f"{name}.{i}")
    elif type(node) in (Tensor, nn.Parameter):
        yield name, node
    elif type(node) not in PLAIN:
        raise TypeError(
            f"{name}: a {type(node).__name__} cannot be in a checkpoint; "
            "want plain containers and tensors"
        )


# --- reading --------------------------------------------------------------------------------------


def read(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors, .ckpt, .pt, .pth or .bin file of any origin, on the CPU.

    Of a training checkpoint only its weights are returned (`state_dict`, `module` or `model`).
    Nothing in the file is run. `mapped`: numbers are read when they are looked at, where the file
    allows it (safetensors always do). Raises StorageError.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise StorageError(f"{path}: not a safetensors file that can be read ({e})") from e
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise StorageError(f"{path}: want a .safetensors, .ckpt, .pt, .pth or .bin file")
    with opened(path) as file:
        found = load_plain(path, file, "cpu", mapped)
    for key in STATE_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    tensors = found.items() if isinstance(found, Mapping) else ()
    weights = {str(name): value.detach() for name, value in tensors if isinstance(value, Tensor)}
    if not weights:
        raise StorageError(f"{path}: holds no named tensors")
    return weights


def header(path: Path) -> dict[str, str]:
    """The text in the header of exported weights; empty for files of another kind."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise StorageError(f"{path}: not a safetensors file that can be read ({e})") from e


def opened(path: Path) -> BinaryIO:
    """The file, to be read. Raises StorageError."""
    try:
        return path.open("rb")
    except OSError as e:
        raise StorageError(f"{path}: cannot be read ({e.strerror or e})") from e


def load_plain(path: Path, file: BinaryIO, device: str, mapped: bool = False) -> Any:
    """torch.load of tensors and plain containers; anything else in the file is refused, not run.

    `mapped`: numbers are read when they are looked at, where the file is of a kind that allows it.
    Raises StorageError.
    """
    try:
        if mapped and zipfile.is_zipfile(file):
            return torch.load(str(path), map_location=device, weights_only=True, mmap=True)
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as e:
        refused = re.search(r"(?:GLOBAL|Unsupported \w+) ([\w.]+)", str(e))
        named = f" ({refused[1]})" if refused else ""
        raise StorageError(
            f"{path}: holds more than tensors and plain containers{named}; nothing of it was run. "
            "Convert it to .safetensors where you trust it"
        ) from e
    except TORN as e:
        raise StorageError(f"{path}: not a file that torch can load ({type(e).__name__})") from e
