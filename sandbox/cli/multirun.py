"""Multiruns: checks every job before the first starts, and records the outcome of each.

Hydra's sweeper creates the jobs and its launcher runs them, locally or on a cluster. Later jobs run
after a failed one, and the first failure decides the exit code. A finished run is not repeated, so
the same command again runs only what is missing.
"""

import copyreg
import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sandbox.cli.command_line import Line, parse, take_seeds
from sandbox.cli.errors import report
from sandbox.cli.jobs import check, check_and_wire, perform, resolve_run
from sandbox.config import composition, discovery, hydra_compose, registry
from sandbox.config import overrides as override_text
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS, to_root
from sandbox.config.secrets import mask_text
from sandbox.contracts import ConfigError, PluginError, Preempted, SandboxError
from sandbox.runs.environment import code
from sandbox.runs.resume import finished_run
from sandbox.runs.run import Run, read_json
from sandbox.storage.atomic import storage_errors, write_atomic

# Launchers pickle Configs by value. cloudpickle before 3, which hydra-ray-launcher requires, copies
# the sentinel that marks dataclass fields, and such a copy has no fields.
copyreg.pickle(type(dataclasses._FIELD), lambda kind: kind.name)  # type: ignore[attr-defined]

SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


def multirun(line: Line, run_options: list[str], seeds: int | None = None) -> int:
    """Checks every job, then runs them with Hydra's launcher; the exit code of the first failure.

    `run_options`: the options of the earlier run that the task works on (`runs.lookup.choices`).
    `seeds`: runs per job, with seeds 0, 1, ...; each is its own job, except with a searching
    sweeper, which gets the mean objective of all seeds.
    """
    planned = jobs(line.overrides, seeds)
    known = planned or [
        [o for o in line.overrides if not override_text.parse(o).is_sweep_override()]
    ]
    _check_all(line, run_options, known)
    folder = Path(line.compose([*run_options, *known[0]]).hydra.sweep.dir)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, tuple(run_options), "--traceback" in line.flags)
    paths = hydra_compose.search_path(line.overrides, line.config_dir)
    paths.append("hydra.sweep.dir='" + str(folder).replace("'", "\\'") + "'")
    try:
        if planned is None:  # a searching sweeper, such as hydra/sweeper=optuna
            job.seeds = seeds
            own = [*run_options, *line.overrides, *paths]
            with redirect_stderr(_WithoutOverrides(sys.stderr)):  # type: ignore[type-var]
                _hydra().multirun(line.config_name, job, own, with_log_configuration=False)
            (folder / "multirun.yaml").unlink(missing_ok=True)  # may contain secrets
        else:
            _launch(line, [[*run_options, *overrides] for overrides in planned], paths, job)
    except KeyboardInterrupt:
        _summarise(folder, len(planned or ()))
        raise
    except Exception as e:  # raised by the launcher; the summary reports errors of jobs
        if not list(folder.glob("job-*.json")):
            raise
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
    code = _summarise(folder, len(planned or ()))
    _compare(folder)
    return code


def local_jobs(overrides: Sequence[str]) -> list[tuple[list[str], Callable[[], tuple[Any, str]]]]:
    """A multirun's checked jobs: the overrides of each and a function that runs it here.

    The function returns the result of `_run_once`. Raises ConfigError like `multirun`.
    """
    from sandbox.runs.lookup import inherited_options

    line = parse(overrides)
    discovery.setup(line.overrides)
    line.overrides = composition.expand_shorthands(line.overrides, line.config_dir)
    seeds = take_seeds(line)
    planned = jobs(line.overrides, seeds)
    if planned is None:
        raise ConfigError("hydra/sweeper: a searching sweeper needs the command, python run.py -m")
    run_options = inherited_options(line.overrides)
    _check_all(line, run_options, planned)
    return [
        (own, partial(_run_once, line.compose([*run_options, *own]), own, None)) for own in planned
    ]


def trial(line: Line, run_options: list[str], seeds: int) -> None:
    """Runs a trial of a W&B sweep with several seeds, and adds their mean scores to its summary.

    The agent's run has seed 0; the other seeds are runs outside the sweep.
    """
    cfg = line.compose([*run_options, *line.overrides])
    result = run_seeds(cfg, line.overrides, os.environ.get("WANDB_RUN_ID"), seeds)
    root = to_root(cfg)
    if root.logger is None or not result["folders"]:
        return
    tracker, folder = registry.create(root.logger), Path(result["folders"][0])
    tracker.start(folder, Run(folder).config(), folder.name, None)
    means = {f"score/{k}": v for k, v in result["scores"].items()}
    tracker.summary(means | {"seeds": seeds, "objective": result["objective"]})
    tracker.finish(0)


