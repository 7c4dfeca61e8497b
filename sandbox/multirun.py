"""Multiruns: every job is checked before the first starts, and each leaves word of its outcome.

Hydra's sweeper makes the jobs and its launcher runs them, here or elsewhere. A job raises and never
exits; the jobs after one that failed still run; the first failure decides the exit code. A job
whose run is finished already is not repeated, so the same command again does what is missing.
"""

from __future__ import annotations

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

from sandbox import config, registry
from sandbox.config import Root
from sandbox.contracts import ConfigError, PluginError, Preempted, SandboxError
from sandbox.environment import code
from sandbox.files import storing, write_atomic
from sandbox.main import Line, check, checked, parse, perform, report, settled, take_seeds
from sandbox.runs import Run, finished_run, read_json
from sandbox.secrets import mask_text

# Launchers send the Configs of plugins by value; cloudpickle before 3 (hydra-ray-launcher asks for
# it) copies what marks the fields of a dataclass, and such a copy has no fields.
copyreg.pickle(type(dataclasses._FIELD), lambda kind: kind.name)  # type: ignore[attr-defined]

SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")


def multirun(line: Line, earlier: list[str], seeds: int | None = None) -> int:
    """Checks every job, then has Hydra's launcher run them; the exit code of the first failure.

    `seeds`: how many runs each job is, with seeds 0, 1, ...; jobs of their own, but where a sweeper
    searches, which wants one number for them all.
    """
    planned = jobs(line.overrides, seeds)
    known = planned or [[o for o in line.overrides if not _sweeps(o)]]
    _check_all(line, earlier, known)
    folder = Path(line.compose([*earlier, *known[0]]).hydra.sweep.dir)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    own = seeds if planned is None else None
    job = Job(folder, tuple(earlier), "--traceback" in line.flags, seeds=own)
    place = config.search_path(line.overrides, line.config_dir)
    place.append("hydra.sweep.dir='" + str(folder).replace("'", "\\'") + "'")
    try:
        if planned is None:
            _swept(line, [*earlier, *line.overrides, *place], job)
        else:
            _launched(line, [[*earlier, *words] for words in planned], place, job)
    except KeyboardInterrupt:
        _sum_up(folder, len(planned or ()))
        raise
    except Exception as e:  # the launcher's own; errors of jobs are said below, job by job
        if not list(folder.glob("job-*.json")):
            raise
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
    code = _sum_up(folder, len(planned or ()))
    _compare(folder)
    return code


def in_turn(overrides: Sequence[str]) -> list[tuple[list[str], Callable[[], tuple[Any, str]]]]:
    """A multirun's jobs, all checked: their overrides, and what runs each without Hydra's launcher.

    That returns the result, and words where it was there already. Raises ConfigError as `multirun`.
    """
    from sandbox.earlier import choices

    line = parse(overrides)
    config.setup(line.overrides)
    line.overrides = config.expand(line.overrides)
    seeds = take_seeds(line)
    planned = jobs(line.overrides, seeds)
    if planned is None:
        raise ConfigError("hydra/sweeper: one that searches wants the command, python run.py -m")
    earlier = choices(line.overrides)
    _check_all(line, earlier, planned)
    return [
        (words, partial(_once, line.compose([*earlier, *words]), words, None)) for words in planned
    ]


def trial(line: Line, earlier: list[str], seeds: int) -> None:
    """A trial of a W&B sweep with several seeds: the agent's own run has seed 0, the others are
    runs beside it. Its summary gets the mean scores in the end.
    """
    cfg = line.compose([*earlier, *line.overrides])
    result = over_seeds(cfg, line.overrides, os.environ.get("WANDB_RUN_ID"), seeds)
    root = config.to_root(cfg)
    if root.logger is None or not result["folders"]:
        return
    tracker, folder = registry.create(root.logger), Path(result["folders"][0])
    tracker.start(folder, Run(folder).config(), folder.name, None)
    means = {f"score/{k}": v for k, v in result["scores"].items()}
    tracker.summary(means | {"seeds": seeds, "objective": result["objective"]})
    tracker.finish(0)


