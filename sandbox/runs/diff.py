"""Compares two run folders: settings, code, data, environment, numbers and weights.

`task=diff` prints the result; `task=replay` requires equal numbers and weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.runs.identity import IGNORED, changes, flat_settings, matches
from sandbox.runs.run import Run, existing_run

# Timings and memory, which differ between equal runs.
MEASURED = ("*seconds*", "*per_second*", "*_ms", "time*", "*memory*")
NOT_COMPARED = ("started", "argv", "folder", "earlier", "code", "data", "versions", "sweep")
WEIGHTS = ("weights.safetensors", "weights_ema.safetensors", "first_stage.safetensors")


@dataclass
class RunDiff:
    """Lines for what differs between two runs, by heading."""

    differences: dict[str, list[str]]

    @property
    def same_result(self) -> bool:
        """Whether every metric of every step, every score and every weight is bit-identical."""
        return not self.differences["numbers"] and not self.differences["weights"]

    def __str__(self, most: int = 20) -> str:
        """Each heading with up to `most` lines; the headings without a difference come last."""
        blocks = []
        for heading, lines in self.differences.items():
            if lines:
                more = [f"and {len(lines) - most} more"] if len(lines) > most else []
                blocks.append("\n  ".join([heading, *lines[:most], *more]))
        if equal := [heading for heading, lines in self.differences.items() if not lines]:
            blocks.append(f"the same: {', '.join(equal)}")
        return "\n".join(blocks)


def compare_runs(a: Path, b: Path) -> RunDiff:
    """Raises ConfigError where a folder has no run, StorageError for unreadable files."""
    one, other = existing_run(a), existing_run(b)
    settings = changes(one.config(), other.config())
    ignored = {name for name in settings if matches(name, IGNORED)}
    envs = one.read("environment.json"), other.read("environment.json")
    rest = [flat_settings({k: v for k, v in e.items() if k not in NOT_COMPARED}) for e in envs]
    versions, data = (
        [flat_settings(e.get(key) or {}) for e in envs] for key in ("versions", "data")
    )
    return RunDiff(
        {
            "settings": [_line(k, *v) for k, v in settings.items() if k not in ignored],
            "settings that do not change a result": [
                _line(k, *v) for k, v in settings.items() if k in ignored
            ],
            "code": _code(*(e.get("code") or {} for e in envs)),
            "data": _between(*data),
            "environment": _between(*rest) + _between(*versions),
            "numbers": [*_steps(one, other), *_scores(one, other)],
            "weights": [*_weights(one.folder, other.folder)],
        }
    )


def _line(name: str, one: Any, other: Any) -> str:
    return f"{name}: {one} -> {other}"


def _between(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys([*one, *other])
    pairs = {k: (one.get(k, "(absent)"), other.get(k, "(absent)")) for k in names}
    return [_line(k, a, b) for k, (a, b) in pairs.items() if a != b]


def _code(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Commits. A checkout with uncommitted changes always counts as different."""
    if one.get("commit") != other.get("commit"):
        return [_line("commit", one.get("commit", "unknown"), other.get("commit", "unknown"))]
    changed = [n for n, e in (("first", one), ("second", other)) if e.get("dirty")]
    if changed:
        return [f"uncommitted changes in the {' and the '.join(changed)} run"]
    return [] if one else ["unknown in both (no git checkout)"]


def _steps(one: Run, other: Run) -> Iterator[str]:
    """The first step that only one run has or at which metrics differ, with those metrics."""
    a, b = one.metrics(), other.metrics()
    for step in sorted({*a, *b}):
        if step not in a or step not in b:
            yield f"step {step}: only in the {'second' if step not in a else 'first'} run"
            return
        pairs = {k: (a[step].get(k), b[step].get(k)) for k in {**a[step], **b[step]}}
        apart = [
            _line(k, *v) for k, v in pairs.items() if v[0] != v[1] and not matches(k, MEASURED)
        ]
        if apart:
            yield f"step {step} is the first that differs: {', '.join(apart)}"
            return


def _scores(one: Run, other: Run) -> list[str]:
    results = [run.read("result.json") for run in (one, other)]
    for name, run, result in zip(("first", "second"), (one, other), results, strict=True):
        if not result:
            return [f"the {name} run has no result: {run.folder.name} is not finished"]
    return _between(
        *(flat_settings({k: v for k, v in r.items() if k != "folder"}) for r in results)
    )


def _weights(one: Path, other: Path) -> Iterator[str]:
    """Exported weights that differ, or that one run lacks."""
    from sandbox.storage.weight_files import content_hash

    for name in WEIGHTS:
        files = [path for path in (one / name, other / name) if path.is_file()]
        if len(files) == 1:
            yield f"{name}: only in the {'first' if files[0].parent == one else 'second'} run"
        elif len({*map(content_hash, files)}) > 1:
            yield f"{name}: differ"
