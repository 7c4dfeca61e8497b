"""Shared by the benchmark scripts: paths, versions, and result files."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
RESULTS = HOME / "benchmarks" / "results"


def installed(*packages: str) -> dict[str, str | None]:
    """Versions of Python and of the packages; None for packages that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def listed(machine: Mapping[str, Any]) -> str:
    """Versions as "name version, ...", without the device and what is not installed."""
    return ", ".join(f"{k} {v}" for k, v in machine.items() if v and k != "device")


def write(name: str, result: Any, lines: Sequence[str], folder: Path = RESULTS) -> None:
    """Writes NAME.json and NAME.md (the lines) to the folder, and prints the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)
