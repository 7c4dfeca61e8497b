"""Scores clips of moving digits against captions such as "a red 3 moving left".

All scores are measured on the clip: position, motion and colour of the ink, and the prediction of a
classifier (trained on real clips) for the 8x8 window around it. A blurred mean clip does well on
colour, direction, shape and realism; diversity and lanes (0 for a mean clip) and digit (chance 0.1)
distinguish it from samples. Diversity increases with brightness, lanes does not.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sandbox.contracts import Clip, ConfigError, MetricConfig, in_range
from sandbox.registry import register

WINDOW = 8  # height and width of a scan in pixels
INK = 0.3  # pixels brighter than this are ink
MIN_INK = 1.5  # least ink per frame, in pixels of full brightness
CAPTION = re.compile(r"a (?P<colour>\w+) (?P<digit>\d) moving (?P<direction>left|right|up|down)")


class CaptionWords(NamedTuple):
    colour: str
    digit: int
    direction: str


def parse(caption: str) -> CaptionWords:
    """Raises ConfigError for a caption of another form."""
    found = CAPTION.fullmatch(caption.strip())
    if not found:
        raise ConfigError(f"metric=digits cannot score {caption!r}: want 'a red 3 moving left'")
    return CaptionWords(found["colour"], int(found["digit"]), found["direction"])


@register("metric", "digits")
class Digits:
    """Colour, direction, digit, shape, realism and diversity of moving digits."""

    @dataclass
    class Config(MetricConfig):
        """reference: number of real training clips to fit on; 1,024 are enough."""

        imports = ("sklearn.svm",)
        reference: int = 2048

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("reference", self.reference, 1)

        def needs(self) -> frozenset[str]:
            return frozenset({"captions", "digit_captions"})

        def accepts(self, clip: Clip) -> Iterator[str]:
            for name in ("height", "width"):
                yield from in_range(name, getattr(clip, name), WINDOW)

        def fit_clips(self) -> int:
            return self.reference

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """Fits colours, the digit classifier, windows and mean clips on real clips.

        Raises ValueError if one of the ten digits is missing.
        """
        from sklearn.svm import SVC

        words = [parse(caption) for caption in captions]
        missing = set(range(10)) - {w.digit for w in words}
        if missing:
            raise ValueError(f"no training clip shows {sorted(missing)}: pass more clips")
        frames = three_frames(video.shape[2])
        flat = windows(video[:, :, frames]).flatten(0, 1).flatten(1)  # (N*3, 64)
        labels = torch.tensor([w.digit for w in words]).repeat_interleave(len(frames))
        # A scan has the same window at every position, up to rounding: keep one copy.
        both = torch.cat([flat, labels[:, None]], 1).mul(1000).round().div(1000).unique(dim=0)
        self.references = standardise(both[:, :-1])
        pixels, digits = both[:, :-1].numpy(), both[:, -1].long().numpy()
        self.classifier = SVC(C=10, gamma="scale").fit(pixels, digits)
        rgb = mean_rgb(video)
        self.colours = {
            colour: F.normalize(rgb[[w.colour == colour for w in words]].mean(0), dim=0)
            for colour in sorted({w.colour for w in words})
        }
        rows_of = defaultdict(list)
        for row, w in enumerate(words):
            rows_of[w.colour, w.direction].append(row)
        self.means = {kind: video[rows].float().mean(0) for kind, rows in rows_of.items()}

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Scores by name (see `meaning`), without those that need more frames or clips."""
        scores = {k: v.mean().item() for k, v in self.per_clip(video, captions).items()}
        video, pairs = finite(video), caption_pairs(captions)
        if len(pairs):
            first, second = video[pairs.T]
            scores["diversity"] = (first - second).square().mean((1, 2, 3, 4)).sqrt().mean().item()
            if video.shape[2] > 1:
                first, second = lanes(video, captions)[pairs.T]
                scores["lanes"] = (first - second).abs().mean().item()
        return scores

    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) per score; rates are 1 if the clip matches its caption, else 0."""
        words = [parse(caption) for caption in captions]
        video = finite(video)
        window = windows(video)  # (N, T, 8, 8)
        scores = {
            "colour": matches(self.colour(video), [w.colour for w in words]),
            "digit": matches(self.digit(window), [w.digit for w in words]),
            "realism": self.realism(window),
        }
        if video.shape[2] > 1:
            velocity = motion(video)
            scores["direction"] = matches(direction(velocity), [w.direction for w in words])
            scores["speed"] = velocity.abs().amax(1)
            scores["shape"] = shape_consistency(window)
        return scores

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        """(N, 3, T, H, W): the mean training clip of each caption's colour and direction."""
        words = [parse(caption) for caption in captions]
        unseen = {(w.colour, w.direction) for w in words} - set(self.means)
        if unseen:
            raise ConfigError(
                *(f"no training clip is {c} and moves {d}" for c, d in sorted(unseen))
            )
        return {"mean clip": torch.stack([self.means[w.colour, w.direction] for w in words])}

    def proportions(self) -> frozenset[str]:
        return frozenset({"direction", "colour", "digit"})

    def meaning(self) -> dict[str, str]:
        return {
            "direction": "clips that move in their caption's direction; chance 0.25, perfect 1",
            "colour": "clips whose colour is nearest to the caption's; chance 0.17, perfect 1",
            "digit": "clips classified as their caption's digit; chance 0.10, real 0.97",
            "shape": "correlation of the digit's shape between frames; noise 0, real 1",
            "realism": "highest correlation with a digit of the training clips; real 0.93",
            "diversity": "RMS pixel distance of clips of one caption; mean clip 0, real 0.3",
            "lanes": "distance of clips of one caption across their motion in pixels, independent "
            "of brightness; mean clip 0, noise 0.1, real 1.7",
            "speed": "motion in pixels per frame; real clips have data.speed",
        }

    def colour(self, video: Tensor) -> list[str | None]:
        """The fitted colour nearest to each clip by cosine; None if there is too little ink."""
        names = list(self.colours)
        rgb = mean_rgb(video)
        nearest = (rgb @ torch.stack([self.colours[n] for n in names]).T).argmax(1).tolist()
        visible = enough_ink(video).tolist()
        return [names[i] if is_visible else None
                for i, is_visible in zip(nearest, visible, strict=True)]  # fmt: skip

    def digit(self, window: Tensor) -> list[int]:
        """The classifier's digit; decisions are averaged over every second frame."""
        every_second = window[:, ::2].flatten(2)  # (N, T', 64)
        decisions = self.classifier.decision_function(every_second.flatten(0, 1).numpy())
        return decisions.reshape(*every_second.shape[:2], -1).mean(1).argmax(1).tolist()

    def realism(self, window: Tensor) -> Tensor:
        """(N,) highest correlation with a window of the training clips."""
        flat = standardise(window[:, three_frames(window.shape[1])].flatten(2))  # (N, 3, 64)
        return (flat @ self.references.T).amax(-1).mean(1)


