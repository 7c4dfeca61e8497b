"""Decoding speed of clips in shards: data=webdataset against other decoders of the same bytes.

    python benchmarks/decoding.py [--clips 24] [--rounds 3]

Generated 4 s clips (320x192, 24 fps, h264) in shards as task=prepare writes them, and images
(256x256, jpg). One process, one thread. Each round runs all decoders in turn; results are medians
of CPU seconds. A decoder that cannot run is a row with the reason.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, installed, write
from plugins.data.webdataset import WebDataset
from sandbox.data.randomness import keyed
from sandbox.pipelines.prepare_outputs import write_shards
from tests.raw_videos import scene, texture
from tests.raw_videos import write as write_clip

HEIGHT, WIDTH, FPS, SECONDS, SIDE = 192, 320, 24.0, 4, 256
FRAMES, WINDOW = round(FPS * SECONDS), 16
PACKAGES = ("av", "torch", "torchvision", "webdataset", "torchcodec", "pillow")

Decode = Callable[[], int]  # one pass over all clips or images -> number of decoded frames


@dataclass
class Row:
    """A row of the table."""

    way: str
    frames: int = 0
    seconds: list[float] = field(default_factory=list)
    cannot: str | None = None  # why the decoder does not run

    def record(self) -> dict[str, Any]:
        if self.cannot is not None:
            return {"way": self.way, "seconds": [], "cannot": self.cannot}
        return {"way": self.way, "seconds": self.seconds, "frames": self.frames}


def generate(folder: Path, clips: int) -> None:
    rows = []
    for i in range(clips):
        file = folder / f"{i}.mp4"
        write_clip(file, scene(i, SECONDS, (0.4, 0.0), HEIGHT, WIDTH, FPS), FPS, crf=23)
        clip = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": FPS}
        clip["bytes"] = file.stat().st_size
        rows.append({"id": f"{i:06}", "file": file, "caption": "a scene", "clip": clip,
                     "source": file.name, "start": 0.0, "end": SECONDS, "scores": {}})  # fmt: skip
    (folder / "clips").mkdir()
    write_shards(folder / "clips", {"train": rows, "val": rows[:1]}, 1 << 22)


def image_shards(folder: Path, images: int) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    for split, numbers in (("train", range(images)), ("val", range(1))):
        with tarfile.open(folder / "images" / f"{split}-00000.tar", "w") as tar:
            for i in numbers:
                file = io.BytesIO()
                Image.fromarray(texture(i, SIDE, SIDE)).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{i:06}.jpg")
                member.size = len(file.getvalue())
                file.seek(0)
                tar.addfile(member, file)


# --- decoders -------------------------------------------------------------------------------------


def ours(root: Path, frames: int, height: int, width: int) -> Decode:
    caption = "txt" if frames > 1 else None
    index = str(root.parent / "index")
    cfg = WebDataset.Config(
        root=str(root), caption=caption, index=index, frames=frames, height=height, width=width
    )
    items = WebDataset(cfg).split("train")
    return lambda: sum(items.load(i, keyed(0, i))["video"].shape[1] for i in range(len(items)))


def pyav(file: str | BinaryIO, window: int | None = None) -> int:
    """Decodes all frames, or `window` frames in the middle, to separate uint8 RGB arrays."""
    return len(pyav_frames(file, window))


def pyav_clip(file: str | BinaryIO, window: int | None = None) -> int:
    """The same, converted to one float tensor (3, T, H, W) in [-1, 1]."""
    import numpy as np
    import torch

    video = torch.from_numpy(np.stack(pyav_frames(file, window))).permute(3, 0, 1, 2)
    return (video.float() / 127.5 - 1).contiguous().shape[1]


def pyav_frames(file: str | BinaryIO, window: int | None) -> list:
    import av

    with av.open(file, mode="r", format="mp4") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        start = 0 if window is None else (FRAMES - window) // 2
        stop, found = start + (window or FRAMES), []
        for i, frame in enumerate(container.decode(stream)):
            if i >= stop:
                break
            if i >= start:
                found.append(frame.to_ndarray(format="rgb24"))
        return found


def torchcodec(files: list[Path], window: int | None = None) -> Decode:
    decoders = import_module("torchcodec.decoders")
    start = 0 if window is None else (FRAMES - window) // 2

    def decode() -> int:
        count = 0
        for file in files:
            decoder = decoders.VideoDecoder(str(file), num_ffmpeg_threads=1)
            count += len(decoder.get_frames_in_range(start, start + (window or FRAMES)))
        return count

    return decode


def library(root: Path, decoder: object, ending: str) -> Decode:
    """The webdataset library's reader with one of its decoders (a name) or a function."""
    webdataset = import_module("webdataset")
    shards = sorted(map(str, root.glob("train-*.tar")))

    def decode() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode(decoder, only=ending)
        return sum(frames_in(sample[ending]) for sample in samples)

    return decode


