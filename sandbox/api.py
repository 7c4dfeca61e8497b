"""The same configuration and the same results as the command, for notebooks and tests.

A notebook begins with

    from sandbox import compose, build, train, sample

    cfg = compose("backbone=dit", "vae=pca", "steps=200")
    run = train(cfg)  # a finished run folder, as the command makes it
    video = sample(run, ["a red 3 moving left"])  # (B, 3, T, H, W) in [-1, 1]
    runs = sweep("backbone=dit,unet3d", "seeds=3")  # as `python run.py -m` does
    compare(runs)  # the report: a table with intervals

`clips` has the data's own, `curve` and `results` what a run recorded; `sheet` and `movie` show
clips.
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
from sandbox.contracts import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from sandbox.contracts import Batch
    from sandbox.model.components import Parts
    from sandbox.model.latent_diffusion import LatentDiffusion
    from sandbox.reports.ablation import Ablation


def compose(*overrides: str) -> Root:
    """Typed and complete configuration of a command line; a task that works on an earlier run has
    that run's. Raises ConfigError with all problems.
    """
    from sandbox.cli.jobs import settled
    from sandbox.runs.lookup import choices

    discovery.setup(overrides)
    expanded = composition.expand(overrides)
    cfg = composition.compose([*choices(expanded), *expanded])
    return wire(settled(to_root(cfg), expanded)).root


def build(cfg: Root | Wiring | Path | str, weights: str = "ema") -> LatentDiffusion:
    """The system of a configuration, with fresh weights, or of a run folder, with trained ones.

    `weights` of a run folder: "ema" or "live" of its newest checkpoint; the live ones where the run
    has no average.
    """
    from sandbox.training.build import build_system, load_system

    discovery.setup()
    if isinstance(cfg, Path | str):
        return load_system(Path(cfg), weights)
    return build_system(cfg if isinstance(cfg, Wiring) else wire(cfg))


def build_parts(cfg: Root | Wiring) -> Parts:
    """The components of a configuration with fresh weights, before they are joined to a system.

    Under `torch.device("meta")` they take no memory.
    """
    from sandbox.model import components

    return components.build_parts(cfg if isinstance(cfg, Wiring) else wire(cfg))


def train(cfg: Root) -> Path:
    """Runs the task of `cfg` as the command does, and returns the run folder.

    One process is this one (`trainer.processes`); several are started beside it.
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
    **scalars: float,
) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] on the CPU, equal to those of `task=sample`.

    captions: or how many clips, of the data's own captions where the conditioning is told any.
    images, end_images: files, one for all captions or one for each; scalars: such as fps=24. Raises
    ConfigError where the conditioning wants others.
    """
    from sandbox.evaluation.evaluate import generate
    from sandbox.evaluation.prompts import given

    system = build(run) if isinstance(run, Path | str) else run
    count, words = (captions, ()) if isinstance(captions, int) else (len(captions) or 8, captions)
    batch = given(system.root, words, images, end_images, count=count, **scalars)
    return generate(system.eval(), batch, steps=steps)


def sweep(*overrides: str) -> list[Path]:
    """The run folders of a command line with `-m`, made here one after the other.

    `a=1,2` is a job for each value, `seeds=3` one for each seed. All are checked before the first
    starts, which raises ConfigError with every problem; what has finished before is not repeated.
    A line is printed for each job, and what it prints itself is not.
    """
    from sandbox.cli.multirun import in_turn
    from sandbox.distributed.supervisor import in_this_process

    jobs, runs = in_turn(overrides), []
    for number, (words, run) in enumerate(jobs, 1):
        began = time.monotonic()
        with in_this_process(), redirect_stdout(io.StringIO()):
            result, was_there = run()
        runs.append(Path(result["folder"]))
        own = " ".join(w for w in words if not all(w in other for other, _ in jobs)) or "the job"
        spent = was_there or f"{time.monotonic() - began:.0f} s"
        print(f"{number} of {len(jobs)}: {own}, {spent}", flush=True)
    return runs


def compare(
    runs: Path | str | Sequence[Path | str],
    baseline: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Ablation:
    """Finished runs, or all in a folder, as one comparison, which a notebook shows as its tables.

    baseline, metrics: as of `task=report`, which writes it as a page and for a paper. Raises
    ConfigError as that does.
    """
    from sandbox.reports import ablation
    from sandbox.reports.ablation_runs import Found, add, read

    is_folder = isinstance(runs, Path | str)
    found = read(Path(runs)) if is_folder else add(Found([]), map(Path, runs))
    if not found.entries:
        raise ConfigError("compare: none of these runs is a finished one of task=train")
    return ablation.compare(found, baseline, metrics)


# --- what a run recorded --------------------------------------------------------------------------


def curve(run: Path | str, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a number that training recorded, such as "loss" or "lr".

    Raises ConfigError with the names that there are.
    """
    import numpy as np

    from sandbox.runs.run import Run

    recorded = Run(run).metrics()
    points = [(step, row[name]) for step, row in recorded.items() if name in row]
    if not points:
        there = sorted({k for row in recorded.values() for k in row})
        raise ConfigError(f"{run}: it recorded no {name!r}; want one of {there}")
    steps, values = np.array(points).T
    return steps, values


def results(run: Path | str) -> dict[str, dict[str, float]]:
    """Row -> score -> number of a finished run, or of a file of its `evaluations/`.

    Rows are "model" and what it is compared with, such as "real clips". Raises ConfigError.
    """
    from sandbox.runs.run import read_json

    path = Path(run)
    found = read_json(path / "metrics.json" if path.is_dir() else path).get("scores")
    if not found:
        raise ConfigError(f"{run}: it has no scores; want a finished run that has a metric")
    return found


# --- clips ----------------------------------------------------------------------------------------


def clips(of: Root | LatentDiffusion, count: int, split: str = "val") -> Batch:
    """The data's own clips, in `.video` (B, 3, T, H, W) in [-1, 1], with `.captions`.

    `split`: "train", or "val", which training never sees.
    """
    from sandbox.evaluation.evaluate import gather

    root = of if isinstance(of, Root) else of.root
    return gather(registry.create(root.data).split(split), count, root.seed)


def sheet(captions: Sequence[str], **columns: Tensor) -> Image:
    """Filmstrips as a picture: a row for each caption, a column for each kind of clips.

    Clips are (B, 3, T, H, W) in [-1, 1]; a name's underscores show as spaces.
    """
    from sandbox.reports import media

    named = {label.replace("_", " "): video for label, video in columns.items()}
    rows = [media.SheetRow(c, {k: v[i] for k, v in named.items()}) for i, c in enumerate(captions)]
    return media.sheet(rows)


@dataclass
class Movie:
    """A moving picture that a notebook shows; `gif` is the file."""

    gif: bytes

    def _repr_html_(self) -> str:
        from base64 import b64encode

        return f'<img src="data:image/gif;base64,{b64encode(self.gif).decode()}">'


def movie(captions: Sequence[str], video: Tensor, fps: float = 8.0, columns: int = 6) -> Movie:
    """Clips (B, 3, T, H, W) in [-1, 1] side by side, moving, each with its caption."""
    from tempfile import TemporaryDirectory

    from sandbox.reports import media

    frames = media.wall(list(zip(captions, video, strict=True)), columns)
    with TemporaryDirectory() as folder:
        path = Path(folder, "movie.gif")
        media.write_gif(path, frames, fps)
        return Movie(path.read_bytes())


__all__ = [
    "build",
    "build_parts",
    "clips",
    "compare",
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
