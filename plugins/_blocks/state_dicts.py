"""Comparison of state dicts before strict loading."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Names that only one side has, then names of different shapes."""
    names = sorted(own.keys() ^ given.keys())
    return names + [k for k in own if k in given and own[k].shape != given[k].shape]
