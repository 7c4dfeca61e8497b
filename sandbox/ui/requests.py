"""Requests of the page of task=ui to a folder of runs: samples and reports.

Requests are untrusted. Names must exist in the folder, numbers are type-checked, and text never
becomes part of an override, so that a request reaches no other file and no other setting.
"""

import gc
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox.cli.jobs import check_and_wire, resolve_run
from sandbox.config import composition, discovery, registry
from sandbox.config.root import to_root
from sandbox.contracts import ConfigError, SandboxError
from sandbox.runs.lookup import TRAINED_BY, inherited_options, read_root, task_of
from sandbox.runs.run import Run

PAGES = ("*/report.html", "report/report.html", "*/report/report.html", "*/*/report/report.html")
MOST_CLIPS = 32  # of one request
MOST_SHOWN = 8  # videos of a run below a report
NUMBERS = {
    "sampler.steps": int,
    "guidance.guidance_scale": float,
    "data.frames": int,
    "data.height": int,
    "data.width": int,
    "seed": int,
}


@dataclass
class Request:
    """Sample clips for `prompts` from a run: "NAME", or "NAME@STEP" of a checkpoint.

    images, end_images: uploaded files. numbers: setting of NUMBERS -> text. None, or a blank text,
    keeps the run's setting.
    """

    run: str
    weights: str = "ema"
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    end_images: tuple[str, ...] = ()
    sampler: str | None = None
    numbers: Mapping[str, str | None] = field(default_factory=dict)

    def overrides(self) -> list[str]:
        """The request's choices and numbers as command-line overrides."""
        samplers = discovery.options("sampler")
        if self.sampler is not None and self.sampler not in samplers:
            raise ConfigError(f"sampler={self.sampler!r}: want one of {', '.join(samplers)}")
        if len(self.prompts) > MOST_CLIPS:
            raise ConfigError(f"prompts: {len(self.prompts)} prompts; want at most {MOST_CLIPS}")
        words = [f"sampler={self.sampler}"] if self.sampler is not None else []
        filled = {k: v for k, v in self.numbers.items() if v is not None and str(v).strip()}
        for setting, text in filled.items():
            try:
                words.append(f"{setting}={NUMBERS[setting](str(text))}")
            except ValueError:
                want = "an integer" if NUMBERS[setting] is int else "a number"
                raise ConfigError(f"{setting}={text!r}: want {want}, or blank") from None
        return words


