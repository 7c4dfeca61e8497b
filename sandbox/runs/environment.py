"""The environment that a run records: code, versions, machine, command line."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox.config.paths import CHECKOUT
from sandbox.config.secrets import mask_text

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "lightning",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
    "av",
    "safetensors",
    "scikit-learn",
    "einops",
)


def environment() -> dict[str, Any]:
    """Time, place, command and machine of this process; secrets are masked."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": [mask_text(a) for a in sys.argv],
        "folder": os.getcwd(),
        "code": code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": _hardware(),
        "sweep": os.environ.get("WANDB_SWEEP_ID"),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def code() -> dict[str, Any]:
    """Commit of the checkout, whether files differ from it, and a hash of the changes.

    The hash includes plugins outside the checkout. Empty outside a git checkout.
    """
    from sandbox.config.registry import plugin_sources

    if not (CHECKOUT / ".git").exists():
        return {}
    own = CHECKOUT / "plugins", CHECKOUT / "sandbox"  # git may not know others, such as in .venv
    try:
        found = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
        changes = [*(_changes() if found["dirty"] else ()), *plugin_sources(*own)]
    except (OSError, subprocess.SubprocessError):
        return {}
    parts = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in changes))
    return found | ({"changes": parts.hexdigest()[:12]} if changes else {})


def _changes() -> Iterator[bytes]:
    """Differences from the commit in tracked files, and new files of code and settings."""
    yield _git("diff", "HEAD", "--no-ext-diff", "--binary").encode()
    new = _git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.yaml")
    for name in filter(None, new.split("\0")):
        yield name.encode()
        yield (CHECKOUT / name).read_bytes()


def _git(*words: str) -> str:
    # Without locks: `git status` would lock the index, and a commit at that moment would fail.
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(CHECKOUT), *words],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.decode(errors="replace").strip()


def _hardware() -> dict[str, Any]:
    gpus = Path("/proc/driver/nvidia/gpus")
    return {
        "cpu": _entry(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [_entry(p, "Model") for p in sorted(gpus.glob("*/information"))],
    }


def _entry(path: Path, name: str) -> str:
    """The value of the first line `name : value` of a system file; empty where there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (v.strip() for k, _, v in (x.partition(":") for x in lines) if k.strip() == name), ""
    )
