"""Real handwritten digits in six colours that move in four directions: captioned video without a
download.

The scans are scikit-learn's `load_digits`: 1,797 images of 8x8 pixels from the UCI set "Optical
Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Self

import numpy as np
import torch

from sandbox.contracts import Clip, DataConfig, Items, Sample, above, in_range
from sandbox.registry import register

SCAN = 8  # pixels, both ways
HELD_OUT_SCANS = 300
VAL_REPEATS = 4  # clips of each held-out caption
COLOURS = {
    "red": (1, 0.1, 0.1),
    "yellow": (1, 0.9, 0.1),
    "green": (0.1, 0.9, 0.1),
    "cyan": (0.1, 0.9, 1),
    "blue": (0.15, 0.25, 1),
    "magenta": (1, 0.1, 0.9),
}
DIRECTIONS = ("left", "right", "up", "down")

Combination = tuple[int, int, int]  # colour, digit, direction
COMBINATIONS: list[Combination] = list(product(range(len(COLOURS)), range(10), range(4)))
# Two digits for each colour and direction: every word is trained on, these combinations never are.
HELD_OUT = [(c, d, m) for c, d, m in COMBINATIONS if (d + 2 * c + 3 * m) % 5 == 0]
TRAINED = [combination for combination in COMBINATIONS if combination not in HELD_OUT]


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) float32 in [0, 1] and (1797,) labels, shuffled; the last 300 are held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order] / 16).astype(np.float32), digits.target[order]


def scans_by_digit(held_out: bool) -> list[np.ndarray]:
    """For each digit its (n, 8, 8) scans of one side of the split."""
    images, labels = scans()
    side = slice(-HELD_OUT_SCANS, None) if held_out else slice(None, -HELD_OUT_SCANS)
    return [images[side][labels[side] == digit] for digit in range(10)]


def caption(combination: Combination) -> str:
    colour, digit, direction = combination
    return f"a {list(COLOURS)[colour]} {digit} moving {DIRECTIONS[direction]}"


@register("data", "moving_digits")
class MovingDigits:
    """Coloured handwritten digits that move, with captions ("a red 3 moving left"); no download."""

    @dataclass
    class Config(DataConfig):
        """clips_per_epoch: length of an epoch (clips never repeat); speed: pixels a frame.

        random_speed: each clip has a speed of its own, from 1 to `speed`. fps: the rate of a clip
        of speed 1, told in whole frames a second; a faster one skips frames, so its rate is less.

        distinct: so many different training clips, the same for every seed, null: they never
        repeat; pictures: so many come with each training clip, in micro-batches that take turns
        with those of clips (trainer.accumulate=2: both in a step);
        backdrops: each clip has a grey backdrop of its own, from black to this (1 is white).
        """

        imports = ("sklearn.datasets",)
        clips_per_epoch: int = 16384
        speed: int = 1
        random_speed: bool = False
        fps: float | None = None
        distinct: int | None = None
        pictures: int = 0
        backdrops: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.root is not None:
                yield f"root={self.root!r}: want null, these scans come with scikit-learn"
            yield from in_range("clips_per_epoch", self.clips_per_epoch, 1)
            yield from in_range("speed", self.speed, 1)
            yield from above("fps", self.fps, 0)
            yield from in_range("distinct", self.distinct, 1)
            yield from in_range("pictures", self.pictures, 0)
            if self.frames == 1 and self.pictures:
                yield f"pictures={self.pictures}: want 0 where clips are pictures, of frames=1"
            yield from in_range("backdrops", self.backdrops, 0, 1)
            for name in ("height", "width"):
                yield from in_range(name, getattr(self, name), SCAN)
            room = min(self.height, self.width) - SCAN
            if room >= 0 and self.speed * (self.frames - 1) > room:
                yield (
                    f"frames={self.frames}: want at most {room // max(self.speed, 1) + 1}, or a "
                    "larger height and width: a digit stays inside where "
                    f"{SCAN} + speed*(frames-1) <= {room + SCAN}"
                )

        def clips(self) -> tuple[Clip, ...]:
            (clip,) = super().clips()
            return (clip, replace(clip, frames=1)) if self.pictures else (clip,)

        def batch_of(self, clip: Clip) -> int:
            return self.batch_size * (1 if clip == self.clips()[0] else self.pictures)

        def alternates_sizes(self) -> bool:
            return True

        def all_clips(self) -> Self:
            return replace(self, distinct=None, pictures=0)

        def provides(self) -> frozenset[str]:
            told = {"digit_captions"} if not self.backdrops else set()  # read off black alone
            told |= set() if self.fps is None else {"fps"}
            return frozenset({"video", "captions", "prompts"} | told)

        def metric(self) -> str | None:
            return "brightness" if self.backdrops else "digits"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> Items:
        """Clips of "train", or of "val": four of each held-out caption, from held-out scans."""
        if name not in ("train", "val"):
            raise ValueError(f"split {name!r}: want 'train' or 'val'")
        if name == "val":
            return Val(self.cfg)
        return Mixed(self.cfg) if self.cfg.pictures else Train(self.cfg)

    def prompts(self) -> list[str]:
        return [caption(combination) for combination in HELD_OUT]


class Train:
    """Every clip is drawn from `rng`; an index is only a name."""

    def __init__(self, cfg: MovingDigits.Config) -> None:
        self.cfg, self.scans = cfg, scans_by_digit(held_out=False)

    def __len__(self) -> int:
        return self.cfg.clips_per_epoch

    def id(self, index: int) -> str:
        return f"train/{index}"

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        if self.cfg.distinct is not None:
            rng = np.random.default_rng(index % self.cfg.distinct)
        which, scan, lane, start = rng.random(4)
        combination = TRAINED[int(which * len(TRAINED))]
        choices = self.scans[combination[1]]
        return sample(self.cfg, combination, choices[int(scan * len(choices))], lane, start, rng)


class Mixed(Train):
    """Clips and pictures; a picture is the first frame of a clip."""

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        pictures = self.cfg.pictures
        return self.cfg.clips()[int(rng.random() * (1 + pictures) < pictures)]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        size = self.bucket(index, rng)
        clip = super().load(index, rng)
        return clip | {"video": clip["video"][:, : size.frames]}


class Val:
    """Neighbours differ in caption; no scan is used twice."""

    def __init__(self, cfg: MovingDigits.Config) -> None:
        self.cfg, self.scans = cfg, scans_by_digit(held_out=True)

    def __len__(self) -> int:
        return len(HELD_OUT) * VAL_REPEATS

    def id(self, index: int) -> str:
        return f"val/{index}"

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        repeat, place = divmod(index, len(HELD_OUT))
        combination = HELD_OUT[place]
        digit = combination[1]
        earlier = sum(other[1] == digit for other in HELD_OUT[:place])
        scan = self.scans[digit][earlier * VAL_REPEATS + repeat]
        rng = np.random.default_rng(index)
        lane, start = rng.random(2)
        return sample(self.cfg, combination, scan, lane, start, rng)


def sample(
    cfg: MovingDigits.Config, combination: Combination, scan: np.ndarray, lane: float,
    start: float, rng: np.random.Generator,
) -> Sample:  # fmt: skip
    """One clip; `lane` and `start` in [0, 1) choose the place across and along the motion.

    `rng` draws its speed and its backdrop, where they differ.
    """
    colour, _, direction = combination
    speed = int(rng.integers(1, cfg.speed + 1)) if cfg.random_speed else cfg.speed
    tops, lefts = offsets(cfg, DIRECTIONS[direction], lane, start, speed)
    ink = np.zeros((cfg.frames, cfg.height, cfg.width), np.float32)
    for frame, top, left in zip(ink, tops, lefts, strict=True):
        frame[top : top + SCAN, left : left + SCAN] = scan
    rgb = np.array(list(COLOURS.values())[colour], np.float32)
    video = np.multiply.outer(2 * rgb, ink)
    if cfg.backdrops:
        video += 2 * cfg.backdrops * rng.random(dtype=np.float32) * (1 - ink)
    video -= 1
    rate = {} if cfg.fps is None else {"fps": float(cfg.fps // speed)}
    return {"video": torch.from_numpy(video), "caption": caption(combination), **rate}


def offsets(
    cfg: MovingDigits.Config, direction: str, lane: float, start: float, speed: int
) -> tuple[list[int], list[int]]:
    """Top and left of the scan in each frame. Lanes: the middle half of the room, 2..6 of 0..8."""
    horizontal = direction in ("left", "right")
    across_room, along_room = cfg.height - SCAN, cfg.width - SCAN
    if not horizontal:
        across_room, along_room = along_room, across_room
    margin = across_room // 4
    across = margin + int(lane * (across_room - 2 * margin + 1))
    travel = speed * (cfg.frames - 1)
    first = int(start * (along_room - travel + 1))
    along = [first + speed * i for i in range(cfg.frames)]
    if direction in ("left", "up"):
        along.reverse()
    lanes = [across] * cfg.frames
    return (lanes, along) if horizontal else (along, lanes)
