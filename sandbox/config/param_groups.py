"""Parameter selection (`trainable=`): which weights train, and with which learning rates.

An entry is a regular expression searched in the names of parameters, such as
backbone.transformer_blocks.0.attn1.to_q.weight, optionally followed by `@` and a factor of the
learning rate: `pos_embed@0.1`. The last matching entry wins; `@0` freezes, as does no match. Frozen
parameters get no gradients, EMA or optimizer state, but stay in checkpoints and exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sandbox.config.registry import nearest
from sandbox.contracts import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer


def parse_entry(entry: str) -> tuple[str, float]:
    """Pattern and factor of an entry. Raises ValueError, or re.error for a broken pattern."""
    pattern, at, factor = entry.rpartition("@")
    pattern, rate = (pattern, float(factor)) if at else (entry, 1.0)
    re.compile(pattern)
    if not pattern or not 0 <= rate < float("inf"):
        raise ValueError(entry)
    return pattern, rate


def problems(entries: Sequence[str] | None) -> Iterator[str]:
    """One line for each entry that cannot be parsed."""
    if entries is not None and not entries:
        yield "trainable=[]: want patterns of parameter names, or null to train all"
    for i, entry in enumerate(entries or ()):
        try:
            parse_entry(entry)
        except (ValueError, re.error):
            yield (
                f"trainable[{i}]={entry!r}: want a regular expression for parameter names, "
                "optionally followed by @ and a factor of lr, such as pos_embed@0.1"
            )


def lr_factors(names: Iterable[str], entries: Sequence[str]) -> dict[str, float]:
    """The learning-rate factor of each parameter; 0 for frozen ones.

    Raises ConfigError for entries that match nothing, and where nothing would train.
    """
    names, found, unmatched = [*names], {}, []
    words = {word for name in names for word in name.split(".") if not word.isdecimal()}
    for i, entry in enumerate(entries):
        pattern, rate = parse_entry(entry)
        matching = [name for name in names if re.search(pattern, name)]
        found |= dict.fromkeys(matching, rate)
        if not matching:
            near = nearest(pattern, words)
            unmatched.append(f"trainable[{i}]={entry!r}: matches no trainable parameter{near}")
    if unmatched:
        raise ConfigError(*unmatched)
    if not any(found.values()):
        raise ConfigError(f"trainable={[*entries]}: freezes every parameter; want some factor > 0")
    return {name: found.get(name, 0.0) for name in names}


def split_groups(optimizer: Optimizer, rate_of: Mapping[int, float]) -> None:
    """Splits optimizer groups by the learning-rate factor of each parameter (by its `id`)."""
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list] = {}
        for parameter in group["params"]:
            parts.setdefault(rate_of.get(id(parameter), 1.0), []).append(parameter)
        start = group.get("initial_lr", group["lr"])
        groups += [
            {**group, "params": part, "lr": start * rate, "initial_lr": start * rate}
            for rate, part in parts.items()
        ]
    optimizer.param_groups[:] = groups
