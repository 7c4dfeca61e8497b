"""From raw videos to a page in the browser, one command at a time.

    python docs/examples/raw_to_page.py                        # generates small raw videos
    python docs/examples/raw_to_page.py --raw DIR --stay       # uses yours; serves until Enter

Prepares, encodes, trains twice, samples, compares, and requests clips from the page. Each step is a
command of run.py, printed before it runs, at a size that takes a minute or two on a CPU. Needs the
extras prep and ui. Running it again repeats only what is missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from sandbox.cli.main import main as command  # noqa: E402
from sandbox.reports.media import write_video  # noqa: E402

FRAMES, SIDE, FPS = 9, 32, 8  # of the training clips
COLOURS = {"red": (1.0, 0.3, 0.3), "green": (0.3, 1.0, 0.3), "blue": (0.3, 0.4, 1.0)}
DIRECTIONS = {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}  # camera motion
PROMPTS = ("a red wall moving left", "a blue wall moving down")


# --- raw videos -----------------------------------------------------------------------------------


def write_raw(folder: Path) -> None:
    """Writes twelve captioned files of two scenes, and three files that filters drop."""
    for i, (colour, way) in enumerate((c, d) for c in COLOURS for d in DIRECTIONS):
        scenes = [wall(2 * i + scene, COLOURS[colour], DIRECTIONS[way]) for scene in (0, 1)]
        write_video(folder / f"{colour}_{way}.mp4", np.concatenate(scenes), 10)
        (folder / f"{colour}_{way}.txt").write_text(f"a {colour} wall moving {way}\n")
    write_video(folder / "still.mp4", wall(99, (1, 1, 1), (0, 0)), 10)
    shutil.copy(folder / "red_left.mp4", folder / "red_left_copy.mp4")
    content = (folder / "red_left.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])


def wall(seed: int, colour: Sequence[float], way: tuple[int, int]) -> np.ndarray:
    """(16, 64, 64, 3) uint8: a camera moves along a wall of blobs, one pixel per frame."""
    from PIL import Image

    rng, count, side = np.random.default_rng(seed), 16, 64
    blobs = Image.fromarray(rng.integers(40, 255, (8, 8), np.uint8)).resize((96, 96))
    image = (np.asarray(blobs)[..., None] * np.asarray(colour)).astype(np.uint8)
    positions = [[16 + step * (i - count // 2) for step in way] for i in range(count)]
    return np.stack([image[y : y + side, x : x + side] for y, x in positions])


# --- commands -------------------------------------------------------------------------------------


def run(*words: str) -> None:
    """Runs one command in this process; exits with its exit code if it fails."""
    print(f"\n$ python run.py {shlex.join(words)}", flush=True)
    try:
        command([*words])
    except SystemExit as error:
        if error.code:
            raise


@contextmanager
def page(*words: str) -> Iterator[str]:
    """Serves task=ui within the block; yields its address."""
    print(f"\n$ python run.py {shlex.join(words)}", flush=True)
    with subprocess.Popen(
        [sys.executable, "-u", "run.py", *words], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            output = (word for line in server.stdout for word in line.split())
            address = next((word for word in output if word.startswith("http")), None)
            if address is None:
                raise SystemExit(server.wait())
            yield address
        finally:
            server.send_signal(signal.SIGINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, help="folder of videos with captions in .txt files")
    parser.add_argument("--out", type=Path, default=Path("outputs/raw_to_page"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stay", action="store_true", help="serve the page until Enter")
    args = parser.parse_args()
    out = args.out.resolve()
    raw = args.raw.resolve() if args.raw else out / "raw"
    if args.raw is None:
        write_raw(raw)
    size = [f"data.frames={FRAMES}", f"data.height={SIDE}", f"data.width={SIDE}"]
    common = [f"cache={out}/cache", "logger=null"]

    run("task=prepare", f"data_root={raw}", f"to={out}/prepared", "stage.scenes.min_seconds=1.2",
        f"stage.normalise.fps={FPS}", f"stage.normalise.height={SIDE}",
        f"stage.normalise.width={SIDE}", "stage.split.fraction=0.2")  # fmt: skip
    run("task=encode", "data=webdataset", f"data.root={out}/prepared/webdataset", *size,
        f"to={out}/latents", *common)  # fmt: skip
    run("data=latents", f"data.root={out}/latents", *size, "data.batch_size=8",
        f"steps={args.steps}", "task.samples=2", "task.untrained=false", f"out={out}/runs", *common,
        "-m", "lr=1e-3,4e-3")  # fmt: skip
    runs = sorted(path.parent for path in out.glob("runs/*/result.json"))
    run("task=sample", f"run={runs[0]}", f"prompts=[{','.join(PROMPTS)}]")
    run("task=report", f"runs={out}/runs")
    with page("task=ui", f"run={out}/runs") as address:
        request_clips(address, [path.name for path in runs])
        if args.stay:
            input(f"{address} (press Enter to stop)\n")


def request_clips(address: str, runs: list[str]) -> None:
    """Uses the page as a visitor does: compares two runs, then opens the report."""
    from gradio_client import Client

    client = Client(address, verbose=False, analytics_enabled=False)
    _, files, commands = client.predict(
        run=runs[0], weights="ema", other=runs[-1], other_weights="ema", image=None,
        end_image=None, prompts="\n".join(PROMPTS), seed="5", api_name="/sample",
    )  # fmt: skip
    print(f"{address} answers with {len(files)} clips, made by\n{commands}")
    report = client.predict("report/report.html", api_name="/report")
    print(f"its report has {len(report)} characters")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
