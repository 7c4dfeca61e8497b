"""Outputs of task=prepare: layouts for data plugins, a summary, and sheets of dropped clips.

Each layout is a folder that is written atomically and deterministically.
"""

import csv
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox.contracts import BadItem, Row
from sandbox.data.video_files import VideoClip
from sandbox.reports.media import contact_sheet, replacing
from sandbox.reports.pages import render
from sandbox.storage.atomic import storage_errors, sync_folder, write_atomic
from sandbox.storage.shards import END

INDEX = 1  # format of index.json
SHOWN, WIDTH = 3, 192  # frames of a dropped clip on its sheet, and their pixels
BINS = 40


def write_format(to: Path, form: str, kept: list[Row], shard_bytes: int) -> Path:
    """Writes the layout `form` of rendered clips to `to/form`. Raises StorageError."""
    final, draft = to / form, to / f".{form}.part"
    with storage_errors(final):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        splits = {
            name: [row for row in kept if row.get("split", "train") == name]
            for name in ("train", "val")
        }
        if form == "webdataset":
            write_shards(draft, splits, shard_bytes)
        else:
            WRITERS[form](draft, {name: rows for name, rows in splits.items() if rows})
        shutil.rmtree(final, ignore_errors=True)
        draft.replace(final)
        sync_folder(to)
    return final


# --- layouts --------------------------------------------------------------------------------------


def write_cogvideox(folder: Path, splits: dict[str, list[Row]]) -> None:
    """SPLIT/prompts.txt and videos.txt, a line per clip, for data=cogvideox_folder."""
    for split, rows in splits.items():
        names = [f"videos/{link(row, folder / split / 'videos')}" for row in rows]
        prompts = "".join(f"{row['caption']}\n" for row in rows)
        (folder / split / "prompts.txt").write_text(prompts, encoding="utf-8")
        (folder / split / "videos.txt").write_text("".join(f"{n}\n" for n in names))


def write_easyanimate(folder: Path, splits: dict[str, list[Row]]) -> None:
    """SPLIT.json: [{"file_path", "text", "type", "width", "height"}], paths relative to it."""
    for split, rows in splits.items():
        listed = [
            {
                "file_path": f"videos/{link(row, folder / 'videos')}",
                "text": row.get("caption", ""),
                "type": "video",
                "width": row["clip"]["width"],
                "height": row["clip"]["height"],
            }
            for row in rows
        ]
        text = json.dumps(listed, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{split}.json").write_text(text, encoding="utf-8")


def write_webvid(folder: Path, splits: dict[str, list[Row]]) -> None:
    """metadata.csv and metadata_val.csv, videos/SPLIT/ID.mp4, for data=webvid."""
    for split, rows in splits.items():
        name = "metadata.csv" if split == "train" else f"metadata_{split}.csv"
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["videoid", "page_dir", "name"])
            for row in rows:
                link(row, folder / "videos" / split)
                table.writerow([row["id"], split, row.get("caption", "")])


WRITERS = {  # of splits that have clips
    "cogvideox_folder": write_cogvideox,
    "easyanimate": write_easyanimate,
    "webvid": write_webvid,
}


