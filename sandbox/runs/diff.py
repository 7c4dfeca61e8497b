"""Two run folders side by side: what was set, what ran, and where their numbers part.

`task=diff` prints it; `task=replay` asks whether nothing parts at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.contracts import ConfigError
from sandbox.runs.run import IGNORED, Run, changes, leaves, matches, read_json
from sandbox.storage.atomic import digest_of

# Measured on the clock, or of the machine: these differ between equal runs.
CLOCK = ("*seconds*", "*per_second*", "*_ms", "time*", "*memory*")
OF_THE_START = ("started", "argv", "folder", "earlier", "code", "data", "versions", "sweep")
WEIGHTS = ("weights.safetensors", "weights_ema.safetensors", "first_stage.safetensors")


@dataclass
class Twins:
    """What differs between two runs, in lines; each part is empty where nothing does."""

    config: list[str] = field(default_factory=list)  # may change the result
    aside: list[str] = field(default_factory=list)  # settings that may not
    code: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)  # first differing step, scores
    weights: list[str] = field(default_factory=list)

    @property
    def same_result(self) -> bool:
        """Whether every metric of every step, every score and every weight is equal bit for bit."""
        return not self.numbers and not self.weights

    def parts(self) -> Iterator[tuple[str, list[str]]]:
        yield from {
            "settings": self.config,
            "settings that do not change a result": self.aside,
            "code": self.code,
            "data": self.data,
            "environment": self.environment,
            "numbers": self.numbers,
            "weights": self.weights,
        }.items()


def compared(a: Path, b: Path) -> Twins:
    """Everything that differs between two run folders. Raises ConfigError, StorageError."""
    one, other = _run(a), _run(b)
    differing = changes(one.config(), other.config())
    envs = read_json(one.environment), read_json(other.environment)
    return Twins(
        config=[_line(k, *v) for k, v in differing.items() if not matches(k, IGNORED)],
        aside=[_line(k, *v) for k, v in differing.items() if matches(k, IGNORED)],
        code=_code(*(e.get("code") or {} for e in envs)),
        data=_between(*(_part(e, "data") for e in envs)),
        environment=_environment(*envs),
        numbers=[*_steps(one, other), *_scores(one, other)],
        weights=[*_weights(one.folder, other.folder)],
    )


def _run(folder: Path) -> Run:
    run = Run(folder)
    if not run.config_file.is_file():
        raise ConfigError(f"{folder}: no run there (it has no config.yaml); want a run folder")
    return run


def _line(name: str, one: Any, other: Any) -> str:
    return f"{name}: {one} -> {other}"


def _part(environment: Mapping[str, Any], name: str) -> dict[str, str]:
    return leaves(environment.get(name) or {})


def _between(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys([*one, *other])
    pairs = {k: (one.get(k, "(absent)"), other.get(k, "(absent)")) for k in names}
    return [_line(k, a, b) for k, (a, b) in pairs.items() if a != b]


def _environment(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    rest = [leaves({k: v for k, v in e.items() if k not in OF_THE_START}) for e in (one, other)]
    return [*_between(*rest), *_between(*(_part(e, "versions") for e in (one, other)))]


def _code(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Commits; an unclean checkout may hold anything, so it is never said to be the same."""
    if one.get("commit") != other.get("commit"):
        return [_line("commit", one.get("commit", "unknown"), other.get("commit", "unknown"))]
    unclean = [n for n, e in (("first", one), ("second", other)) if e.get("dirty")]
    if unclean:
        return [f"files were changed beside the commit in the {' and the '.join(unclean)} run"]
    return [] if one else ["unknown in both (no git checkout)"]


def _steps(one: Run, other: Run) -> Iterator[str]:
    """The first step at which a metric differs, with the metrics that do, and missing steps."""
    a, b = one.metrics(), other.metrics()
    for step in sorted({*a, *b}):
        if step not in a or step not in b:
            yield f"step {step}: only in the {'second' if step not in a else 'first'} run"
            return
        pairs = {k: (a[step].get(k), b[step].get(k)) for k in {**a[step], **b[step]}}
        apart = [_line(k, *v) for k, v in pairs.items() if v[0] != v[1] and not matches(k, CLOCK)]
        if apart:
            yield f"step {step} is the first that differs: {', '.join(apart)}"
            return


def _scores(one: Run, other: Run) -> list[str]:
    results = [read_json(r.result) for r in (one, other)]
    for name, run, result in zip(("first", "second"), (one, other), results, strict=True):
        if not result:
            return [f"the {name} run has no result: {run.folder.name} is not finished"]
    kept = [leaves({k: v for k, v in r.items() if k != "folder"}) for r in results]
    return _between(*kept)


def _weights(one: Path, other: Path) -> Iterator[str]:
    """Exported weights whose bytes differ; which of two runs lacks them."""
    for name in WEIGHTS:
        files = one / name, other / name
        there = [f.is_file() for f in files]
        if any(there) and not all(there):
            yield f"{name}: only in the {'first' if there[0] else 'second'} run"
        elif all(there) and len({*map(digest_of, files)}) > 1:
            yield f"{name}: differ"


def told(twins: Twins, most: int = 20) -> str:
    """A heading for each part that differs, its lines below; a sentence where nothing does."""
    blocks = []
    for heading, lines in twins.parts():
        if lines:
            more = [f"and {len(lines) - most} more"] if len(lines) > most else []
            shown = [f"  {line}" for line in itertools.chain(lines[:most], more)]
            blocks.append("\n".join([heading, *shown]))
    equal = [heading for heading, lines in twins.parts() if not lines]
    said = f"the same: {', '.join(equal)}" if equal else ""
    return "\n".join(filter(None, [*blocks, said]))
