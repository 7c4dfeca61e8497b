"""Masks keys, tokens and passwords in the run folder, the tracker and the console.

Masked are strings under names such as `api_key` or `password`, values of environment variables with
such names, and strings in the format of a well-known token. Numbers (`num_tokens`, `key_dim`) and
short words under `*_key` (`first_stage_key: image` names a batch field) are never masked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
SHORTEST = 8  # length of a masked environment value; shorter ones occur in ordinary text

ALWAYS = frozenset(
    {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"}
)
# As the last word of a name; only long values are masked.
LONG_ONLY = frozenset({"token", "key", "auth", "apikey"})
# Words before `key`.
KEY_KINDS = frozenset({"api", "access", "secret", "private", "auth", "account"})
KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}"
    r"|local-[0-9a-f]{40}|wandb_v1_[A-Za-z0-9_]{20,})"
)
IN_URL = re.compile(r"(?<=://)([^/\s:@]+):([^/\s@]+)(?=@)")
SETTING = re.compile(r"(?P<name>[A-Za-z_][\w.+-]*)=(?P<value>\S+)")


def mask(config: Any) -> Any:
    """A copy of plain containers in which secrets are `***`; tuples become lists."""
    return _mask(config, "", _environment())


def mask_text(text: str) -> str:
    """`text` with secrets masked; in `name=value` settings the name decides."""

    def setting(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        return f"{name}={MASK}" if is_secret(name, value) else found[0]

    return _without(SETTING.sub(setting, text), _environment())


def is_secret(name: str, value: str) -> bool:
    """Whether a string under this (dotted) name must be masked."""
    words = _words(name)
    if words[-1] in ALWAYS:
        return True
    if words[-1] not in LONG_ONLY or len(value) < SHORTEST or re.search(r"[\s<>]", value):
        return False
    if words[-1] != "key" or (len(words) > 1 and words[-2] in KEY_KINDS):
        return True
    return len(value) >= 20 and any(c.isdigit() for c in value)  # letters alone: ordinary


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [w for w in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if w] or [""]


def _mask(value: Any, name: str, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        inherited = name if _words(name)[-1] in ALWAYS else ""
        return {k: _mask(v, inherited or str(k), known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(v, name, known) for v in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if is_secret(name, value) else _without(value, known)


def _without(text: str, known: list[str]) -> str:
    for value in known:
        text = text.replace(value, MASK)
    return IN_URL.sub(rf"\1:{MASK}", KNOWN_FORMS.sub(MASK, text))


def _environment() -> list[str]:
    """Values of secret environment variables, longest first (one may be part of another)."""
    found = {v for k, v in os.environ.items() if len(v) >= SHORTEST and is_secret(k, v)}
    return sorted(found, key=len, reverse=True)