def finite(video: Tensor) -> Tensor:
    """Replaces NaN and infinite pixels, which a diverged model generates."""
    return video.float().nan_to_num(nan=-1, posinf=1, neginf=-1)


def matches(found: Sequence[object], wanted: Sequence[object]) -> Tensor:
    """(N,) float64: 1 where both are equal, else 0."""
    equal = [f == w for f, w in zip(found, wanted, strict=True)]
    return torch.tensor(equal, dtype=torch.float64)


def three_frames(frames: int) -> list[int]:
    """Numbers of the first, middle and last frame, without repetitions."""
    return sorted({0, frames // 2, frames - 1})


def ink(video: Tensor) -> Tensor:
    """(N, 3, T, H, W) in [-1, 1] -> (N, T, H, W): the brightest channel in [0, 1]."""
    return (video.float().amax(1) + 1) / 2


def masked_ink(video: Tensor) -> Tensor:
    return ink(video).where(ink(video) > INK, 0)


def enough_ink(video: Tensor) -> Tensor:
    """(N,) bool: clips with less ink have neither colour nor direction."""
    return masked_ink(video).sum((1, 2, 3)) / video.shape[2] >= MIN_INK


def centres(video: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of the ink (N, T, 2) as row and column, and whether there is ink (N, T)."""
    weight = masked_ink(video)
    mass = weight.sum((2, 3))
    height, width = weight.shape[2:]
    rows = (weight.sum(3) @ torch.arange(height).float()) / mass
    columns = (weight.sum(2) @ torch.arange(width).float()) / mass
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2])
    inked = mass > 0
    return torch.stack([rows, columns], -1).where(inked[..., None], middle), inked


def windows(video: Tensor) -> Tensor:
    """(N, T, 8, 8) ink around its centre, divided by its maximum (at least 0.3)."""
    centre, _ = centres(video)
    # The corner is centre - 3.5, rounded half up. torch.round rounds half to even, and the window
    # would jump as a digit moves.
    corner = (centre - (WINDOW - 1) / 2 + 0.5).floor().long()
    padded = F.pad(ink(video), [WINDOW] * 4)
    tiles = padded.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1)  # (N, T, H', W', 8, 8), a view
    n, t = torch.meshgrid(torch.arange(len(video)), torch.arange(video.shape[2]), indexing="ij")
    window = tiles[n, t, corner[..., 0] + WINDOW, corner[..., 1] + WINDOW]
    return window / window.amax((2, 3), keepdim=True).clamp_min(INK)


def mean_rgb(video: Tensor) -> Tensor:
    """(N, 3) mean colour in [0, 1] of the inked pixels of a clip."""
    inked = (ink(video) > INK).float()
    rgb = torch.einsum("ncthw,nthw->nc", (video.float() + 1) / 2, inked)
    return rgb / inked.sum((1, 2, 3)).clamp_min(1)[:, None]


def motion(video: Tensor) -> Tensor:
    """(N, 2) least-squares velocity (down, right) in pixels per frame; 0 without enough ink."""
    centre, inked = centres(video)
    weight = inked.float()[..., None]  # (N, T, 1): frames without ink do not count
    count = weight.sum(1, keepdim=True).clamp_min(1)
    time = torch.arange(video.shape[2]).float()[None, :, None]
    time = (time - (weight * time).sum(1, keepdim=True) / count) * weight
    slopes = (time * centre).sum(1) / time.square().sum(1).clamp_min(1e-6)
    return slopes.where(enough_ink(video)[:, None], 0)


def direction(slopes: Tensor) -> list[str | None]:
    """Direction of the larger component; None at up to half a pixel per frame."""
    found = []
    for down, right in slopes.tolist():
        if max(abs(down), abs(right)) <= 0.5:
            found.append(None)
        elif abs(right) > abs(down):
            found.append("right" if right > 0 else "left")
        else:
            found.append("down" if down > 0 else "up")
    return found


def standardise(x: Tensor) -> Tensor:
    """Zero mean and unit length on the last axis: products are correlations; flat input gives 0."""
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1, eps=1e-6)


def shape_consistency(window: Tensor) -> Tensor:
    """(N,) mean correlation of the windows of later frames with that of the first."""
    flat = standardise(window.flatten(2))
    return (flat[:, 1:] * flat[:, :1]).sum(-1).mean(1)


def lanes(video: Tensor, captions: list[str]) -> Tensor:
    """(N,) position of the ink across the caption's motion, in pixels; captions do not name it."""
    across = [parse(c).direction in ("up", "down") for c in captions]  # 0 rows, 1 columns
    return centres(video)[0].mean(1)[torch.arange(len(video)), torch.tensor(across).long()]


def caption_pairs(captions: list[str]) -> Tensor:
    """(P, 2) rows of all pairs of clips with the same caption."""
    rows = defaultdict(list)
    for row, caption in enumerate(captions):
        rows[caption].append(row)
    pairs = [pair for same in rows.values() for pair in combinations(same, 2)]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)
