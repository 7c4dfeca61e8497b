"""Captioned video without a download: real handwritten digits in six colours and four directions.

The scans are scikit-learn's `load_digits`: 1,797 images of 8x8 pixels from the UCI set "Optical
Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Self

import numpy as np
import torch

from plugins._blocks.folders import check_split
from sandbox.contracts import Clip, DataConfig, Items, Sample, above, in_range
from sandbox.registry import register

SCAN = 8  # height and width of a scan in pixels
HELD_OUT_SCANS = 300
VAL_REPEATS = 4  # clips per held-out caption
COLOURS = {
    "red": (1, 0.1, 0.1),
    "yellow": (1, 0.9, 0.1),
    "green": (0.1, 0.9, 0.1),
    "cyan": (0.1, 0.9, 1),
    "blue": (0.15, 0.25, 1),
    "magenta": (1, 0.1, 0.9),
}
DIGITS = tuple("0123456789")
DIRECTIONS = ("left", "right", "up", "down")

Combination = tuple[int, int, int]  # colour, digit, direction
COMBINATIONS: list[Combination] = list(product(range(len(COLOURS)), range(10), range(4)))
# Two digits for each colour and direction: every word is trained on, these combinations are not.
HELD_OUT = [(c, d, m) for c, d, m in COMBINATIONS if (d + 2 * c + 3 * m) % 5 == 0]
TRAINED = [combination for combination in COMBINATIONS if combination not in HELD_OUT]


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) float32 in [0, 1] and (1797,) labels, shuffled; the last 300 are held out."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()  # scikit-learn's stubs have the tuple of return_X_y=True only
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order] / 16).astype(np.float32), digits.target[order]


def scans_by_digit(held_out: bool) -> list[np.ndarray]:
    """For each digit, its (n, 8, 8) scans of one side of the split."""
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
        """clips_per_epoch: length of an epoch; speed: motion in pixels per frame.

        random_speed: draws the speed of each clip from 1 to `speed`. fps: frame rate condition of
        clips of speed 1, an integer; faster clips skip frames, so their fps is lower.

        distinct: number of different training clips, the same for every seed; null: clips never
        repeat. pictures: number of images per training clip; their micro-batches alternate with
        those of clips (trainer.accumulate=2 puts both in one step). backdrops: draws a grey
        background for each clip, from black to this value (1 is white).
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
                yield f"root={self.root!r}: want null; the scans come with scikit-learn"
            yield from in_range("clips_per_epoch", self.clips_per_epoch, 1)
            yield from in_range("speed", self.speed, 1)
            yield from above("fps", self.fps, 0)
            yield from in_range("distinct", self.distinct, 1)
            yield from in_range("pictures", self.pictures, 0)
            if self.frames == 1 and self.pictures:
                yield f"pictures={self.pictures}: want 0 with frames=1, where clips are images"
            yield from in_range("backdrops", self.backdrops, 0, 1)
            for name in ("height", "width"):
                yield from in_range(name, getattr(self, name), SCAN)
            room = min(self.height, self.width) - SCAN
            if room >= 0 and self.speed * (self.frames - 1) > room:
                yield (
                    f"frames={self.frames}: want at most {room // max(self.speed, 1) + 1}, or a "
                    "larger height and width: digits stay inside if "
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
            fields = {"video", "captions", "label", "prompts"}
            if not self.backdrops:
                fields.add("digit_captions")  # metric=digits needs a black background
            return frozenset(fields if self.fps is None else fields | {"fps"})

        def labels(self) -> int:
            return 10

        def metric(self) -> str | None:
            return "brightness" if self.backdrops else "digits"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> Items:
        """Clips of "train" or "val"; "val" has four per held-out caption, from held-out scans."""
        check_split(name)
        if name == "val":
            return Val(self.cfg)
        return Mixed(self.cfg) if self.cfg.pictures else Train(self.cfg)

    def prompts(self) -> list[str]:
        return [caption(combination) for combination in HELD_OUT]

    def label(self, caption: str) -> int | None:
        """The digit of a caption."""
        digits = [int(word) for word in caption.split() if word in DIGITS]
        return digits[0] if len(digits) == 1 else None


class Train:
    """Clips drawn from `rng` alone; with `distinct` from the index."""

    def __init__(self, cfg: MovingDigits.Config) -> None:
        self.cfg, self.scans = cfg, scans_by_digit(held_out=False)

    def __len__(self) -> int:
        return self.cfg.clips_per_epoch

    def id(self, index: int) -> str:
        return f"train/{index}"

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        if self.cfg.distinct is not None:
            rng = np.random.default_rng(index % self.cfg.distinct)
        combination_u, scan_u, lane, start = rng.random(4)
        combination = TRAINED[int(combination_u * len(TRAINED))]
        scans = self.scans[combination[1]]
        return sample(self.cfg, combination, scans[int(scan_u * len(scans))], lane, start, rng)


class Mixed(Train):
    """Clips and images; an image is the first frame of a clip."""

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        pictures = self.cfg.pictures
        return self.cfg.clips()[int(rng.random() * (1 + pictures) < pictures)]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        size = self.bucket(index, rng)
        clip = super().load(index, rng)
        return clip | {"video": clip["video"][:, : size.frames]}


class Val:
    """Neighbouring clips differ in caption, and no scan is used twice."""

    def __init__(self, cfg: MovingDigits.Config) -> None:
        self.cfg, self.scans = cfg, scans_by_digit(held_out=True)

    def __len__(self) -> int:
        return len(HELD_OUT) * VAL_REPEATS

    def id(self, index: int) -> str:
        return f"val/{index}"

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        repeat, caption_index = divmod(index, len(HELD_OUT))
        combination = HELD_OUT[caption_index]
        digit = combination[1]
        earlier = sum(other[1] == digit for other in HELD_OUT[:caption_index])
        scan = self.scans[digit][earlier * VAL_REPEATS + repeat]
        rng = np.random.default_rng(index)
        lane, start = rng.random(2)
        return sample(self.cfg, combination, scan, lane, start, rng)


def sample(
    cfg: MovingDigits.Config, combination: Combination, scan: np.ndarray, lane: float,
    start: float, rng: np.random.Generator,
) -> Sample:  # fmt: skip
    """One clip; `lane` and `start` in [0, 1) are positions across and along the motion.

    `rng` draws the speed (random_speed) and the background (backdrops).
    """
    colour, digit, direction = combination
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
    numbers = {"label": float(digit)}
    if cfg.fps is not None:
        numbers["fps"] = float(cfg.fps // speed)
    return {"video": torch.from_numpy(video), "caption": caption(combination), **numbers}


def offsets(
    cfg: MovingDigits.Config, direction: str, lane: float, start: float, speed: int
) -> tuple[list[int], list[int]]:
    """Top and left of the scan in each frame. Lanes are the middle half: 2..6 of 0..8."""
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
