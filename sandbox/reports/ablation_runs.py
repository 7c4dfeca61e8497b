"""The runs of a comparison, as their folders tell them: settings, numbers, protocols, costs.

`read` finds those below a folder. Only what is in run folders is read, so it makes no difference
whether a tracker was online.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sandbox.contracts import ConfigError
from sandbox.runs.lookup import TRAINED_BY
from sandbox.runs.run import Run, identity_of_work, leaves, read_json

MOST_NAMED = 5  # runs that are left out, or variants, which a message names
COSTS = {  # key in a run's cost -> heading
    "parameters": "parameters",
    "trained": "trained",
    "training_seconds": "training [s]",
    "peak_memory_mib": "memory [MiB]",
    "flops_per_step": "FLOPs a step",
}


@dataclass
class Entry:
    """A finished run, as far as a comparison needs it."""

    folder: Path
    settings: dict[str, str]  # dotted name -> value as JSON
    metrics: dict[str, Any]  # metrics.json
    result: dict[str, Any]
    environment: dict[str, Any]
    flops: float | None = None  # of an optimizer step, where task=plan was asked

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))

    @cached_property
    def values(self) -> dict[str, float]:
        """Every number that can be compared; NaN and what is missing left out."""
        found = dict(self.metrics.get("scores", {}).get("model", {}))
        found["loss"] = self.result.get("loss")
        found["first_stage_psnr_db"] = self.metrics.get("first_stage_psnr_db")
        return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}

    def protocol(self, name: str) -> dict[str, str]:
        """How `name` was computed, dotted name -> value; empty where the run does not say."""
        return leaves(self.metrics.get("protocols", {}).get(name, {}))

    @property
    def held_out(self) -> dict[str, str]:
        """Number and hashes of the validation clips; empty where the run does not say."""
        return leaves((self.environment.get("data") or {}).get("val") or {})

    @cached_property
    def costs(self) -> dict[str, float]:
        """What it took; no time of a run that was continued, as only its last part was measured."""
        found = {k: v for k, v in self.metrics.get("cost", {}).items() if k in COSTS}
        if self.environment.get("earlier"):
            found.pop("training_seconds", None)
        return found if self.flops is None else {**found, "flops_per_step": self.flops}

    @cached_property
    def by_prompt(self) -> dict[str, dict[str, float]]:
        """Score -> prompt -> mean over its clips."""
        found = read_json(self.folder / "scores_by_clip.json")
        scores: dict[str, dict[str, float]] = {}
        for name, values in found.get("scores", {}).items():
            clips: dict[str, list[float]] = {}
            for caption, value in zip(found["captions"], values, strict=True):
                clips.setdefault(caption, []).append(value)
            scores[name] = {caption: math.fsum(v) / len(v) for caption, v in clips.items()}
        return scores


@dataclass
class Found:
    """What `read` has found, and what it had to leave out, in words."""

    entries: list[Entry]
    left_out: list[str] = field(default_factory=list)


def read(folder: Path) -> Found:
    """The finished training runs of a multirun's folder, or below a folder of run folders.

    Raises ConfigError where there is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"task.runs={folder}: no such folder")
    found = Found([])
    is_sweep = any(folder.glob("job-*.json"))
    planned = _planned((folder.parent.parent if is_sweep else folder) / "plans")
    add(found, _of_jobs(folder, found) if is_sweep else _below(folder), planned)
    if not found.entries:
        why = "; ".join(found.left_out[:MOST_NAMED])
        raise ConfigError(
            f"task.runs={folder}: no finished run of task=train there{f' ({why})' if why else ''}; "
            "want the folder of a multirun, or one of run folders"
        )
    return found


def add(found: Found, folders: Iterable[Path], planned: Mapping[str, float] | None = None) -> Found:
    """`found` with the finished training runs among `folders`; `planned`: FLOPs by kind of work."""
    for path in folders:
        run = Run(path)
        config = run.config()
        if (config.get("task") or {}).get("plugin") != TRAINED_BY:
            continue
        if not run.finished:
            found.left_out.append(f"{path.name} is not finished")
            continue
        result, environment = read_json(run.result), read_json(run.environment)
        metrics = _with_evaluations(path)
        settings = leaves(config)
        flops = planned.get(identity_of_work(settings)) if planned else None
        found.entries.append(Entry(path, settings, metrics, result, environment, flops))
    return found


def _with_evaluations(folder: Path) -> dict[str, Any]:
    """metrics.json, with the further scores that task=evaluate has found; of a name the newest."""
    metrics = read_json(folder / "metrics.json")
    paths = (folder / "evaluations").glob("evaluation-*.json")
    for path in sorted(paths, key=lambda p: (len(p.name), p.name), reverse=True):
        told = read_json(path)
        scores = told.get("scores", {}).get("model", {})
        known = metrics.setdefault("scores", {}).setdefault("model", {})
        for name in scores.keys() - known.keys():
            known[name] = scores[name]
            for kind in ("protocols", "meaning"):
                if name in told.get(kind, {}):
                    metrics.setdefault(kind, {})[name] = told[kind][name]
    return metrics


def _of_jobs(folder: Path, found: Found) -> Iterator[Path]:
    jobs = [read_json(p) for p in folder.glob("job-*.json")]
    for job in sorted(jobs, key=lambda j: j.get("number", 0)):
        results = job.get("result") or {}
        if job.get("exit_code") != 0:
            said = str(job.get("error", "no word")).partition("\n")[0]
            words = f"job {job.get('number')} ({job.get('overrides')})"
            found.left_out.append(f"{words} failed: {said}")
        for name in results.get("folders") or [results.get("folder")]:
            if name is None:
                continue
            moved = folder.parent.parent / Path(name).name  # <out>/sweeps/<time>, <out>/<run>
            path = next((p for p in (moved, Path(name)) if Run(p).config_file.is_file()), None)
            if path is None:
                found.left_out.append(f"{name} is not there any more")
            else:
                yield path


def _planned(folder: Path) -> dict[str, float]:
    """Operations of an optimizer step by `identity_of_work`, as plans in `folder` say."""
    plans = (read_json(path) for path in sorted(folder.glob("*/plan.json")))
    return {p["work"]: float(p["flops_per_step"]) for p in plans if "flops_per_step" in p}


def _below(folder: Path) -> list[Path]:
    if Run(folder).config_file.is_file():
        raise ConfigError(
            f"task.runs={folder}: this is one run; want the folder that holds several"
        )
    return sorted(p.parent for p in folder.glob("*/config.yaml"))
