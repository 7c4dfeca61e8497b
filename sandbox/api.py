"""The notebook API: the same configurations and results as the command.

A notebook starts with

    from sandbox import compose, build, train, sample

    cfg = compose("backbone=dit", "vae=pca", "steps=200")
    run = train(cfg)  # the folder of the finished run
    video = sample(run, ["a red 3 moving left"])  # (B, 3, T, H, W) in [-1, 1]
    runs = sweep("backbone=dit,unet3d", "seeds=3")  # like `python run.py -m`
    compare(runs)  # tables with confidence intervals

`clips` returns clips of the data, `curve` and `results` the metrics of a run; `sheet` and `movie`
display clips.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.config import composition, discovery, registry
from sandbox.config.root import Root, to_root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import ConfigError, PluginConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from sandbox.contracts import Batch
    from sandbox.model.components import Parts
    from sandbox.model.latent_diffusion import LatentDiffusion
    from sandbox.reports.ablation import Ablation


def compose(*overrides: str) -> Root:
    """The typed, complete configuration of a command line.

    A task on an earlier run gets that run's configuration. Raises ConfigError with all problems.
    """
    from sandbox.cli.jobs import resolve_run
    from sandbox.runs.lookup import inherited_options

    discovery.setup(overrides)
    expanded = composition.expand_shorthands(overrides)
    cfg = composition.compose([*inherited_options(expanded), *expanded])
    return wire(resolve_run(to_root(cfg), expanded)).root


def build(cfg: Root | Wiring | Path | str, weights: str = "ema") -> LatentDiffusion:
    """The system of a configuration, with fresh weights, or of a run folder, with trained weights.

    `weights`: "ema" or "live", of the newest checkpoint of a run; "live" if the run has no EMA.
    """
    from sandbox.training.build import build_system, load_system

    discovery.setup()
    if isinstance(cfg, Path | str):
        return load_system(Path(cfg), weights)
    return build_system(cfg if isinstance(cfg, Wiring) else wire(cfg))


def build_parts(cfg: Root | Wiring) -> Parts:
    """The components of a configuration, with fresh weights.

    They take no memory under `torch.device("meta")`.
    """
    from sandbox.model import components

    return components.build_parts(cfg if isinstance(cfg, Wiring) else wire(cfg))


def components(*paths: Path | str) -> dict[str, PluginConfig]:
    """The Configs by group, such as "backbone", of a published model's configuration.

    `paths`: config.json, scheduler_config.json, YAML, or a folder. `sandbox.registry.create` builds
    a component. Raises ConfigError for settings without a counterpart here.
    """
    from sandbox.weights import released_configs

    discovery.setup()
    return released_configs.components(*paths)


def train(cfg: Root) -> Path:
    """Runs the task of `cfg` like the command, and returns the run folder.

    Runs in this process, or in worker processes for trainer.processes > 1.
    """
    from sandbox.cli.jobs import perform
    from sandbox.distributed.supervisor import in_this_process

    with in_this_process():
        return Path(perform(cfg)["folder"])


def sample(
    run: Path | str | LatentDiffusion,
    captions: Sequence[str] | int,
    steps: int | None = None,
    images: Sequence[Path | str] = (),
    end_images: Sequence[Path | str] = (),
    videos: Sequence[Path | str] = (),
    **scalars: float,
) -> Tensor:
    """Generates clips (B, 3, T, H, W) in [-1, 1] on the CPU, equal to those of `task=sample`.

    captions: the prompts, or a number of clips with captions of the data. images, end_images: one
    file, or one per caption; videos: files with known frames. scalars: such as fps=24. Raises
    ConfigError for conditions that the conditioning does not support.
    """
    from sandbox.evaluation.evaluate import generate
    from sandbox.evaluation.prompts import user_batch

    system = build(run) if isinstance(run, Path | str) else run
    count, texts = (captions, ()) if isinstance(captions, int) else (len(captions) or 8, captions)
    batch = user_batch(
        system.root, texts, images, end_images, count=count, videos=videos, **scalars
    )
    return generate(system.eval(), batch, steps=steps)


def sweep(*overrides: str) -> list[Path]:
    """Runs a multirun (`-m`) sequentially in this process; returns the run folders.

    `a=1,2` is one job per value, `seeds=3` one per seed. All jobs are checked first; raises
    ConfigError with every problem. Finished runs are not repeated. Prints one line per job, and
    hides the output of the jobs.
    """
    from sandbox.cli.multirun import local_jobs
    from sandbox.distributed.supervisor import in_this_process

    jobs, runs = local_jobs(overrides), []
    for number, (own, run) in enumerate(jobs, 1):
        start = time.monotonic()
        with in_this_process(), redirect_stdout(io.StringIO()):
            result, note = run()
        runs.append(Path(result["folder"]))
        varied = " ".join(o for o in own if not all(o in other for other, _ in jobs)) or "the job"
        note = note or f"{time.monotonic() - start:.0f} s"
        print(f"{number} of {len(jobs)}: {varied}, {note}", flush=True)
    return runs


def compare(
    runs: Path | str | Sequence[Path | str],
    baseline: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Ablation:
    """Compares finished runs, or all runs in a folder; a notebook displays the tables.

    baseline, metrics: see `task=report`, which writes the comparison as a page and for a paper.
    Raises ConfigError like that task.
    """
    from sandbox.reports import ablation
    from sandbox.reports.ablation_runs import RunSet, add, read

    is_folder = isinstance(runs, Path | str)
    found = read(Path(runs)) if is_folder else add(RunSet(), map(Path, runs))
    if not found.entries:
        raise ConfigError("compare: none of these is a finished run of task=train")
    return ablation.compare(found, baseline, metrics)


# --- metrics of a run -----------------------------------------------------------------------------


def curve(run: Path | str, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a training metric, such as "loss" or "lr".

    Raises ConfigError with the available names.
    """
    import numpy as np

    from sandbox.runs.run import Run

    recorded = Run(run).metrics()
    points = [(step, row[name]) for step, row in recorded.items() if name in row]
    if not points:
        names = sorted({k for row in recorded.values() for k in row})
        raise ConfigError(f"{run}: it recorded no {name!r}; want one of {names}")
    steps, values = np.array(points).T
    return steps, values


