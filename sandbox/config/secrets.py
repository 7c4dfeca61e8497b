"""Masks keys, tokens and passwords wherever text is written, printed, sent or shown.

A secret is known by where it comes from, whatever its length: an environment variable with a name
such as HF_TOKEN, `${oc.env:NAME}` of one, or a setting with a name such as `api_key`. Strings in
the format of a well-known token are masked as well. Numbers (`num_tokens`, `key_dim`) and short
words under `*_key` (`first_stage_key: image` names a batch field) are never masked.

`mask` and `mask_text` take names into account. `without_secrets` is the last gate of every text
file (`sandbox.storage.atomic`) and of the console (`masked_console`).
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST = 6  # length of an environment value that is masked inside of other text
WORDY = 8  # shorter ones are masked as words only

ALWAYS = frozenset(
    {"password", "passwd", "passphrase", "passcode", "secret", "secrets", "credential",
     "credentials", "bearer", "apitoken"}
)  # fmt: skip
# As the last word of a name; only values that are no ordinary words are masked.
LONG_ONLY = frozenset({"token", "key", "auth", "apikey"})
OF_VARIABLES = frozenset({"pass", "pat", "pwd", "cookie"})  # in names of environment variables
NO_SECRETS = frozenset({"PWD", "OLDPWD"})
# Words before `key`.
KEY_KINDS = frozenset({"api", "access", "secret", "private", "auth", "account"})
KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}"
    r"|local-[0-9a-f]{40}|wandb_v1_[A-Za-z0-9_]{20,})"
)
IN_URL = re.compile(r"(?<=://)([^/\s:@]+):([^/\s@]+)(?=@)")
SETTING = re.compile(r"(?<![\w.+-])(?P<name>[A-Za-z_][\w.+-]*)=(?P<value>\S+)")
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)")

_remembered: set[str] = set()  # values that were found under the name of a secret


def mask(config: Any) -> Any:
    """A copy of plain containers in which secrets are `***`; tuples become lists."""
    return _mask(config, "")


def mask_text(text: str) -> str:
    """`text` with secrets masked; in `name=value` settings the name decides."""

    def setting(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        return f"{name}={MASK}" if is_secret(name, value) else found[0]

    return _without(SETTING.sub(setting, text))


def without_secrets(text: str) -> str:
    """`text` without the secrets of this process, also as HTML, JSON and addresses write them."""
    pattern = _pattern(_known())
    return pattern.sub(MASK, text) if pattern else text


def folder_name(name: str) -> str:
    """A recipe's name as part of the name of a folder, without secrets."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", mask_text(name)).strip("-.") or "run"


def is_secret(name: str, value: str) -> bool:
    """Whether a string under this (dotted) name must be masked."""
    words = _words(name)
    is_key = words[-1] == "key"
    if words[-1] in ALWAYS or (is_key and len(words) > 1 and words[-2] in KEY_KINDS):
        return bool(value)
    if words[-1] not in LONG_ONLY or re.search(r"[\s<>]", value):
        return False
    if is_key:
        return len(value) >= 20 and any(c.isdigit() for c in value)  # letters alone: ordinary
    return len(value) >= 8 or (len(value) >= SHORTEST and any(c.isdigit() for c in value))


def remember(config: Any, name: str = "") -> None:
    """Masks from now on, everywhere, what plain containers hold under the name of a secret.

    In an unresolved configuration, also the values of secret variables that it refers to.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            remember(value, name if _words(name)[-1] in ALWAYS else str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            remember(value, name)
    elif isinstance(config, str):
        if config != MASK and "${" not in config and is_secret(name, config):
            _remembered.add(config)
        for variable in FROM_ENVIRONMENT.findall(config):
            if _is_secret_variable(variable) or is_secret(name, os.environ.get(variable, "")):
                _remembered.add(os.environ.get(variable, ""))


@contextmanager
def masked_console() -> Iterator[None]:
    """Inside the block nothing that is printed shows a secret of this process."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s if isinstance(s, Masked) else Masked(s) for s in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Masked:
    """A text stream without secrets."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_secrets(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self._stream.writelines(map(without_secrets, lines))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [w for w in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if w] or [""]


def _mask(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        inherited = name if _words(name)[-1] in ALWAYS else ""
        return {k: _mask(v, inherited or str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(v, name) for v in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if is_secret(name, value) else _without(value)


def _without(text: str) -> str:
    return IN_URL.sub(rf"\1:{MASK}", KNOWN_FORMS.sub(MASK, without_secrets(text)))


def _is_secret_variable(name: str) -> bool:
    words = _words(name)
    is_key = words[-1] == "key" and len(words) > 1 and words[-2] in KEY_KINDS
    last = ALWAYS | OF_VARIABLES | (LONG_ONLY - {"key"})
    return name not in NO_SECRETS and (words[-1] in last or is_key)


def _known() -> frozenset[str]:
    """The secrets of this process: those of its environment and those that were remembered."""
    own = {
        v
        for k, v in os.environ.items()
        if len(v) >= SHORTEST and (_is_secret_variable(k) or is_secret(k, v))
    }
    from sandbox.config import registry

    return frozenset(own - _words_of_program(len(registry.plugins())) | _remembered - {""})


@lru_cache(maxsize=1)
def _words_of_program(plugins: int) -> frozenset[str]:
    """Names of plugins and values of their settings, such as `cached`: no secrets by themselves."""
    from sandbox.config import registry

    found = {"offline", "online", "disabled", "cached", "auto"}
    for plugin in registry.plugins():
        found |= {plugin.group, plugin.name, *plugin.reading.words}
    return frozenset(found)


@lru_cache(maxsize=8)
def _pattern(known: frozenset[str]) -> re.Pattern[str] | None:
    found: set[str] = set()
    for value in known:
        for text in {value, html.escape(value), json.dumps(value)[1:-1], quote(value, safe="")}:
            word = re.escape(text)
            is_short = len(value) < WORDY
            found.add(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])" if is_short else word)
    # the longest first: one may be part of another
    return re.compile("|".join(sorted(found, key=len, reverse=True))) if found else None
