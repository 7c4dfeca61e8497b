"""Reads the runs of an ablation from their folders: settings, metrics, protocols and costs.

Only run folders are read; no tracker is needed.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sandbox.contracts import ConfigError, StorageError
from sandbox.runs import records
from sandbox.runs.identity import flat_settings, identity_of_work
from sandbox.runs.lookup import TRAINED_BY
from sandbox.runs.run import Run, read_json

MOST_NAMED = 5  # runs or variants in a message
COSTS = {  # key in a run's cost -> heading
    "parameters": "parameters",
    "trained": "trained",
    "training_seconds": "training [s]",
    "peak_memory_mib": "memory [MiB]",
    "flops_per_step": "FLOPs per step",
}


log = logging.getLogger(__name__)


@dataclass
class Entry:
    """What an ablation needs of a finished run."""

    folder: Path
    settings: dict[str, str]  # dotted name -> value as JSON
    metrics: dict[str, Any]  # metrics.json
    result: dict[str, Any]
    environment: dict[str, Any]
    flops: float | None = None  # per optimizer step, if task=plan counted them

    @cached_property
    def values(self) -> dict[str, float]:
        """Every finite metric."""
        values = dict(self.metrics.get("scores", {}).get("model", {}))
        values |= self.metrics.get("val_times", {})
        values["loss"] = self.result.get("loss")
        values["first_stage_psnr_db"] = self.metrics.get("first_stage_psnr_db")
        return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}

    def protocol(self, name: str) -> dict[str, str]:
        """How `name` was computed, dotted name -> value; empty if not recorded."""
        return flat_settings(self.metrics.get("protocols", {}).get(name, {}))

    @property
    def held_out(self) -> dict[str, str]:
        """Number and hashes of the validation clips; empty if not recorded."""
        return flat_settings((self.environment.get("data") or {}).get("val") or {})

    @cached_property
    def costs(self) -> dict[str, float]:
        """Costs; without the time of a resumed run, of which only the last part was measured."""
        costs = {k: v for k, v in self.metrics.get("cost", {}).items() if k in COSTS}
        if self.environment.get("earlier"):
            costs.pop("training_seconds", None)
        return costs if self.flops is None else {**costs, "flops_per_step": self.flops}

    @cached_property
    def by_prompt(self) -> dict[str, dict[str, float]]:
        """Score -> prompt -> mean over its clips."""
        by_clip = Run(self.folder).read("scores_by_clip.json")
        scores: dict[str, dict[str, float]] = {}
        for name, values in by_clip.get("scores", {}).items():
            clips: dict[str, list[float]] = {}
            for caption, value in zip(by_clip["captions"], values, strict=True):
                clips.setdefault(caption, []).append(value)
            scores[name] = {caption: math.fsum(v) / len(v) for caption, v in clips.items()}
        return scores


@dataclass
class RunSet:
    """Finished runs, and why other folders were left out."""

    entries: list[Entry] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read(folder: Path) -> RunSet:
    """Finished training runs of a multirun folder or a folder of run folders. Raises ConfigError
    if there are none.
    """
    if not folder.is_dir():
        raise ConfigError(f"task.runs={folder}: no such folder")
    runs = RunSet()
    is_sweep = any(folder.glob("job-*.json"))
    planned = _planned((folder.parent.parent if is_sweep else folder) / "plans")
    add(runs, _of_jobs(folder, runs) if is_sweep else _below(folder), planned)
    if not runs.entries:
        why = "; ".join(runs.left_out[:MOST_NAMED])
        raise ConfigError(
            f"task.runs={folder}: no finished run of task=train{f' ({why})' if why else ''}; "
            "want the folder of a multirun, or a folder of runs"
        )
    return runs


def add(
    runs: RunSet, folders: Iterable[Path], planned: Mapping[str, float] | None = None
) -> RunSet:
    """Adds the finished training runs among `folders`; `planned`: `identity_of_work` -> FLOPs."""
    for path in folders:
        run = Run(path)
        try:
            config, _ = run.config(), run.read("scores_by_clip.json")
            files = with_evaluations(path), run.read("result.json"), run.read("environment.json")
            run.metrics()
        except StorageError as e:
            log.warning("skipped run: %s", e)
            runs.left_out.append(str(e))
            continue
        if (config.get("task") or {}).get("plugin") != TRAINED_BY:
            continue
        if not run.finished:
            runs.left_out.append(f"{path.name} is not finished")
            continue
        flops = planned.get(identity_of_work(config)) if planned else None
        runs.entries.append(Entry(path, flat_settings(config), *files, flops))
    return runs


def with_evaluations(folder: Path) -> dict[str, Any]:
    """metrics.json, and from task=evaluate the scores that it lacks; of these the newest count."""
    metrics = Run(folder).read("metrics.json")
    known = metrics.setdefault("scores", {}).setdefault("model", {})
    paths = (folder / "evaluations").glob("evaluation-*.json")
    for path in sorted(paths, key=lambda p: (len(p.name), p.name), reverse=True):
        name_in_run = f"evaluations/{path.name}"
        records.check_hash(folder, name_in_run)
        if not path.stat().st_size:  # task=evaluate is at work
            continue
        evaluation = records.read_dict(folder, name_in_run)
        scores = evaluation.get("scores", {}).get("model", {})
        for name in [n for n in scores if n not in known]:
            known[name] = scores[name]
            for kind in ("protocols", "meaning"):
                if name in evaluation.get(kind, {}):
                    metrics.setdefault(kind, {})[name] = evaluation[kind][name]
    return metrics


def _of_jobs(folder: Path, runs: RunSet) -> Iterator[Path]:
    jobs = [read_json(p) for p in folder.glob("job-*.json")]
    for job in sorted(jobs, key=lambda j: j.get("number", 0)):
        if job.get("exit_code") != 0:
            reason = str(job.get("error", "unknown error")).partition("\n")[0]
            name = f"job {job.get('number')} ({job.get('overrides')})"
            runs.left_out.append(f"{name} failed: {reason}")
        result = job.get("result") or {}
        for name in filter(None, result.get("folders") or [result.get("folder")]):
            moved = folder.parent.parent / Path(name).name  # <out>/sweeps/<time>, <out>/<run>
            path = next((p for p in (moved, Path(name)) if Run(p).config_file.is_file()), None)
            if path is not None:
                yield path
            else:
                runs.left_out.append(f"{name} no longer exists")


def _planned(folder: Path) -> dict[str, float]:
    """`identity_of_work` -> FLOPs per optimizer step, from the plans in `folder`."""
    plans = (read_json(path) for path in sorted(folder.glob("*/plan.json")))
    return {p["work"]: float(p["flops_per_step"]) for p in plans if "flops_per_step" in p}


def _below(folder: Path) -> list[Path]:
    if Run(folder).config_file.is_file():
        raise ConfigError(
            f"task.runs={folder}: this is one run; want a folder that contains several"
        )
    return sorted(p.parent for p in folder.glob("*/config.yaml"))