def run_seeds(cfg: Any, overrides: Sequence[str], group: str | None, seeds: int) -> dict[str, Any]:
    """Runs a job once per seed, sequentially: run folders, mean scores and mean objective.

    Only the first run belongs to the W&B sweep, if there is one.
    """
    results = []
    for seed in range(seeds):
        own = cfg.copy()
        own.seed = seed
        with _outside_sweep() if seed else nullcontext():
            result, _ = _run_once(own, [*overrides, f"seed={seed}"], group)
        results += [result] if isinstance(result, dict) else []
    objectives = [r["objective"] for r in results if r.get("objective") is not None]
    scores = [r.get("scores", {}) for r in results]
    common = [k for k in scores[0] if all(k in s for s in scores)] if scores else []
    return {
        "folders": [r["folder"] for r in results if "folder" in r],
        "scores": {k: math.fsum(s[k] for s in scores) / len(scores) for k in common},
        "objective": math.fsum(objectives) / seeds if len(objectives) == seeds else None,
    }


@contextmanager
def _outside_sweep() -> Iterator[None]:
    """Hides the W&B sweep from the runs in the block."""
    kept = {k: os.environ.pop(k) for k in SWEEP_VARIABLES if k in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _run_once(cfg: Any, overrides: Sequence[str], group: str | None) -> tuple[Any, str]:
    """A job's result, and a note if a finished run of this very configuration has it (else "")."""
    root = resolve_run(to_root(cfg), overrides)
    resume = root.resume
    may_reuse = resume is not None and resume.run is None and resume.mode == "auto"
    wiring = check_and_wire(root) if may_reuse else None
    folder = finished_run(wiring.root) if wiring else None
    if folder is None:
        return perform(root, overrides, group), ""
    other = " by other code" if Run(folder).read("environment.json").get("code") != code() else ""
    print(f"done before{other}, in {folder} (resume=never repeats it)", flush=True)
    return Run(folder).read("result.json"), f"done before{other}"


def _compare(folder: Path) -> None:
    """Writes a report if several runs have finished."""
    results = [read_json(p).get("result") or {} for p in folder.glob("job-*.json")]
    if len({*(f for r in results for f in r.get("folders") or [r.get("folder")] if f)}) < 2:
        return
    from sandbox.reports.ablation import compare
    from sandbox.reports.ablation_page import write_ablation
    from sandbox.reports.ablation_runs import read

    try:
        print(f"report    {write_ablation(folder / 'report', compare(read(folder)))}", flush=True)
    except ConfigError as e:  # such as a task whose results cannot be compared
        print(f"no report: {e}", flush=True)


@dataclass
class Job:
    """Hydra's task function: runs a job, records its outcome, and raises its error.

    The outcome goes to the sweep's folder. A searching sweeper counts the errors
    (hydra.sweeper.max_failure_rate). A job never exits, because that would end the others.
    """

    folder: Path
    run_options: tuple[str, ...] = ()  # overrides that the user did not give
    traceback: bool = False
    preempted: bool = False
    seeds: int | None = None  # runs of each job; null: one

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = [o for o in hydra.overrides.task if o not in self.run_options]
        text = mask_text(" ".join(overrides))
        outcome: dict[str, Any] = {"number": int(hydra.job.num), "overrides": text, "exit_code": 1}
        try:
            if self.preempted:
                raise Preempted("not started: the multirun was asked to stop")
            discovery.setup(overrides)
            print(f"job {hydra.job.num}: {text}", flush=True)
            if self.seeds is None:
                result, outcome["done_before"] = _run_once(cfg, overrides, self.folder.name)
            else:
                result = run_seeds(cfg, overrides, self.folder.name, self.seeds)
            outcome |= {"exit_code": 0, "result": result if isinstance(result, dict) else None}
            return result.get("objective") if isinstance(result, dict) else None
        except SandboxError as e:
            self.preempted |= isinstance(e, Preempted)
            outcome |= {"exit_code": e.exit_code, "error": mask_text(str(e))}
            report(e, f"job {hydra.job.num}: ")
            if self.traceback:
                traceback.print_exception(e)
            raise
        except SystemExit as e:
            outcome |= {"error": f"it exited with code {e.code}"}
            raise RuntimeError(f"a job exited with code {e.code}") from e
        except Exception as e:  # a bug
            outcome |= {"error": mask_text(f"{type(e).__name__}: {e}")}
            traceback.print_exception(e)
            raise
        finally:
            path = self.folder / f"job-{hydra.job.num}.json"
            write_atomic(path, json.dumps(outcome, indent=2, default=str))


def _hydra() -> Any:
    from hydra.core.global_hydra import GlobalHydra

    from sandbox.config import recipes

    GlobalHydra.instance().clear()
    hydra = recipes.hydra(CONF, GROUPS)
    GlobalHydra.instance().initialize(hydra)
    return hydra


def _launch(line: Line, planned: list[list[str]], paths: list[str], job: Job) -> None:
    """Runs jobs with Hydra's launcher, in place of Hydra's basic sweeper.

    The basic sweeper first composes what all jobs share. So it would reject a setting of a swept
    component (`sampler=ddim,euler_a sampler.eta=1`), and write secrets of the command line to disk.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    hydra = _hydra()
    first = [o for o in (*planned[0], *paths) if not o.startswith("hydra.sweep.dir=")]
    shared = hydra.compose_config(line.config_name, [*first, paths[-1]], RunMode.MULTIRUN)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(context, job, shared)
    own = [
        [o for o in overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
        for overrides in planned
    ]
    size = shared.hydra.sweeper.max_batch_size or len(own)
    for start in range(0, len(own), size):
        launcher.launch(own[start : start + size], start)


@dataclass
class _WithoutOverrides:
    """stderr without Hydra's line about a failed job, whose overrides may contain secrets."""

    stream: Any

    def write(self, text: str) -> int:
        is_line = text.startswith("Error executing job with overrides")
        return len(text) if is_line else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _check_all(line: Line, run_options: list[str], planned: list[list[str]]) -> None:
    """Raises ConfigError with the problems of all jobs, each with its job numbers."""
    found: dict[str, list[int]] = {}
    for i, job in enumerate(planned):
        try:
            check(line.compose([*run_options, *job]), job)
        except (ConfigError, PluginError) as e:
            for problem in e.problems if isinstance(e, ConfigError) else e.args:
                found.setdefault(problem, []).append(i)
    if not found:
        return
    every = list(range(len(planned)))
    problems = [p if jobs == every else f"{_numbers(jobs)}: {p}" for p, jobs in found.items()]
    error = ConfigError(*problems)
    error.add_note(f"none of the {len(planned)} jobs was started")
    raise error


def _numbers(jobs: list[int]) -> str:
    """job 3, or jobs 0, 2, 3, 4, 5 and 7 more"""
    shown = ", ".join(map(str, jobs[:5]))
    more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
    return f"job{'s' * (len(jobs) > 1)} {shown}{more}"


def jobs(overrides: Sequence[str], seeds: int | None = None) -> list[list[str]] | None:
    """The overrides of a multirun's jobs, each with `seeds` seeds; None for a searching sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    sweepers = [override_text.value(o) for o in overrides if o.startswith("hydra/sweeper=")]
    if sweepers and sweepers[0] != "basic":
        return None
    try:
        batches = BasicSweeper.split_arguments([override_text.parse(o) for o in overrides], None)
        found = [composition.expand_shorthands(job) for batch in batches for job in batch]
    except HydraException as e:
        from sandbox.config.setting_errors import explain_multirun

        raise explain_multirun(e, overrides) from e
    return found if seeds is None else [[*j, f"seed={n}"] for j in found for n in range(seeds)]


def _summarise(folder: Path, planned: int) -> int:
    """Prints one line per job; returns the exit code of the first failed job, else 0."""
    found = [json.loads(p.read_text()) for p in folder.glob("job-*.json")]
    outcomes = {o["number"]: o for o in found}
    print()
    for i in range(max([planned, *(n + 1 for n in outcomes)])):
        o = outcomes.setdefault(i, {"overrides": "", "exit_code": 1, "error": "no outcome file"})
        error = str(o.get("error", "")).partition("\n")[0]
        failed = f"failed (exit code {o['exit_code']}): {error}"
        status = failed if o["exit_code"] else o.get("done_before") or "done"
        print(f"job {i} ({o['overrides']}): {status}")
    print(f"multirun  {folder}", flush=True)
    return next((o["exit_code"] for _, o in sorted(outcomes.items()) if o["exit_code"]), 0)
