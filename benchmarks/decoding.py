"""How fast clips come out of shards: data=webdataset beside other ways to decode the same bytes.

    python benchmarks/decoding.py [--clips 24] [--rounds 3]

Generated clips of 4 s (320x192, 24 fps, h264) in shards as task=prepare writes them, and pictures
(256x256, jpg). One process, one thread; ways take turns, each round all of them; medians of CPU
seconds. A way that cannot run here is a row that says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from plugins.data.webdataset import WebDataset
from sandbox.data.randomness import keyed
from sandbox.pipelines.prepare_outputs import write_shards
from tests.footage import scene, texture, write

RESULTS = Path(__file__).parent / "results"
HEIGHT, WIDTH, FPS, SECONDS, SIDE = 192, 320, 24.0, 4, 256
FRAMES, WINDOW = round(FPS * SECONDS), 16
PACKAGES = ("av", "torch", "torchvision", "webdataset", "torchcodec", "pillow")

Way = Callable[[], int]  # one pass over all clips or pictures -> frames that came out


def generate(folder: Path, clips: int) -> None:
    rows = []
    for i in range(clips):
        file = folder / f"{i}.mp4"
        write(file, scene(i, SECONDS, (0.4, 0.0), HEIGHT, WIDTH, FPS), FPS, crf=23)
        clip = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": FPS}
        clip["bytes"] = file.stat().st_size
        rows.append({"id": f"{i:06}", "file": file, "caption": "a scene", "clip": clip,
                     "source": file.name, "start": 0.0, "end": SECONDS, "scores": {}})  # fmt: skip
    (folder / "clips").mkdir()
    write_shards(folder / "clips", {"train": rows, "val": rows[:1]}, 1 << 22)


def picture_shards(folder: Path, pictures: int) -> None:
    from PIL import Image

    (folder / "pictures").mkdir()
    for split, numbers in (("train", range(pictures)), ("val", range(1))):
        with tarfile.open(folder / "pictures" / f"{split}-00000.tar", "w") as tar:
            for i in numbers:
                file = io.BytesIO()
                Image.fromarray(texture(i, SIDE, SIDE)).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{i:06}.jpg")
                member.size = len(file.getvalue())
                file.seek(0)
                tar.addfile(member, file)


# --- ways -----------------------------------------------------------------------------------------


def ours(root: Path, frames: int, height: int, width: int) -> Way:
    caption = "txt" if frames > 1 else None
    index = str(root.parent / "index")
    sizes = {"frames": frames, "height": height, "width": width}
    cfg = WebDataset.Config(root=str(root), caption=caption, index=index, **sizes)
    items = WebDataset(cfg).split("train")
    return lambda: sum(items.load(i, keyed(0, i))["video"].shape[1] for i in range(len(items)))


def pyav(file: object, window: int | None = None) -> int:
    """RGB arrays of all frames, or of `window` from the middle on, as uint8 each by itself."""
    return len(pyav_frames(file, window))


def pyav_clip(file: object, window: int | None = None) -> int:
    """The same as one float tensor (3, T, H, W) in [-1, 1], as one would write it."""
    import numpy as np
    import torch

    video = torch.from_numpy(np.stack(pyav_frames(file, window))).permute(3, 0, 1, 2)
    return (video.float() / 127.5 - 1).contiguous().shape[1]


def pyav_frames(file: object, window: int | None) -> list:
    import av

    with av.open(file, format="mp4") as container:
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


def torchcodec(files: list[Path], window: int | None = None) -> Way:
    from torchcodec.decoders import VideoDecoder

    start = 0 if window is None else (FRAMES - window) // 2

    def way() -> int:
        count = 0
        for file in files:
            decoder = VideoDecoder(str(file), num_ffmpeg_threads=1)
            count += len(decoder.get_frames_in_range(start, start + (window or FRAMES)))
        return count

    return way


def library(root: Path, decoder: object, ending: str) -> Way:
    """The webdataset library: its reading, and a decoder of its own or a function."""
    import webdataset

    shards = sorted(map(str, root.glob("train-*.tar")))

    def way() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode(decoder, only=ending)
        return sum(frames_in(sample[ending]) for sample in samples)

    return way


def frames_in(decoded: object) -> int:
    """Of what a decoder of the library returns: a number, a picture, or a video and its sound."""
    if isinstance(decoded, int):
        return decoded
    return len(decoded[0]) if isinstance(decoded, tuple) else 1


def ways(folder: Path) -> Iterator[tuple[str, Callable[[], Way]]]:
    """What each row of the table is, and what makes it (which may find that it cannot run)."""
    files = sorted(folder.glob("*.mp4"), key=lambda f: int(f.stem))
    clips, pictures = folder / "clips", folder / "pictures"

    def own_decoder() -> object:
        import webdataset

        return webdataset.torch_video

    def by_pyav(key: str, payload: bytes) -> int | None:
        return pyav(io.BytesIO(payload)) if key.endswith("mp4") else None

    whole, some = f"all {FRAMES} frames", f"{WINDOW} frames of each"
    yield f"data=webdataset, {whole}", lambda: ours(clips, FRAMES, HEIGHT, WIDTH)
    yield f"plain PyAV on files, {whole}", lambda: lambda: sum(pyav(str(f)) for f in files)
    yield (
        f"plain PyAV on files to float tensors, {whole}",
        lambda: lambda: sum(pyav_clip(str(f)) for f in files),
    )
    yield f"torchcodec on files, {whole}", lambda: torchcodec(files)
    yield f"webdataset's torch_video, {whole}", lambda: library(clips, own_decoder(), "mp4")
    yield f"webdataset's reading with PyAV, {whole}", lambda: library(clips, by_pyav, "mp4")
    yield f"data=webdataset, {some}", lambda: ours(clips, WINDOW, HEIGHT, WIDTH)
    yield (f"plain PyAV on files, {some}", lambda: lambda: sum(pyav(str(f), WINDOW) for f in files))
    yield (
        f"plain PyAV on files to float tensors, {some}",
        lambda: lambda: sum(pyav_clip(str(f), WINDOW) for f in files),
    )
    yield f"torchcodec on files, {some}", lambda: torchcodec(files, WINDOW)
    yield "data=webdataset, pictures", lambda: ours(pictures, 1, SIDE, SIDE)
    yield "webdataset's torchrgb, pictures", lambda: library(pictures, "torchrgb", "jpg")


def measured(folder: Path, rounds: int) -> list[dict[str, object]]:
    rows, ready = [], {}
    for name, make in ways(folder):
        row: dict[str, object] = {"way": name, "seconds": []}
        rows.append(row)
        try:
            ready[name] = make()
            row["frames"] = ready[name]()  # the first pass warms up
        except Exception as e:  # another's decoder may raise anything: that is the result
            cause = e.__cause__ or e
            row["cannot"] = f"{type(cause).__name__}: {cause}".splitlines()[0]
            ready.pop(name, None)
    for _ in range(rounds):
        for row in rows:
            if row["way"] in ready:
                began = time.process_time()
                ready[row["way"]]()
                row["seconds"].append(round(time.process_time() - began, 4))
    return rows


def table(rows: list[dict[str, object]]) -> list[str]:
    lines = ["| way | frames | frames per CPU second (slowest, fastest round) |", "|---|---|---|"]
    for row in rows:
        if "cannot" in row:
            lines.append(f"| {row['way']} | | cannot run here: {row['cannot']} |")
            continue
        rates = sorted(row["frames"] / s for s in row["seconds"])
        middle = row["frames"] / statistics.median(row["seconds"])
        spread = f"({rates[0]:.0f}, {rates[-1]:.0f})"
        lines.append(f"| {row['way']} | {row['frames']} | {middle:.0f} {spread} |")
    return lines


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
            picture_shards(Path(folder), 8 * args.clips)
            rows = measured(Path(folder), args.rounds)
    finally:
        torch.set_num_threads(threads)
    versions = {name: version(name) for name in PACKAGES}
    machine = {"cpu": platform.machine(), "python": platform.python_version()} | versions
    found = {"machine": machine, "clips": args.clips, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decoding.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# {args.clips} clips decoded", "", str(machine), "", *table(rows)]
    (args.out / "decoding.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
