"""What a page asks of a folder of runs: samples of them, and what is written about them.

A wish comes from outside. Its names must be of something in the folder, its numbers are numbers,
and its texts never become part of an override; so it can name no other file and no setting that is
not here.
"""

from __future__ import annotations

import gc
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sandbox.cli.jobs import check_and_wire, resolve_run
from sandbox.config import composition, discovery, registry
from sandbox.config.root import to_root
from sandbox.contracts import ConfigError
from sandbox.runs.lookup import TRAINED_BY, choices, read_root, task_of
from sandbox.runs.run import Run

PAGES = ("*/report.html", "report/report.html", "*/report/report.html", "*/*/report/report.html")
MOST_CLIPS = 32  # of one wish
MOST_SHOWN = 8  # videos of a run beside a report
NUMBERS = {  # of a wish, by setting
    "sampler.steps": "steps",
    "guidance.guidance_scale": "guidance",
    "data.frames": "frames",
    "data.height": "height",
    "data.width": "width",
    "seed": "seed",
}


@dataclass
class Wish:
    """Clips of `prompts` from a run: "NAME", or "NAME@STEP" of a checkpoint.

    None is what the run says. images, end_images: files that were uploaded.
    """

    run: str
    weights: str = "ema"
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    end_images: tuple[str, ...] = ()
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = None

    def overrides(self) -> list[str]:
        """Its choices and numbers in words of the command line."""
        samplers = discovery.options("sampler")
        if self.sampler is not None and self.sampler not in samplers:
            raise ConfigError(f"sampler={self.sampler!r}: want one of {', '.join(samplers)}")
        if len(self.prompts) > MOST_CLIPS:
            raise ConfigError(f"prompts: {len(self.prompts)} at once; want at most {MOST_CLIPS}")
        words = [f"sampler={self.sampler}"] if self.sampler is not None else []
        for setting, name in NUMBERS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{setting}={value!r}: want a number")
            words.append(f"{setting}={value}")
        return words