def over_seeds(cfg: Any, overrides: Sequence[str], group: str | None, seeds: int) -> dict[str, Any]:
    """One run for each seed, one after the other; the objective is the mean of theirs.

    Only the first one is a run of a W&B sweep, if there is one.
    """
    results = []
    for seed in range(seeds):
        one = cfg.copy()
        one.seed = seed
        with _beside_the_sweep() if seed else nullcontext():
            results.append(_once(one, [*overrides, f"seed={seed}"], group)[0])
    told = [r for r in results if isinstance(r, dict)]
    numbers = [r["objective"] for r in told if r.get("objective") is not None]
    scores = [r.get("scores", {}) for r in told]
    common = [k for k in scores[0] if all(k in s for s in scores)] if scores else []
    return {
        "folders": [r["folder"] for r in told if "folder" in r],
        "scores": {k: math.fsum(s[k] for s in scores) / len(scores) for k in common},
        "objective": math.fsum(numbers) / seeds if len(numbers) == seeds else None,
    }


@contextmanager
def _beside_the_sweep() -> Iterator[None]:
    """Inside the block a run belongs to no W&B sweep."""
    kept = {k: os.environ.pop(k) for k in SWEEP_VARIABLES if k in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _once(cfg: Any, overrides: Sequence[str], group: str | None) -> tuple[Any, str]:
    """The result of a job, and in words that it was there already; empty where it was not."""
    root = settled(config.to_root(cfg), overrides)
    kept = _finished(root)
    if kept is None:
        return perform(root, overrides, group), ""
    other = " by other code" if read_json(kept / "environment.json").get("code") != code() else ""
    print(f"done before{other}, in {kept} (resume=never repeats it)", flush=True)
    return read_json(kept / "result.json"), f"done before{other}"


def _finished(root: Root) -> Path | None:
    """The newest finished run of exactly this configuration, where the job may take it."""
    if root.resume is None or root.resume.run is not None or root.resume.mode != "auto":
        return None
    wiring = checked(root)
    return None if wiring is None else finished_run(wiring.root)


def _compare(folder: Path) -> None:
    """Writes a report where several runs have finished."""
    results = [read_json(p).get("result") or {} for p in folder.glob("job-*.json")]
    if len({*(f for r in results for f in r.get("folders") or [r.get("folder")] if f)}) < 2:
        return
    from sandbox.ablation import compare
    from sandbox.ablation_page import write_ablation
    from sandbox.ablation_runs import read

    try:
        print(f"report    {write_ablation(folder / 'report', compare(read(folder)))}", flush=True)
    except ConfigError as e:  # such as jobs of a task that leaves no runs to compare
        print(f"no report: {e}", flush=True)


def _hydra() -> Any:
    from hydra.core.global_hydra import GlobalHydra

    from sandbox import recipes

    GlobalHydra.instance().clear()
    hydra = recipes.hydra(config.CONF, config.GROUPS)
    GlobalHydra.instance().initialize(hydra)
    return hydra


def _launched(line: Line, planned: list[list[str]], place: list[str], job: Job) -> None:
    """What Hydra's basic sweeper does once it knows the jobs.

    It would first compose what all jobs share, and so refuse a setting of a component that is swept
    over (`sampler=ddim,euler_a sampler.eta=1`), and write the whole command line down, secrets
    included.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    hydra = _hydra()
    words = [o for o in (*planned[0], *place) if not o.startswith("hydra.sweep.dir=")] + place[-1:]
    shared = hydra.compose_config(line.config_name, words, RunMode.MULTIRUN)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(context, job, shared)
    own = [[o for o in words if not _is_hydras(o)] for words in planned]
    size = shared.hydra.sweeper.max_batch_size or len(own)
    for first in range(0, len(own), size):
        launcher.launch(own[first : first + size], first)


def _swept(line: Line, overrides: list[str], job: Job) -> None:
    """The jobs of a sweeper that finds them as it goes, such as hydra/sweeper=optuna."""
    with redirect_stderr(_WithoutOverrides(sys.stderr)):  # type: ignore[type-var]
        _hydra().multirun(line.config_name, job, overrides, with_log_configuration=False)
    (job.folder / "multirun.yaml").unlink(missing_ok=True)  # it may hold secrets


class _WithoutOverrides:
    """stderr without Hydra's line that repeats the overrides of a failed job, secrets included."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if text.startswith("Error executing job with overrides"):
            return len(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _check_all(line: Line, earlier: list[str], planned: list[list[str]]) -> None:
    """Raises ConfigError with the problems of all jobs, each with the jobs that have it."""
    found: dict[str, list[int]] = {}
    for i, job in enumerate(planned):
        try:
            check(line.compose([*earlier, *job]), job)
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
    """In words: job 3, or jobs 0, 2, 3, 4, 5 and 7 more."""
    shown = ", ".join(map(str, jobs[:5]))
    more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
    return f"job{'s' * (len(jobs) > 1)} {shown}{more}"


def jobs(overrides: Sequence[str], seeds: int | None = None) -> list[list[str]] | None:
    """The overrides of a multirun's jobs, each with `seeds` seeds; None where the sweeper decides
    them as it goes.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    sweeper = next(
        (o.partition("=")[2] for o in overrides if o.startswith("hydra/sweeper=")), "basic"
    )
    if sweeper != "basic":
        return None
    try:
        parsed = OverridesParser.create().parse_overrides([*overrides])
        batches = BasicSweeper.split_arguments(parsed, None)
        found = [config.expand(job) for batch in batches for job in batch]
    except HydraException as e:
        from sandbox.mistakes import explain_words

        raise explain_words(e, overrides) from e
    return found if seeds is None else [[*j, f"seed={n}"] for j in found for n in range(seeds)]


def _is_hydras(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _sweeps(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


@dataclass
class Job:
    """The task function of a multirun: runs a job, notes its outcome in the sweep's folder, and
    raises its error. It never exits: that would take the other jobs along.

    `earlier`: overrides that were put in front and are not the user's; `seeds`: how many runs a job
    is, where it is several.
    """

    folder: Path
    earlier: tuple[str, ...] = ()
    traceback: bool = False
    preempted: bool = False
    seeds: int | None = None

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = [o for o in hydra.overrides.task if o not in self.earlier]
        said = mask_text(" ".join(overrides))
        outcome: dict[str, Any] = {"number": int(hydra.job.num), "overrides": said, "exit_code": 1}
        try:
            if self.preempted:
                raise Preempted("not started: the multirun was asked to stop")
            config.setup(overrides)
            print(f"job {hydra.job.num}: {said}", flush=True)
            if self.seeds is None:
                result, outcome["done_before"] = _once(cfg, overrides, self.folder.name)
            else:
                result = over_seeds(cfg, overrides, self.folder.name, self.seeds)
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
            outcome |= {"error": f"it left with exit code {e.code}"}
            raise RuntimeError(f"a job tried to leave with exit code {e.code}") from e
        except Exception as e:  # a bug: shown whole, noted and raised again
            outcome |= {"error": mask_text(f"{type(e).__name__}: {e}")}
            traceback.print_exception(e)
            raise
        finally:
            path = self.folder / f"job-{hydra.job.num}.json"
            write_atomic(path, json.dumps(outcome, indent=2, default=str))


def _sum_up(folder: Path, planned: int) -> int:
    """Prints one line a job; the exit code is that of the first job that failed."""
    outcomes = {
        o["number"]: o for p in folder.glob("job-*.json") if (o := json.loads(p.read_text()))
    }
    print()
    for i in range(max([planned, *(n + 1 for n in outcomes)])):
        o = outcomes.setdefault(i, {"overrides": "", "exit_code": 1, "error": "it left no word"})
        text = str(o.get("error", "")).partition("\n")[0]
        done = o.get("done_before") or "done"
        said = done if o["exit_code"] == 0 else f"failed (exit code {o['exit_code']}): {text}"
        print(f"job {i} ({o['overrides']}): {said}")
    print(f"multirun  {folder}", flush=True)
    return next((o["exit_code"] for _, o in sorted(outcomes.items()) if o["exit_code"]), 0)
