"""task=prepare: runs the configured stages in order over a folder of videos.

Stages are split into phases, each of which ends with a cutting stage. A phase decodes each clip
once for all its scoring stages; then its stages filter in order, from the scores of all remaining
clips. Scores are journaled before filtering, keyed by the file's bytes, the span, and the stage
settings that determine them: a changed limit recomputes nothing, and a killed run resumes. Results
keep the order of the clips: outputs depend neither on the number of workers nor on restarts.
"""

import hashlib
import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sandbox.config import registry
from sandbox.config.discovery import setup
from sandbox.config.root import Root, to_container
from sandbox.contracts import (
    BadItem,
    ConfigError,
    CuttingStage,
    DataError,
    DecidingStage,
    RenderingStage,
    Row,
    ScoringStage,
    VideoFile,
)
from sandbox.data.video_files import CONTAINERS, VideoClip, probe
from sandbox.distributed.pool import Crashed, Ordered, cores, started
from sandbox.reports.media import write_frames
from sandbox.reports.progress import Progress
from sandbox.storage.atomic import storage_errors, write_atomic
from sandbox.storage.locks import locked
from sandbox.storage.shards import Journal

FORMAT = 2  # version of the score keys; bump when decoding changes
UNREADABLE = "unreadable"  # used in place of a stage name in `dropped`
OTHER_WORK = "judging and the rest"  # key in summary.json
PRESET = "medium"  # of libx264
TEXTS = (".txt", ".caption", ".csv", ".jsonl")  # may be captions
REASONS = 8  # kinds of files that are not read, in a warning

log = logging.getLogger(__name__)


def prepare(root: Root) -> dict[str, Any]:
    """Prepares `root.task.data_root`; the result is also in summary.json.

    Raises ConfigError, DataError, StorageError.
    """
    from sandbox.pipelines.prepare_outputs import sheets, write_format, write_summary

    cfg = root.task
    source, to = (Path(name).expanduser() for name in (cfg.data_root, cfg.to))
    if to.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"task.to={cfg.to}: is inside data_root={cfg.data_root}, so clips would be read as raw "
            "videos; choose a folder elsewhere"
        )
    stages = Stages(root)
    if cfg.format is not None and stages.renderer is None:
        raise ConfigError(
            f"task.format={cfg.format}: no stage writes clips; add normalise to the stages, or "
            "set task.format=null"
        )
    with storage_errors(to):
        to.mkdir(parents=True, exist_ok=True)
    count = cores() if cfg.workers is None else cfg.workers
    began = time.process_time()
    with locked(to / "prepare", "task.to"), started(cfg.engine, count, cfg.ray_address) as ordered:
        work = Work(to, stages, ordered)
        try:
            rows = work.phases(work.sources(source))
            kept = [row for row in rows if "dropped" not in row]
            if cfg.format is not None:
                check_captions(kept, cfg.format)
                work.render(kept)
                kept = [row for row in rows if "dropped" not in row]
                write_format(to, cfg.format, kept, cfg.shard_mb * 1_000_000)
        finally:
            work.journal.close()
    with storage_errors(to):
        write_manifest(to, root, rows)
        sheets(to / "dropped", rows, cfg.sheet)
        if count:
            work.spent[OTHER_WORK] += time.process_time() - began
        result = write_summary(to, rows, stages.names, work.spent, work.is_complete)
    if not kept:
        raise DataError(f"data_root={cfg.data_root}: all clips were dropped; see {to}/summary.json")
    return result


# --- the stages -----------------------------------------------------------------------------------