def frames_in(decoded: object) -> int:
    """Frames in the result of a decoder: a count, an image, or (video, audio)."""
    if isinstance(decoded, int):
        return decoded
    return len(decoded[0]) if isinstance(decoded, tuple) else 1


def decoders(folder: Path) -> Iterator[tuple[str, Callable[[], Decode]]]:
    """The name of each row and a function that makes its decoder, which raises if unavailable."""
    files = sorted(folder.glob("*.mp4"), key=lambda f: int(f.stem))
    clips, images = folder / "clips", folder / "images"

    def own_decoder() -> object:
        return import_module("webdataset").torch_video

    def by_pyav(key: str, payload: bytes) -> int | None:
        return pyav(io.BytesIO(payload)) if key.endswith("mp4") else None

    full, some = f"all {FRAMES} frames", f"{WINDOW} frames of each"
    yield f"data=webdataset, {full}", lambda: ours(clips, FRAMES, HEIGHT, WIDTH)
    yield f"plain PyAV on files, {full}", lambda: lambda: sum(pyav(str(f)) for f in files)
    yield (
        f"plain PyAV on files to float tensors, {full}",
        lambda: lambda: sum(pyav_clip(str(f)) for f in files),
    )
    yield f"torchcodec on files, {full}", lambda: torchcodec(files)
    yield f"webdataset's torch_video, {full}", lambda: library(clips, own_decoder(), "mp4")
    yield f"webdataset's reading with PyAV, {full}", lambda: library(clips, by_pyav, "mp4")
    yield f"data=webdataset, {some}", lambda: ours(clips, WINDOW, HEIGHT, WIDTH)
    yield (f"plain PyAV on files, {some}", lambda: lambda: sum(pyav(str(f), WINDOW) for f in files))
    yield (
        f"plain PyAV on files to float tensors, {some}",
        lambda: lambda: sum(pyav_clip(str(f), WINDOW) for f in files),
    )
    yield f"torchcodec on files, {some}", lambda: torchcodec(files, WINDOW)
    yield "data=webdataset, images", lambda: ours(images, 1, SIDE, SIDE)
    yield "webdataset's torchrgb, images", lambda: library(images, "torchrgb", "jpg")


def measure(folder: Path, rounds: int) -> list[Row]:
    rows, ready = [], {}
    for name, make in decoders(folder):
        row = Row(name)
        rows.append(row)
        try:
            decode = make()
            row.frames = decode()  # warm-up
            ready[name] = decode
        except Exception as e:  # third-party decoders may raise anything: a result
            cause = e.__cause__ or e
            row.cannot = f"{type(cause).__name__}: {cause}".splitlines()[0]
    for _ in range(rounds):
        for row in rows:
            if row.way in ready:
                started = time.process_time()
                ready[row.way]()
                row.seconds.append(round(time.process_time() - started, 4))
    return rows


def table(rows: list[Row]) -> list[str]:
    lines = ["| way | frames | frames per CPU second (slowest, fastest round) |", "|---|---|---|"]
    for row in rows:
        if row.cannot is not None:
            lines.append(f"| {row.way} | | cannot run here: {row.cannot} |")
            continue
        speeds = sorted(row.frames / s for s in row.seconds)
        median = row.frames / statistics.median(row.seconds)
        spread = f"({speeds[0]:.0f}, {speeds[-1]:.0f})"
        lines.append(f"| {row.way} | {row.frames} | {median:.0f} {spread} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), args.clips)
            image_shards(Path(folder), 8 * args.clips)
            rows = measure(Path(folder), args.rounds)
    finally:
        torch.set_num_threads(threads)
    machine = {"cpu": platform.machine()} | installed(*PACKAGES)
    result = {"machine": machine, "clips": args.clips, "rows": [row.record() for row in rows]}
    lines = [f"# {args.clips} clips decoded", "", str(machine), "", *table(rows)]
    write("decoding", result, lines, args.out)


if __name__ == "__main__":
    main()