@dataclass
class Runs:
    """A folder of runs, and nothing outside it."""

    folder: Path
    plugins_path: str | None = None

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()

    def inside(self, name: str) -> Path:
        """A path in the folder, links followed. Raises ConfigError for what lies outside it."""
        if "\0" not in name:
            path = (self.folder / name).resolve()
            if path.is_relative_to(self.folder):
                return path
        raise ConfigError(f"{name!r}: not in the folder of runs; choose one of the list")

    def is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder)

    def names(self) -> list[str]:
        """Runs that can be sampled from, newest first; of several checkpoints each."""
        from sandbox.storage.checkpoint import steps_in

        found = [p.parent for p in self.folder.glob("*/config.yaml") if self.is_inside(p)]
        found.sort(key=lambda p: (-(p / "config.yaml").stat().st_mtime_ns, p.name))
        names = []
        for path in found:
            steps = steps_in(path / "checkpoints")
            if steps and task_of(path) == TRAINED_BY:
                names.append(path.name)
                names += [f"{path.name}@{step}" for step in steps if len(steps) > 1]
        return names

    def chosen(self, name: str | None) -> tuple[Path, int | None]:
        """Folder and step of "NAME" or "NAME@STEP". Raises ConfigError with what there is."""
        run, _, step = (name or "").partition("@")
        path = self.inside(run)
        if path.parent != self.folder or not Run(path).config_file.is_file():
            there = ", ".join(self.names()[:5]) or f"none in {self.folder}"
            raise ConfigError(f"run={name!r}: no such run; there is {there}")
        if step and not step.isdecimal():
            raise ConfigError(f"run={name!r}: want {run}, or {run}@STEP of a checkpoint")
        return path, int(step) if step else None

    def about(self, name: str | None) -> str:
        """A line on what a run makes and is told."""
        root = read_root(self.chosen(name)[0])
        clip, told = root.data.clips()[0], [*root.conditioning.images()]
        words = {group: getattr(root, group) for group in ("backbone", "sampler", "guidance")}
        parts = [f"{k}={v.plugin.rpartition('/')[2] if v else 'null'}" for k, v in words.items()]
        size = f"{clip.frames} frames of {clip.height} x {clip.width}"
        also = f"; wants images: {', '.join(told)}" if told else ""
        return f"{size}; {' '.join(parts)}; steps={root.sampler.steps} seed={root.seed}{also}"

    def images(self, name: str | None) -> tuple[str, ...]:
        """The pictures that a run is told: (), ("start",) or ("start", "end")."""
        return read_root(self.chosen(name)[0]).conditioning.images()

    def make(self, wish: Wish, to: Path, watch: Callable[[int, int], None]) -> list[Path]:
        """Files of the clips in the order of `prompts`, made by task=sample. Raises SandboxError.

        The system is loaded for this alone, and its memory is given back.
        """
        folder, step = self.chosen(wish.run)
        words = ["task=sample", f"task.run={quoted(str(folder))}", *wish.overrides()]
        if self.plugins_path is not None:
            words.append(f"plugins_path={quoted(self.plugins_path)}")
        discovery.setup(words)
        root = resolve_run(to_root(composition.compose([*choices(words), *words])), words)
        told = {
            name: getattr(wish, name) for name in ("weights", "prompts", "images", "end_images")
        }
        task = replace(root.task, to=str(to), step=step, count=1, **told)
        wiring = check_and_wire(replace(root, task=task))
        try:
            return registry.create(task).make(wiring, watch)[0][:-1]
        finally:
            _free()

    def command(self, wish: Wish) -> str:
        """The command line that makes the same clips."""
        folder, step = self.chosen(wish.run)
        words = ["task=sample", f"run={quoted(str(folder))}", f"weights={wish.weights}"]
        words += [f"task.step={step}"] if step is not None else []
        for name in ("prompts", "images", "end_images"):
            files = getattr(wish, name)
            said = files if name == "prompts" else [Path(file).name for file in files]
            words += [f"{name}=[{','.join(map(quoted, said))}]"] if files else []
        words += [] if wish.prompts or wish.images else ["task.count=1"]
        return shlex.join(["python", "run.py", *words, *wish.overrides()])

    def pages(self) -> list[str]:
        """Reports of multiruns and of runs, newest first."""
        found = {p for pattern in PAGES for p in self.folder.glob(pattern) if self.is_inside(p)}
        newest = sorted(found, key=lambda p: (-p.stat().st_mtime_ns, str(p)))
        return [p.relative_to(self.folder).as_posix() for p in newest]

    def report(self, name: str | None) -> tuple[str, dict[str, list[Path]]]:
        """The page `name` of `pages`, and videos and pictures of the runs that it is about."""
        from sandbox.reports.ablation_runs import read

        path = self.inside(name or "")
        if name not in self.pages():
            raise ConfigError(f"page={name!r}: no such report; choose one of the list")
        own = path.parent
        folders = [own]
        if not Run(own).config_file.is_file():  # of several: report/ in their folder
            folders = [entry.folder for entry in read(own.parent).entries]
        return path.read_text(encoding="utf-8"), {f.name: [*self._samples(f)] for f in folders}

    def _samples(self, run: Path) -> Iterator[Path]:
        found = sorted(p for p in run.glob("samples/*") if p.suffix in (".mp4", ".png"))
        yield from [p for p in found if self.is_inside(p)][:MOST_SHOWN]


def quoted(text: str) -> str:
    """A text as a value of an override, as it stands: in quotes where it is more than a path."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and "/" in text:
        return text
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
    text = re.sub(r"(\\+)$|(\\*)\"", lambda m: m[1] * 2 if m[1] else m[2] * 2 + r"\"", text)
    return f'"{text}"'


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def captions_of(text: Any) -> tuple[str, ...]:
    """A prompt a line; empty lines count for nothing."""
    return tuple(line.strip() for line in str(text or "").splitlines() if line.strip())