class Stages:
    """The configured stages, in order."""

    def __init__(self, root: Root) -> None:
        self.configs = dict(root.stage)
        self.plugins_path = root.plugins_path
        self.names = [*self.configs]
        self.built = {name: registry.create(cfg) for name, cfg in self.configs.items()}
        self.renderer = next(
            (n for n, s in self.built.items() if isinstance(s, RenderingStage)), None
        )
        self.digests = {name: self._digest(cfg) for name, cfg in self.configs.items()}

    def phases(self) -> Iterator[list[str]]:
        """Stage names, split after each stage that cuts."""
        phase: list[str] = []
        for name, stage in self.built.items():
            phase.append(name)
            if isinstance(stage, CuttingStage):
                yield phase
                phase = []
        yield phase

    def shared(self, names: Sequence[str]) -> str:
        """JSON from which a worker builds stages; hashable, so that it can cache them."""
        chosen = {n: to_container(self.configs[n]) for n in names}
        return json.dumps([self.plugins_path, chosen])

    def key(self, name: str, row: Row) -> str:
        return hash_parts(name, self.digests[name], row["info"].sha256, row["start"], row["end"])

    @staticmethod
    def _digest(cfg: Any) -> str:
        """Hash of a stage's code and the settings that determine its scores."""
        path = registry.find(cfg.plugin).path
        code = path.read_text(encoding="utf-8") if path else ""
        settings = {k: v for k, v in to_container(cfg).items() if k not in cfg.limits}
        return hash_parts(FORMAT, code, settings)


# --- in a worker ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One clip for a worker: `names` of the values that `work` computes; `shared`: the stages."""

    work: Callable[..., None]  # of the job and a Found
    path: Path
    names: tuple[str, ...]
    shared: str = ""
    info: VideoFile | None = None
    start: float = 0.0
    end: float = 0.0
    to: Path | None = None


@dataclass
class Found:
    """A worker's results, or why the clip is unusable; and CPU seconds by stage."""

    values: dict[str, Any] = field(default_factory=dict)
    bad: str | None = None
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@cache
def build_stages(shared: str) -> dict[str, Any]:
    plugins_path, configs = json.loads(shared)
    setup([f"plugins_path={plugins_path}"] if plugins_path else ())
    return {name: registry.create(registry.typed(node)) for name, node in configs.items()}


def prepare_source(job: Job) -> Found:
    """Runs a job, and records why the clip is unusable."""
    found = Found()
    try:
        job.work(job, found)
    except BadItem as e:
        found.bad = str(e)
    return found


def probe_file(job: Job, found: Found) -> None:
    with timed(found, "probing"):
        found.values["info"] = asdict(probe(job.path))


def score_clip(job: Job, found: Found) -> None:
    """Scores of a clip: {stage: scores}."""
    stages = build_stages(job.shared)
    assert job.info
    length = job.end - job.start
    wanted = [t for name in job.names for t in stages[name].cfg.times(length)]
    clip = VideoClip(job.path, job.info, job.start, job.end, wanted)
    with timed(found, "decoding"):
        clip.load()
    for name in job.names:
        with timed(found, name):
            found.values[name] = stages[name].score(clip)


def render_clip(job: Job, found: Found) -> None:
    """Writes a clip; {"clip": its frames, height, width, fps and bytes}."""
    assert job.info and job.to
    (stage,) = build_stages(job.shared).values()
    with timed(found, "writing"):
        made = stage.render(VideoClip(job.path, job.info, job.start, job.end))
        frames, height, width = write_frames(job.to, made.frames, made.fps, made.crf, PRESET)
        size = job.to.stat().st_size
    about = {"frames": frames, "height": height, "width": width, "fps": made.fps}
    found.values["clip"] = about | {"bytes": size}


@contextmanager
def timed(found: Found, name: str) -> Iterator[None]:
    """Adds the CPU seconds of the block."""
    began = time.process_time()
    try:
        yield
    finally:
        found.spent[name] += time.process_time() - began


# --- in the main process --------------------------------------------------------------------------


