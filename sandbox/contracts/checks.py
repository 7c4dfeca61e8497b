"""Checks for `Config.problems`: each yields the problems that it finds, one line each."""

from collections.abc import Iterable, Iterator
from typing import Any

from sandbox.contracts.errors import SizeError


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Iterator[str]:
    """Yields a problem unless `value` is among `choices`."""
    choices = list(choices)
    if value not in choices:
        yield f"{name}={value!r}: want one of {choices}"


def in_range(
    name: str, value: float | None, low: float, high: float = float("inf")
) -> Iterator[str]:
    """Yields a problem unless low <= value <= high; NaN is a problem, None (unset) is not."""
    if value is not None and not low <= value <= high:
        allowed = f">= {low}" if high == float("inf") else f"{low} to {high}"
        yield f"{name}={value}: want {allowed}"


def above(name: str, value: float | None, low: float, high: float = float("inf")) -> Iterator[str]:
    """Yields a problem unless low < value <= high and value is finite. None is no problem."""
    if value is not None and not low < value <= min(high, 1e300):
        yield f"{name}={value}: want > {low}" + ("" if high == float("inf") else f" and <= {high}")


def is_path(name: str) -> bool:
    """Whether `name` is a local file or folder of weights; "owner/model" is a name on the hub."""
    ends = name.endswith((".bin", ".ckpt", ".pt", ".pth", ".safetensors"))
    return ends or name.startswith(("/", ".", "~")) or name.count("/") != 1


def same_length(name: str, value: Iterable[Any], length: int, of: str) -> Iterator[str]:
    """Yields a problem unless `value` has `length` entries, one per `of`."""
    if len(list(value)) != length:
        yield f"{name} has {len(list(value))} entries: want {length}, one for each {of}"


def must_divide(field: str, value: int, by: int) -> None:
    """Raises SizeError unless `value` is a positive multiple of `by`."""
    if value < 1 or value % by:
        raise SizeError(field, value, f"a multiple of {by}")
