"""Snapshots of averaged weights in a run folder: ema/step_00000100/NAME.safetensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sandbox.contracts import ConfigError, Snapshot, StorageError
from sandbox.storage import weight_files

FOLDER, UPDATES = "ema", "updates"  # in the header: updates of the average


def write_snapshot(run: Path, step: int, which: Snapshot, average: Mapping[str, Tensor]) -> Path:
    """Writes an average after optimizer step `step`. Raises StorageError, Diverged."""
    path = run / FOLDER / f"step_{step:08d}" / f"{which.name}.safetensors"
    return weight_files.write(average, path, {UPDATES: str(which.updates)}, hashed=True)


def find_snapshots(run: Path, until: int | None = None) -> tuple[int, dict[Path, Snapshot]]:
    """The step of the newest snapshot, and all files up to it, oldest first.

    until: the step of the newest one; null is the last. Raises ConfigError where there is none,
    StorageError for a damaged file.
    """
    folders = {int(p.name[5:]): p for p in sorted((run / FOLDER).glob("step_*")) if p.is_dir()}
    if not folders:
        raise ConfigError(
            f"task.run={run}: it has no snapshots of averages yet; they are written every "
            "ema.snapshot_every steps"
        )
    last = max(folders) if until is None else until
    if last not in folders:
        raise ConfigError(
            f"task.step={until}: {run} has no such snapshot; want {', '.join(map(str, folders))}"
        )
    files = (f for step, p in folders.items() if step <= last for f in sorted(p.glob("*.*")))
    return last, {f: Snapshot(f.stem, _updates(f)) for f in files if f.suffix == ".safetensors"}


def _updates(path: Path) -> int:
    found = weight_files.header(path).get(UPDATES, "")
    if not found.isdecimal():
        raise StorageError(f"{path}: not a snapshot of an average; remove or replace it")
    return int(found)


@torch.no_grad()
def combined(files: Iterable[Path], coefficients: Iterable[float]) -> dict[str, Tensor]:
    """The sum of weight files times their coefficients, computed in float64; float32.

    One file is in memory at a time. Raises StorageError for damaged files or other names.
    """
    total: dict[str, Tensor] = {}
    for path, factor in zip(files, coefficients, strict=True):
        state = weight_files.read(path)
        if total and total.keys() != state.keys():
            raise StorageError(f"{path}: it has other weights than the snapshots before it")
        for name, value in state.items():
            scaled = value.double() * factor
            total[name] = total[name].add_(scaled) if name in total else scaled
    return {name: value.float() for name, value in total.items()}