class Work:
    """One preparation: its score journal, and the CPU seconds of this run."""

    def __init__(self, to: Path, stages: Stages, ordered: Ordered) -> None:
        self.to, self.stages, self.ordered = to, stages, ordered
        self.journal = Journal(to / "scores.jsonl")
        self.known: dict[str, Any] = dict(self.journal.rows)
        self.spent: dict[str, float] = defaultdict(float)
        self.is_complete = not self.known  # CPU seconds cover all clips

    def sources(self, root: Path) -> list[Row]:
        """A row for each video file in `root`, sorted by name."""
        found = [*walk(root)]
        names = [n for n in found if Path(n).suffix.lower() in CONTAINERS]
        others = Counter(Path(n).suffix.lower() or "without an extension" for n in found)
        for ending in (*CONTAINERS, *TEXTS):
            del others[ending]
        listed = ", ".join(f"{n} {ending}" for ending, n in others.most_common(REASONS))
        if not names:
            has = f" (there are {listed})" if listed else ""
            raise DataError(
                f"data_root={root}: contains no video; want {', '.join(CONTAINERS)}{has}"
            )
        if listed:
            log.warning("data_root=%s: %s files are not read: %s", root, others.total(), listed)
        rows: list[Row] = [{"source": name, "path": root / name} for name in sorted(names)]
        tasks = []
        for row in rows:
            stat = row["path"].stat()
            key = hash_parts(FORMAT, row["source"], stat.st_size, stat.st_mtime_ns)
            tasks.append((row, {"info": key}, Job(probe_file, row["path"], ("info",))))
        self.compute("reading", tasks)
        for row in rows:
            if "dropped" not in row:
                row["info"] = VideoFile(**row.pop("found")["info"])
                row |= {"start": 0.0, "end": row["info"].seconds, "scores": {}}
        return rows

    def phases(self, rows: list[Row]) -> list[Row]:
        """Clips with their scores; dropped ones with the reason."""
        for names in self.stages.phases():
            self.score(rows, names)
            rows = self.filter(rows, names)
        for row in rows:
            row["id"] = identity(row)
        return rows

    def score(self, rows: list[Row], names: list[str]) -> None:
        scoring = [n for n in names if isinstance(self.stages.built[n], ScoringStage)]
        shared, tasks = self.stages.shared(scoring), []
        for row in rows if scoring else ():
            if "dropped" not in row:
                keys = {name: self.stages.key(name, row) for name in scoring}
                missing = tuple(n for n, key in keys.items() if key not in self.known)
                span = row["start"], row["end"]
                job = Job(score_clip, row["path"], missing, shared, row["info"], *span)
                tasks.append((row, keys, job))
        self.compute(" ".join(scoring), tasks)
        for row, _, _ in tasks:
            row["scores"] = row["scores"] | row.pop("found", {})

    def filter(self, rows: list[Row], names: list[str]) -> list[Row]:
        for name in names:
            stage = self.stages.built[name]
            kept = [row for row in rows if "dropped" not in row]
            if isinstance(stage, CuttingStage):
                rows = [part for row in rows for part in cut(row, name, stage)]
            elif isinstance(stage, DecidingStage):
                for row in kept:
                    row["id"] = identity(row)
                for row, verdict in zip(kept, stage.decide(kept), strict=True):
                    if "drop" in verdict:
                        row["dropped"] = [name, verdict["drop"]]
                    row |= {k: v for k, v in verdict.items() if k != "drop"}
        return rows

    def render(self, kept: list[Row]) -> None:
        """Writes missing clips to clips/."""
        name = self.stages.renderer
        assert name
        shared, tasks = self.stages.shared([name]), []
        folder = self.to / "clips"
        for row in kept:
            key = self.stages.key(name, row)
            row["file"] = folder / f"{row['id']}-{key[:8]}.mp4"
            known = self.known.get(key, {})
            size = row["file"].stat().st_size if row["file"].is_file() else None
            if "bad" not in known and size != known.get("bytes"):
                self.known.pop(key, None)
            job = Job(
                render_clip, row["path"], ("clip",), shared, row["info"], row["start"], row["end"],
                row["file"],
            )  # fmt: skip
            tasks.append((row, {"clip": key}, job))
        self.compute("writing clips", tasks)
        for row, _, _ in tasks:
            row["clip"] = row.pop("found", {}).get("clip")

    def compute(self, what: str, tasks: list[tuple[Row, dict[str, str], Job]]) -> None:
        """Sets `found` of each row to its values by name, computing the unknown ones.

        Drops rows whose file is unusable.
        """
        new = [task for task in tasks if not {*task[1].values()} <= self.known.keys()]
        results = self.ordered(prepare_source, (job for _, _, job in new))
        with Progress(what, len(new), "clip") as progress:
            for done, (result, (_, keys, job)) in enumerate(zip(results, new, strict=True), 1):
                crashed = Found(bad="crashes the process that decodes it")
                got = crashed if isinstance(result, Crashed) else result
                for name, seconds in got.spent.items():
                    self.spent[name] += seconds
                for name in job.names:
                    value = {"bad": got.bad} if got.bad else got.values[name]
                    self.known[keys[name]] = value
                    if not isinstance(result, Crashed):  # may be due to memory: retried
                        self.journal.add([keys[name], value])
                progress.update(done)
        for row, keys, _ in tasks:
            found = {name: self.known[key] for name, key in keys.items()}
            bad = next((v["bad"] for v in found.values() if "bad" in v), None)
            if bad is None:
                row["found"] = found
            else:
                row["dropped"] = [UNREADABLE, bad]


