"""Keeps what was read of plugin files, so that a start parses only files with new content.

One file for each plugin folder, in the folder of Python's own bytecode (`__pycache__`, or below
PYTHONPYCACHEPREFIX); PYTHONDONTWRITEBYTECODE turns writing off. An entry is found by the SHA-256 of
the plugin file's content, path and name, and the whole file by that of all code that reads Configs
or that they may use, with the versions of Python, Hydra and OmegaConf. Only files that were read
without an error have an entry. A missing, damaged or outdated file is the same as none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import os
import secrets
import sys
from contextlib import suppress
from dataclasses import astuple
from functools import cache
from importlib.metadata import version
from pathlib import Path

from sandbox.config.paths import CHECKOUT, PLUGINS
from sandbox.config.static_reader import Compiled, LaterReading, Reading, read, read_again, source

NAME = "plugin_configs"
# Folders with all code that reads Configs or that a Config may import from this project
USED = (CHECKOUT / "sandbox/config", CHECKOUT / "sandbox/contracts", PLUGINS / "_configs")
MOST = 2000  # entries; with more, those of earlier contents are dropped
HASH = 32  # bytes of a SHA-256


class ReadingCache:
    """The readings of the plugin files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = cache_file(folder)
        self.known = _load(self.path)
        self.used: dict[bytes, tuple] = {}

    def read(self, path: Path, module: str, group: str, name: str) -> Reading | LaterReading:
        """As `static_reader.read`, without parsing a file whose content was read before."""
        try:
            text = source(path)
        except (OSError, ValueError):
            return read(path, module, group, name)
        key = _digest(str(path), module, group, name, text)
        if (entry := self.known.get(key)) is not None:
            self.used[key] = entry
            return read_again(Compiled(*entry), path, module, group, name, text)
        found = read(path, module, group, name, text)
        if found.compiled is not None:
            self.used[key] = astuple(found.compiled)
        return found

    def write(self) -> None:
        """Writes the entries, if there are new ones. Never raises OSError.

        Two processes that write at once replace each other's file: a reader sees one of them.
        """
        if sys.dont_write_bytecode or self.used.keys() <= self.known.keys():
            return
        entries = self.known | self.used  # also those of files that this process read earlier
        payload = marshal.dumps(entries if len(entries) <= MOST else self.used)
        part = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        with suppress(OSError):  # a read-only or full disk: the next start parses again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(_code_used() + hashlib.sha256(payload).digest() + payload)
                os.replace(part, self.path)
            finally:
                part.unlink(missing_ok=True)


def cache_file(folder: Path) -> Path:
    """The cache of the plugins below `folder`, for this version of Python."""
    return Path(importlib.util.cache_from_source(os.path.abspath(folder / f"{NAME}.py")))


def _load(path: Path) -> dict[bytes, tuple]:
    """The entries of a cache; none where it is missing, damaged or of other code."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    used, digest, payload = content[:HASH], content[HASH : 2 * HASH], content[2 * HASH :]
    if used != _code_used() or digest != hashlib.sha256(payload).digest():
        return {}
    return marshal.loads(payload)


@cache
def _code_used() -> bytes:
    """The SHA-256 of the code and the versions on which a reading depends."""
    files = sorted(path for folder in USED for path in folder.rglob("*.py"))
    code = [part for path in files for part in (str(path), path.read_text(encoding="utf-8"))]
    packages = [f"{name} {version(name)}" for name in ("hydra-core", "omegaconf")]
    return _digest(sys.version, *packages, *code)


def _digest(*parts: str) -> bytes:
    """SHA-256 of the parts, each with its length."""
    sha256 = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        sha256.update(len(data).to_bytes(8, "little") + data)
    return sha256.digest()
