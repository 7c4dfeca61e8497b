"""Weight files, ours and others': written atomically, read without executing them.

Ours have the SHA-256 of their content in the header, which is verified at every load.

Pickled files (.ckpt, .pt, .pth, .bin) may contain code: only tensors and plain containers are
read, and nothing is executed.
"""

import hashlib
import json
import logging
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sandbox.contracts import Diverged, StorageError
from sandbox.storage.atomic import replacing, storage_errors
from sandbox.storage.file_kinds import PICKLE, SAFETENSORS, TORCH, kind_of_file
from sandbox.storage.weight_contents import weights_in

log = logging.getLogger(__name__)

LIVE, AVERAGED = "weights.safetensors", "weights_ema.safetensors"  # exported weights of a run
PLAIN = (str, int, float, bool, bytes, type(None))
SHA256 = "sha256"  # in the header of our files
CHUNK = 1 << 22
MOST_HEADER = 100_000_000  # bytes; the limit of the library
# What torch.load raises on damaged files, besides UnpicklingError.
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
    state: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    hashed: bool = False,
) -> Path:
    """Writes weights as safetensors, atomically; `metadata` goes into the header.

    `hashed`: also the SHA-256 of the content, which `read` verifies. Raises StorageError for a
    failed write, Diverged for a tensor that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_savable(dict(state))
    tensors, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # the format has no shared storage
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            try:
                own = {"format": "pt", **({SHA256: "0" * 64} if hashed else {})}
                save_file(tensors, part, own | dict(metadata or {}))
            except SafetensorError as e:  # raised for a full disk
                raise OSError(str(e)) from e
            with part.open("r+b") as file:
                _finish_header(file)
    return path


def _finish_header(file: BinaryIO) -> None:
    """Sorts the metadata in the header, as the library's order is random, and fills in the hash."""
    found = _header(file)
    length = file.tell() - 8
    metadata = found["__metadata__"]
    if SHA256 in metadata:
        metadata[SHA256] = _content_hash(found, file)
    found["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length
    file.seek(8)
    file.write(text)


def _header(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file; the data follow. Raises ValueError."""
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    found = json.loads(file.read(length))
    if not isinstance(found, dict) or not isinstance(found.get("__metadata__", {}), dict):
        raise ValueError("no header of tensors")
    return found


def _content_hash(header: Mapping[str, Any], data: BinaryIO) -> str:
    """SHA-256 of a header, without the hash in it, and of the data that follow."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != SHA256}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    found = hashlib.sha256(text.encode())
    while chunk := data.read(CHUNK):
        found.update(chunk)
    return found.hexdigest()


def write_pickled(content: Mapping[str, Any], path: Path) -> Path:
    """Writes tensors and plain containers for other programs' `torch.load`, atomically.

    Raises StorageError for a failed write, Diverged for a tensor that is not finite.
    """
    check_savable(dict(content))
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            torch.save(dict(content), file)  # given a path, torch would store its name
    return path


def check_savable(state: Mapping[str, Any]) -> None:
    """Raises TypeError for a type other than plain ones, Diverged for a tensor not finite."""
    tensors = {
        name: tensor.detach()
        for name, tensor in _tensors(state, "state")
        if tensor.is_floating_point() and tensor.numel()
    }
    # A sum is much faster than a check of each number, which only an overflow makes necessary.
    sums = [t.sum(dtype=torch.float32).cpu() for t in tensors.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise Diverged(
            f"not saved: {len(bad)} of {len(tensors)} tensors are not finite: {', '.join(bad[:10])}"
        )


def _tensors(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside `node` with its path. Raises TypeError for other types."""
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
    """Tensors by name of a safetensors or torch file, on the CPU.

    Of a training checkpoint only the weights are returned: its EMA weights, else its live ones; the
    log says which. `mapped` memory-maps the tensors where the format allows it; safetensors always
    are. Verifies the hash of our own files. Raises StorageError, which says what a file of another
    kind is.
    """
    kind = kind_of_weights(path)
    if kind == SAFETENSORS:
        from safetensors.torch import load_file

        verify(path)
        with safetensors_errors(path):
            return load_file(path)
    with opened(path) as file:
        found = load_plain(path, file, "cpu", mapped)
    try:
        weights, taken = weights_in(found)
    except ValueError as e:
        raise StorageError(f"{path}: {e}") from e
    if not weights:
        raise StorageError(f"{path}: it has no named tensors")
    if taken.startswith("EMA"):
        log_once(f"{path}: {taken} taken, not its live weights")
    return weights


def verify(path: Path) -> bool:
    """Whether a safetensors file has the hash of its content.

    Raises StorageError where the hash differs.
    """
    with opened(path) as file:
        try:
            found = _header(file)
        except (ValueError, RecursionError):  # the library reports it
            return False
        recorded = found.get("__metadata__", {}).get(SHA256)
        if recorded is not None and recorded != _content_hash(found, file):
            raise StorageError(
                f"{path}: damaged: its SHA-256 is not that of its header; copy it again"
            )
    return recorded is not None


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of safetensors the same with and without the hash in it.

    Raises StorageError.
    """
    with opened(path) as file:
        try:
            found = _header(file)
        except (ValueError, RecursionError):
            found = {}
            file.seek(0)
        return _content_hash(found, file)


def kind_of_weights(path: Path) -> str:
    """SAFETENSORS, TORCH or PICKLE. Raises StorageError, which names any other kind of file."""
    try:
        kind = kind_of_file(path)
    except OSError as e:
        raise StorageError(f"{path}: cannot be read ({e.strerror or e})") from e
    if kind in (SAFETENSORS, TORCH, PICKLE):
        return kind
    wanted = "safetensors file" if path.suffix == ".safetensors" else "file of weights"
    raise StorageError(f"{path}: not a readable {wanted}: it is {kind}")


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Puts `setting` before the file that a StorageError names."""
    try:
        yield
    except StorageError as e:
        raise StorageError(f"{setting}={e}") from e


@cache
def log_once(text: str) -> None:
    """Logs and prints once what was taken from a file, which is read again for each check."""
    log.info("%s", text)
    print(text, flush=True)  # of rank 0 alone


def header(path: Path) -> dict[str, str]:
    """The metadata in the header of exported weights; empty for other files."""
    from safetensors import safe_open

    if path.suffix != ".safetensors" or kind_of_weights(path) != SAFETENSORS:
        return {}
    with safetensors_errors(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turns errors of the safetensors library into StorageErrors."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as e:
        raise StorageError(f"{path}: not a readable safetensors file ({e})") from e


def opened(path: Path) -> BinaryIO:
    """The file opened for reading. Raises StorageError."""
    try:
        return path.open("rb")
    except OSError as e:
        raise StorageError(f"{path}: cannot be read ({e.strerror or e})") from e


def load_plain(path: Path, file: BinaryIO, device: str, mapped: bool = False) -> Any:
    """torch.load of tensors and plain containers; refuses everything else without running it.

    `mapped` memory-maps the tensors where the format allows it. Raises StorageError.
    """
    try:
        # torch reads a path that ends in .safetensors with that library, whatever it contains
        if mapped and path.suffix != ".safetensors" and zipfile.is_zipfile(file):
            return torch.load(str(path), map_location=device, weights_only=True, mmap=True)
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as e:
        refused = re.search(r"(?:GLOBAL|Unsupported \w+) ([\w.]+)", str(e))
        named = f" ({refused[1]})" if refused else ""
        raise StorageError(
            f"{path}: has more than tensors and plain containers{named}; none of it was run. "
            "Convert it to .safetensors if you trust it"
        ) from e
    except TORN as e:
        raise StorageError(f"{path}: not a file that torch can load ({type(e).__name__})") from e
