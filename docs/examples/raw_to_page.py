"""From a folder of raw videos to a page in the browser, command by command.

    python docs/examples/raw_to_page.py                        # makes small raw videos of its own
    python docs/examples/raw_to_page.py --raw DIR --stay       # yours; the page stays until Enter

Prepare, encode, train twice, sample, compare, and ask the page for clips: every step is a command
of run.py, printed before it runs, at a size for a CPU and a minute or two. Needs the extras prep
and ui. The same again does only what is missing.
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

FRAMES, SIDE, FPS = 9, 32, 8  # of the clips that are trained on
COLOURS = {"red": (1.0, 0.3, 0.3), "green": (0.3, 1.0, 0.3), "blue": (0.3, 0.4, 1.0)}
DIRECTIONS = {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}  # of the camera
PROMPTS = ("a red wall moving left", "a blue wall moving down")


# --- raw videos -----------------------------------------------------------------------------------


def write_raw(folder: Path) -> None:
    """Twelve files of two scenes with captions beside them, and three that are to be dropped."""
    for i, (colour, way) in enumerate((c, d) for c in COLOURS for d in DIRECTIONS):
        both = [wall(2 * i + scene, COLOURS[colour], DIRECTIONS[way]) for scene in (0, 1)]
        write_video(folder / f"{colour}_{way}.mp4", np.concatenate(both), 10)
        (folder / f"{colour}_{way}.txt").write_text(f"a {colour} wall moving {way}\n")
    write_video(folder / "still.mp4", wall(99, (1, 1, 1), (0, 0)), 10)
    shutil.copy(folder / "red_left.mp4", folder / "the_same_again.mp4")
    whole = (folder / "red_left.mp4").read_bytes()
    (folder / "cut_short.mp4").write_bytes(whole[: len(whole) // 2])


def wall(seed: int, colour: Sequence[float], way: tuple[int, int]) -> np.ndarray:
    """(16, 64, 64, 3) uint8: a camera goes along a wall of blobs, a pixel a frame."""
    from PIL import Image

    draw, count, side = np.random.default_rng(seed), 16, 64
    blobs = Image.fromarray(draw.integers(40, 255, (8, 8), np.uint8)).resize((96, 96))
    picture = (np.asarray(blobs)[..., None] * np.asarray(colour)).astype(np.uint8)
    places = [[16 + step * (i - count // 2) for step in way] for i in range(count)]
    return np.stack([picture[y : y + side, x : x + side] for y, x in places])


# --- commands -------------------------------------------------------------------------------------


def run(*words: str) -> None:
    """One command to its end, in this process; leaves with its exit code where it fails."""
    print(f"\n$ python run.py {shlex.join(words)}", flush=True)
    try:
        command([*words])
    except SystemExit as left:
        if left.code:
            raise


@contextmanager
def page(*words: str) -> Iterator[str]:
    """The address of task=ui while it answers."""
    print(f"\n$ python run.py {shlex.join(words)}", flush=True)
    with subprocess.Popen(
        [sys.executable, "-u", "run.py", *words], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            said = next((line for line in server.stdout if line.startswith("page")), None)
            if said is None:
                raise SystemExit(server.wait())
            yield said.split()[1]
        finally:
            server.send_signal(signal.SIGINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, help="folder of your videos, captions in .txt beside")
    parser.add_argument("--out", type=Path, default=Path("outputs/raw_to_page"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stay", action="store_true", help="keep the page open until Enter")
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
        ask(address, [path.name for path in runs])
        if args.stay:
            input(f"{address} (Enter ends it)\n")


def ask(address: str, runs: list[str]) -> None:
    """What a visitor of the page does: two runs beside one another, then the report."""
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