def results(run: Path | str) -> dict[str, dict[str, float]]:
    """Row -> score -> value, of a finished run or of a file in its `evaluations/`.

    Rows are "model" and its baselines, such as "real clips". Raises ConfigError without scores.
    """
    from sandbox.runs import records

    path = Path(run)
    if path.is_dir():
        found = records.read_dict(path, "metrics.json").get("scores")
    else:
        found = records.read_dict(path.parent.parent, f"{path.parent.name}/{path.name}").get(
            "scores"
        )
    if not found:
        raise ConfigError(f"{run}: it has no scores; want a finished run that has a metric")
    return found


# --- clips ----------------------------------------------------------------------------------------


def clips(of: Root | LatentDiffusion, count: int, split: str = "val") -> Batch:
    """Clips of the data, with `.captions`; `.video` is (B, 3, T, H, W) in [-1, 1].

    `split`: "train", or "val", which is never trained on.
    """
    from sandbox.evaluation.evaluate import first_clips

    root = of if isinstance(of, Root) else of.root
    return first_clips(registry.create(root.data).split(split), count, root.seed)


def sheet(captions: Sequence[str], **columns: Tensor) -> Image:
    """Filmstrips in one image: a row per caption, a column per keyword.

    Clips are (B, 3, T, H, W) in [-1, 1]; underscores in a keyword become spaces.
    """
    from sandbox.reports import media

    named = {label.replace("_", " "): video for label, video in columns.items()}
    rows = [(c, {k: v[i] for k, v in named.items()}) for i, c in enumerate(captions)]
    return media.sheet(rows)


@dataclass
class Movie:
    """An animation that a notebook displays; `gif` has the bytes of the file."""

    gif: bytes

    def _repr_html_(self) -> str:
        from base64 import b64encode

        return f'<img src="data:image/gif;base64,{b64encode(self.gif).decode()}">'


def movie(captions: Sequence[str], video: Tensor, fps: float = 8.0, columns: int = 6) -> Movie:
    """An animation of clips (B, 3, T, H, W) in [-1, 1] in a grid, each with its caption."""
    from tempfile import TemporaryDirectory

    from sandbox.reports import media

    frames = media.grid_of_clips(list(zip(captions, video, strict=True)), columns)
    with TemporaryDirectory() as folder:
        path = Path(folder, "movie.gif")
        media.write_gif(path, frames, fps)
        return Movie(path.read_bytes())


__all__ = [
    "build",
    "build_parts",
    "clips",
    "compare",
    "components",
    "compose",
    "curve",
    "movie",
    "registry",
    "results",
    "sample",
    "sheet",
    "sweep",
    "train",
]
