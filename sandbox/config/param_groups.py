"""Which weights train, and how fast (`trainable=`): patterns of names, and rates of their own.

An entry is a regular expression that is looked for in a weight's name in the system, such as
backbone.transformer_blocks.0.attn1.to_q.weight; `@` and a factor of the learning rate may follow:
`pos_embed@0.1`. Of several that match the last one counts, and `@0` holds still. So is held what
none matches: it has no gradient, no average and no state of the optimizer, but is part of
checkpoints and exports as ever, so that resuming, sampling and a next stage find it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sandbox.config.registry import nearest
from sandbox.contracts import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer


def apart(entry: str) -> tuple[str, float]:
    """Pattern and factor of an entry. Raises ValueError, or re.error for a broken pattern."""
    pattern, at, factor = entry.rpartition("@")
    pattern, rate = (pattern, float(factor)) if at else (entry, 1.0)
    re.compile(pattern)
    if not pattern or not 0 <= rate < float("inf"):
        raise ValueError(entry)
    return pattern, rate


def problems(entries: Sequence[str] | None) -> Iterator[str]:
    """Every entry that cannot be read, one line each."""
    if entries is not None and not entries:
        yield "trainable=[]: want patterns of weights' names, or null to train all"
    for i, entry in enumerate(entries or ()):
        try:
            apart(entry)
        except (ValueError, re.error):
            yield (
                f"trainable[{i}]={entry!r}: want a part of weights' names (a regular expression), "
                "and maybe @ and a factor of lr, such as pos_embed@0.1"
            )


def rates(names: Iterable[str], entries: Sequence[str]) -> dict[str, float]:
    """The factor of the learning rate of each weight.

    Raises ConfigError with every entry that no name has, and where nothing would train.
    """
    names, found, lost = [*names], {}, []
    words = {word for name in names for word in name.split(".") if not word.isdecimal()}
    for i, entry in enumerate(entries):
        pattern, rate = apart(entry)
        matching = [name for name in names if re.search(pattern, name)]
        found |= dict.fromkeys(matching, rate)
        if not matching:
            near = nearest(pattern, words)
            lost.append(f"trainable[{i}]={entry!r}: no weight that trains has such a name{near}")
    if lost:
        raise ConfigError(*lost)
    if not any(found.values()):
        raise ConfigError(f"trainable={[*entries]}: holds everything still; want some factor > 0")
    return {name: found.get(name, 0.0) for name in names}


def split_groups(optimizer: Optimizer, rate_of: Mapping[int, float]) -> None:
    """Gives each parameter, by its id, a group with its rate; those of rate 1 stay as they are."""
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