def link(row: Row, folder: Path) -> str:
    """Hard-links, else copies, a clip to `folder/ID.mp4`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{row['id']}.mp4"
    try:
        os.link(row["file"], folder / name)
    except OSError:  # no hard links on this file system
        shutil.copyfile(row["file"], folder / name)
    return name


def write_shards(folder: Path, splits: dict[str, list[Row]], shard_bytes: int) -> None:
    """SPLIT-00000.tar, ... with ID.mp4, ID.txt and ID.json per clip, and index.json.

    The index has {"format", "splits": {split: [{"file", "bytes", "sha256", "samples": [{"key",
    "frames", "height", "width", "fps", "members": {"mp4": [offset, bytes], ...}}]}]}}.
    """
    index: dict[str, list[Any]] = {}
    for split, rows in splits.items():
        index[split] = []
        for number, part in enumerate(parts(rows, shard_bytes)):
            name = f"{split}-{number:05}.tar"
            index[split].append({"file": name} | write_shard(folder / name, part))
    write_atomic(folder / "index.json", json.dumps({"format": INDEX, "splits": index}) + "\n")


def parts(rows: list[Row], most: int) -> Iterator[list[Row]]:
    """Groups of rows with at most `most` bytes in total, and at least one row."""
    part: list[Row] = []
    size = 0
    for row in rows:
        own = row["clip"]["bytes"] + 5 * tarfile.BLOCKSIZE  # with text members and headers
        if part and size + own > most:
            yield part
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield part


def write_shard(path: Path, rows: list[Row]) -> dict[str, Any]:
    samples = []
    with path.open("w+b") as file:
        for row in rows:
            about = {k: row[k] for k in ("source", "start", "end", "scores")} | row["clip"]
            texts = {"txt": row.get("caption", ""), "json": json.dumps(about)}
            members = {"mp4": row["file"].read_bytes()}
            members |= {ending: text.encode() for ending, text in texts.items()}
            places = {}
            for ending, payload in members.items():
                header = tarfile.TarInfo(f"{row['id']}.{ending}")
                header.size = len(payload)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                places[ending] = [file.tell(), len(payload)]
                file.write(payload + bytes(-len(payload) % tarfile.BLOCKSIZE))
            sizes = {k: row["clip"][k] for k in ("frames", "height", "width", "fps")}
            samples.append({"key": row["id"]} | sizes | {"members": places})
        file.write(END)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": size, "sha256": digest, "samples": samples}


# --- sheets and summary ---------------------------------------------------------------------------


def sheets(folder: Path, rows: list[Row], most: int) -> None:
    """A contact sheet of evenly spaced dropped clips for each reason."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted({row["dropped"][0] for row in rows if "dropped" in row}):
        dropped = [r for r in rows if r.get("dropped", [""])[0] == name and "start" in r]
        step = max(1, -(-len(dropped) // most)) if most else 0
        strips = [strip for row in dropped[::step] if (strip := thumbnails(row))] if most else []
        if strips:
            contact_sheet(folder / f"{name}.png", strips)


def thumbnails(row: Row) -> tuple[str, dict[str, Any]] | None:
    """A few frames with source and reason; None if they cannot be decoded."""
    import numpy as np

    clip = VideoClip(row["path"], row["info"], row["start"], row["end"], width=WIDTH)
    try:
        frames = clip.at([(i + 0.5) / SHOWN * clip.seconds for i in range(SHOWN)])
    except BadItem:
        return None
    where = f"{printable(row['source'])} {row['start']:.1f}-{row['end']:.1f} s"
    return f"{where}\n{row['dropped'][1]}", {"": np.stack(frames)}


def write_summary(
    to: Path, rows: list[Row], names: list[str], spent: dict[str, float], is_complete: bool
) -> dict[str, Any]:
    """Writes summary.json and summary.png, and prints them. Returns the contents of summary.json.

    `is_complete`: the CPU seconds cover all clips, none was computed by an earlier run.
    """
    kept = [row for row in rows if "dropped" not in row]
    dropped = Counter(row["dropped"][0] for row in rows if "dropped" in row)
    hours = {"found": _hours(rows), "kept": _hours(kept)}
    core_hours = sum(spent.values()) / 3600
    costly = sorted(spent.items(), key=lambda item: -item[1])
    result = {
        "folder": str(to),
        "files": len({row["source"] for row in rows}),
        "clips": len(rows),
        "kept": len(kept),
        "dropped": {n: dropped[n] for n in ("unreadable", *names) if dropped[n]},
        "hours": {k: round(v, 6) for k, v in hours.items()},
        "splits": dict(sorted(Counter(r.get("split", "train") for r in kept).items())),
        "core_seconds": {k: round(v, 3) for k, v in costly},
        "hours_per_core_hour": round(hours["found"] / core_hours, 2) if is_complete else None,
    }
    write_atomic(to / "summary.json", json.dumps(result, indent=1) + "\n")
    histograms(to / "summary.png", rows)
    unreadable = [row for row in rows if row.get("dropped", [""])[0] == "unreadable"]
    print(render("prepared.txt", **result, unreadable=unreadable, printable=printable),
          flush=True)  # fmt: skip
    return result


def printable(name: str) -> str:
    """A file name with unprintable characters escaped."""
    return repr(name)[1:-1]


def _hours(rows: list[Row]) -> float:
    return sum(row["end"] - row["start"] for row in rows if "start" in row) / 3600


def histograms(path: Path, rows: list[Row]) -> None:
    """Histograms of each numeric score: clips kept, dropped by its stage, and dropped by others."""
    from matplotlib.figure import Figure

    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in rows:
        by = row.get("dropped", ["kept"])[0]
        for stage, scores in row.get("scores", {}).items():
            side = by if by in ("kept", stage) else "dropped by others"
            for name, value in scores.items():
                if isinstance(value, int | float):
                    found.setdefault((stage, name), []).append((value, side))
    lengths = [(r["end"] - r["start"], r.get("dropped", ["kept"])[0]) for r in rows if "start" in r]
    found[("seconds", "")] = [
        (value, by if by in ("kept", "scenes") else "dropped by others") for value, by in lengths
    ]
    figure = Figure((4 * len(found), 3), layout="constrained")
    for axes, ((stage, name), values) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], sorted(found.items()), strict=True
    ):
        sides = list(dict.fromkeys(["kept", *sorted({side for _, side in values})]))
        axes.hist(
            [[v for v, side in values if side == s] for s in sides], BINS, stacked=True,
            label=[s if s.startswith(("kept", "dropped")) else f"dropped: {s}" for s in sides],
        )  # fmt: skip
        axes.set_title(f"{stage} {name}".strip(), fontsize=10)
        axes.set_ylabel("clips")
        axes.legend(fontsize=7)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=100, metadata={"Software": None})
