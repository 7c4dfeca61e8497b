"""Wiring: from a Root to a checked and complete configuration, before anything heavy starts.

All problems are collected. Each line names the settings and numbers of both components and the
nearest values that work.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from sandbox.config import registry
from sandbox.config.compatibility import Compatibility, Wiring
from sandbox.config.root import Root
from sandbox.config.wording import field_of
from sandbox.contracts import ConfigError


def wire(root: Root, reported: frozenset[str] = frozenset()) -> Wiring:
    """Checks and completes `root`. Raises ConfigError with every problem.

    `reported`: groups and settings whose problems are known already; they are not checked again.
    """
    root, found = _scaled(root)
    if root.task is not None and root.vae is not None:
        missing = {
            k: v for k, v in root.task.defaults(root.vae).items() if getattr(root, k) is None
        }
        root = replace(root, **missing)
    absent = {g for g in REQUIRED if getattr(root, g) is None} - reported
    found += [p for p in root.problems() if re.split(r"\W", p)[0] not in reported]
    found += [f"{g}=null: want one of {', '.join(_names(g))}" for g in REQUIRED if g in absent]
    invalid = set(reported) | absent
    for path, cfg in root.parts():
        group = path.partition(".")[0]
        own = [f"{path}.{p}" for p in cfg.problems()]
        seen = {field_of(p) for p in own}
        own += [q for p in registry.type_problems(cfg) if field_of(q := f"{path}.{p}") not in seen]
        if group not in reported:
            found += own
        if own:
            invalid.add(group)
    check = Compatibility(root, invalid)
    wiring = check.run()
    found += check.found
    if not found and wiring is not None:  # check the completed Configs, too
        parts = [(path, cfg) for path, cfg in wiring.root.parts() if path not in invalid]
        found = [f"{path}.{p}" for path, cfg in parts for p in cfg.problems()]
    if found or wiring is None:
        raise ConfigError(*dict.fromkeys(found))
    return wiring


def _scaled(root: Root) -> tuple[Root, list[str]]:
    """`root` with the learning rate that `base_lr` gives, and a problem if `lr` contradicts it."""
    if root.base_lr is None or None in (root.trainer, root.data, root.task, root.vae):
        return root, []
    clips = root.task.micro_batch(root.data, root.vae)
    factors = (root.trainer.accumulate, root.trainer.processes, clips)
    lr = root.base_lr * math.prod(factors)
    if root.lr is None:
        return replace(root, lr=lr), []
    if math.isclose(root.lr, lr) or root.task.uses_run():
        return root, []  # an earlier run: sampling may use another batch size than training did
    terms = " x ".join(map(str, (root.base_lr, *factors)))
    return root, [
        f"lr={root.lr}: base_lr={root.base_lr} gives {lr:.6g} ({terms}: base_lr x "
        "trainer.accumulate x trainer.processes x data.batch_size); set one of them to null"
    ]


REQUIRED = ("task", "data", "vae", "backbone", "conditioning", "schedule", "loss", "method",
            "sampler", "guidance", "optimizer", "lr_schedule", "ema", "trainer", "checkpoint",
            "resume", "kernels")  # fmt: skip


def _names(group: str) -> list[str]:
    return [p.name for p in registry.plugins(group)]