@dataclass
class Runs:
    """A folder of runs; nothing outside it is accessible."""

    folder: Path
    plugins_path: str | None = None
    unusable: dict[str, str] = field(default_factory=dict)  # run that cannot be read -> reason

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()

    def inside(self, name: str) -> Path:
        """A path in the folder, with links resolved. Raises ConfigError for paths outside it."""
        if "\0" not in name:
            path = (self.folder / name).resolve()
            if path.is_relative_to(self.folder):
                return path
        raise ConfigError(f"{name!r}: not in the folder of runs; choose from the list")

    def is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder)

    def newest(self, *patterns: str) -> list[Path]:
        """Files in the folder that match, newest first."""
        files = {p for pattern in patterns for p in self.folder.glob(pattern) if self.is_inside(p)}
        return sorted(files, key=lambda p: (-p.stat().st_mtime_ns, str(p)))

    def names(self) -> list[str]:
        """Runs that can be sampled from, newest first, with each of several checkpoints.

        Sets `unusable`.
        """
        from sandbox.storage.checkpoint import steps_in

        names, unusable = [], {}
        for run in (path.parent for path in self.newest("*/config.yaml")):
            try:
                steps = steps_in(run / "checkpoints") if task_of(run) == TRAINED_BY else []
            except (SandboxError, OSError) as e:  # damaged, or deleted meanwhile
                unusable[run.name] = str(e)
                continue
            if steps:
                names += [run.name, *(f"{run.name}@{step}" for step in steps if len(steps) > 1)]
        self.unusable = unusable
        return names

    def readable(self, names: list[str], first: str | None) -> list[str]:
        """`names` with `first`, or else the newest run that can be read, in front.

        Runs before it that cannot be read, such as one whose plugin is missing, become `unusable`.
        """
        left = [first, *names] if first in names else [*names]
        for name in left:
            run = name.partition("@")[0]
            if run in self.unusable:
                continue
            try:
                self.description(name)
            except (SandboxError, OSError) as e:
                self.unusable[run] = str(e)
            else:
                others = (n for n in names if n.partition("@")[0] not in self.unusable)
                return [name, *(n for n in others if n != name)]
        return []

    def resolve(self, name: str | None) -> tuple[Path, int | None]:
        """Folder and step of "NAME" or "NAME@STEP". Raises ConfigError."""
        run, _, step = (name or "").partition("@")
        path = self.inside(run)
        if path.parent != self.folder or not Run(path).config_file.is_file():
            known = ", ".join(self.names()[:5]) or f"none in {self.folder}"
            raise ConfigError(f"run={name!r}: no such run; available: {known}")
        if step and not step.isdecimal():
            raise ConfigError(f"run={name!r}: want {run}, or {run}@STEP of a checkpoint")
        return path, int(step) if step else None

    def description(self, name: str | None) -> str:
        """One line on the clip size, components and conditioning images of a run."""
        root = read_root(self.resolve(name)[0])
        clip, ends = root.data.clips()[0], [*root.conditioning.images()]
        words = {group: getattr(root, group) for group in ("backbone", "sampler", "guidance")}
        parts = [f"{k}={v.plugin.rpartition('/')[2] if v else 'null'}" for k, v in words.items()]
        size = f"{clip.frames} frames of {clip.height} x {clip.width}"
        also = f"; needs images: {', '.join(ends)}" if ends else ""
        return f"{size}; {' '.join(parts)}; steps={root.sampler.steps} seed={root.seed}{also}"

    def images(self, name: str | None) -> tuple[str, ...]:
        """The conditioning images of a run: (), ("start",) or ("start", "end")."""
        return read_root(self.resolve(name)[0]).conditioning.images()

    def make(self, request: Request, to: Path, watch: Callable[[int, int], None]) -> list[Path]:
        """Samples with task=sample; returns files in the order of `prompts`. Raises SandboxError.

        The system is loaded for this request only, and its memory is freed.
        """
        folder, step = self.resolve(request.run)
        words = ["task=sample", f"task.run={quoted(str(folder))}", *request.overrides()]
        if self.plugins_path is not None:
            words.append(f"plugins_path={quoted(self.plugins_path)}")
        discovery.setup(words)
        root = resolve_run(to_root(composition.compose([*inherited_options(words), *words])), words)
        task = replace(
            root.task, to=str(to), step=step, count=1, weights=request.weights,
            prompts=request.prompts, images=request.images, end_images=request.end_images,
        )  # fmt: skip
        wiring = check_and_wire(replace(root, task=task))
        import torch

        try:
            return registry.create(task).make(wiring, watch)[0][:-1]
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def command(self, request: Request) -> str:
        """The command line that produces the same clips."""
        folder, step = self.resolve(request.run)
        words = ["task=sample", f"run={quoted(str(folder))}", f"weights={request.weights}"]
        words += [f"task.step={step}"] if step is not None else []
        files = {"images": request.images, "end_images": request.end_images}
        lists = {"prompts": request.prompts}
        lists |= {k: tuple(Path(file).name for file in v) for k, v in files.items()}
        words += [f"{k}=[{','.join(map(quoted, v))}]" for k, v in lists.items() if v]
        words += [] if request.prompts or request.images else ["task.count=1"]
        return shlex.join(["python", "run.py", *words, *request.overrides()])

    def pages(self) -> list[str]:
        """Reports of multiruns and runs, newest first."""
        return [p.relative_to(self.folder).as_posix() for p in self.newest(*PAGES)]

    def report(self, name: str | None) -> tuple[str, dict[str, list[Path]]]:
        """The HTML of report `name`, and run -> sample files of its runs."""
        from sandbox.reports.ablation_runs import read

        path = self.inside(name or "")
        if name not in self.pages():
            raise ConfigError(f"page={name!r}: no such report; choose from the list")
        own = path.parent
        folders = [own]
        if not Run(own).config_file.is_file():  # an ablation: report/ in the folder of its runs
            folders = [entry.folder for entry in read(own.parent).entries]
        samples = {f.name: filter(self.is_inside, sorted(f.glob("samples/*.*"))) for f in folders}
        return path.read_text(encoding="utf-8"), {
            run: [p for p in files if p.suffix in (".mp4", ".png")][:MOST_SHOWN]
            for run, files in samples.items()
        }


def quoted(text: str) -> str:
    """A text as a literal override value: in quotes unless it is a path."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and "/" in text:
        return text
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
    text = re.sub(r"(\\+)$|(\\*)\"", lambda m: m[1] * 2 if m[1] else m[2] * 2 + r"\"", text)
    return f'"{text}"'


def captions_of(text: Any) -> tuple[str, ...]:
    """One prompt per line; blank lines are ignored."""
    return tuple(line.strip() for line in str(text or "").splitlines() if line.strip())