def cut(row: Row, name: str, stage: CuttingStage) -> Iterator[Row]:
    """The clips that a stage cuts from one."""
    if "dropped" in row:
        yield row
        return
    begin = row["start"]
    for start, end, why in stage.spans(row["scores"][name], row["end"] - begin):
        span = {"start": round(begin + start, 6), "end": round(begin + end, 6)}
        rest = {k: v for k, v in row["scores"].items() if k != name}
        yield row | span | {"scores": rest} | ({"dropped": [name, why]} if why else {})


def identity(row: Row) -> str:
    """A clip's id, from its file's name and span; usable as a file name."""
    return hash_parts(row["source"], row.get("start"), row.get("end"))[:16]


def check_captions(kept: list[Row], form: str) -> None:
    """Raises DataError if a layout needs captions and clips have none."""
    bare = [row["source"] for row in kept if not row.get("caption")]
    if form in ("cogvideox_folder", "webvid") and bare:  # their readers skip empty captions
        raise DataError(
            f"task.format={form}: {len(bare)} clips have no caption, such as {bare[0]}; use "
            "stage.captions.missing=drop or template"
        )


def write_manifest(to: Path, root: Root, rows: list[Row]) -> None:
    """manifest.jsonl, a line per clip, and settings.json, whose hash is in each line."""
    used = {"av", "numpy", *(d for cfg in root.stage.values() for d in cfg.distributions)}
    versions = {name: version(name) for name in sorted(used)}
    settings = {
        "format": FORMAT,
        "data_root": root.task.data_root,
        "stages": to_container(root.stage),
        "versions": versions,
    }
    text = json.dumps(settings, indent=1) + "\n"
    write_atomic(to / "settings.json", text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    lines = [json.dumps(manifest_entry(row) | {"settings": digest}) for row in rows]
    write_atomic(to / "manifest.jsonl", "".join(f"{line}\n" for line in lines))


def manifest_entry(row: Row) -> dict[str, Any]:
    """A clip's line of manifest.jsonl."""
    stage, why = row.get("dropped", (None, None))
    info = asdict(row["info"]) if "info" in row else None
    internal = ("path", "file", "info", "dropped", "found")
    entry = {k: v for k, v in row.items() if k not in internal}
    return entry | {"kept": stage is None, "dropped_by": stage, "why": why, "info": info}


def walk(root: Path) -> Iterator[str]:
    """Relative names of the files in `root`, without hidden ones."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if not file.startswith("."):
                yield Path(folder, file).relative_to(root).as_posix()


def hash_parts(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
