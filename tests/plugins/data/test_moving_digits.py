"""Moving digits: contents of clips, held-out combinations, valid sizes."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from plugins.data.moving_digits import COLOURS, MovingDigits, scans_by_digit
from sandbox.contracts import Clip
from sandbox.data.loader import Loader
from sandbox.data.randomness import keyed

CONFIG = MovingDigits.Config()
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def source(**settings) -> MovingDigits:
    return MovingDigits(replace(CONFIG, **settings))


def train_clips(count: int, **settings) -> list[dict]:
    items = source(**settings).split("train")
    return [items.load(i, keyed(i)) for i in range(count)]


def key(scan: np.ndarray) -> bytes:
    """Identifies a scan without its empty border, at full brightness; colours are rounded."""
    rows, columns = np.nonzero(scan.any(1))[0], np.nonzero(scan.any(0))[0]
    part = scan[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return str(part.shape).encode() + np.round(part / part.max() * 64).astype(np.uint8).tobytes()


@pytest.mark.parametrize("settings", [{}, {"height": 24, "width": 40, "frames": 5, "speed": 3}])
def test_a_digit_moves_in_its_captions_direction(settings):
    speed = settings.get("speed", 1)
    for clip in train_clips(40, **settings):
        video, direction = clip["video"], clip["caption"].split()[-1]
        step = [speed * s for s in STEPS[direction]]
        assert torch.equal(torch.roll(video[:, :-1], step, (2, 3)), video[:, 1:])
        assert not torch.equal(video[:, :-1], video[:, 1:])


def test_pixels_are_a_scan_times_the_captions_colour():
    for clip in train_clips(40):
        rgb = (clip["video"] + 1) / 2
        brightest = rgb.flatten(1).argmax(1)[0]
        colour = torch.tensor(COLOURS[clip["caption"].split()[1]])
        assert clip["video"].dtype == torch.float32
        assert clip["video"].shape == (3, 9, 16, 16)
        # The brightest of the 17 grey levels shows the colour itself, up to float32 rounding.
        torch.testing.assert_close(rgb.flatten(1)[:, brightest], colour, atol=1e-6, rtol=0)
        assert rgb.min() >= 0 and rgb.max() <= 1 + 1e-6


def test_captions_have_five_words_and_training_has_every_word():
    words = {word for clip in train_clips(400) for word in clip["caption"].split()}
    assert len(words) == 2 + 6 + 10 + 4
    assert all(len(clip["caption"].split()) == 5 for clip in train_clips(10))


def test_held_out_captions_are_never_trained_on():
    held_out = source().prompts()
    trained = {clip["caption"] for clip in train_clips(4000)}
    assert len(set(held_out)) == 48
    assert len(trained) == 192  # 4,000 draws include all 192 others
    assert not trained & set(held_out)


def test_held_out_captions_have_two_digits_per_colour_and_direction():
    kinds = [(c, m) for _, c, _, _, m in (p.split() for p in source().prompts())]
    assert {kinds.count(kind) for kind in kinds} == {2}
    assert len(set(kinds)) == 24


def test_validation_has_four_held_out_scans_per_caption():
    items = source().split("val")
    clips = [items.load(i, None) for i in range(len(items))]
    captions = [clip["caption"] for clip in clips]
    assert captions == source().prompts() * 4
    held_out = {key(scan) for scans in scans_by_digit(held_out=True) for scan in scans}
    assert all(key(((clip["video"][:, 0] + 1) / 2).amax(0).numpy()) in held_out for clip in clips)


def test_training_and_validation_scans_are_disjoint_and_complete():
    train, val = (scans_by_digit(held_out) for held_out in (False, True))
    assert sum(map(len, train)) == 1497
    assert sum(map(len, val)) == 300
    trained = {scan.tobytes() for scans in train for scan in scans}
    assert not trained & {scan.tobytes() for scans in val for scan in scans}


def test_a_clip_depends_only_on_its_key():
    items = source().split("train")
    one, same = items.load(0, keyed("a")), items.load(7, keyed("a"))
    other = items.load(0, keyed("b"))
    assert torch.equal(one["video"], same["video"])
    assert not torch.equal(one["video"], other["video"])


def test_lanes_are_the_middle_half_of_the_canvas():
    tops = set()
    for clip in train_clips(600):
        if clip["caption"].endswith(("left", "right")):
            ink = clip["video"].amax((0, 1, 3)) > -1
            tops.add(int(ink.nonzero()[0]))
    assert min(tops) == 2  # lanes start at 2; scans can have empty rows
    assert all(
        clip["video"][:, :, :2].max() == -1 for clip in train_clips(60) if "left" in clip["caption"]
    )


@pytest.mark.parametrize(
    "settings", [{"frames": 1}, {"frames": 1, "height": 8, "width": 8}, {"width": 64}]
)
def test_other_sizes_give_clips_of_that_size(settings):
    cfg = replace(CONFIG, **settings)
    assert not list(cfg.problems())
    clip = MovingDigits(cfg).split("val").load(0, None)
    assert clip["video"].shape == (3, cfg.frames, cfg.height, cfg.width)
    assert clip["video"].max() > 0


def test_the_length_of_an_epoch_is_a_setting():
    assert len(source().split("train")) == 16384
    assert len(source(clips_per_epoch=100).split("train")) == 100


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"frames": 10}, "frames=10: want at most 9,"),
        ({"frames": 6, "speed": 2}, "frames=6: want at most 5,"),
        ({"frames": 18, "height": 32, "width": 24}, "frames=18: want at most 17,"),
        ({"height": 7, "frames": 1}, "height=7: want >= 8"),
        ({"speed": 0}, "speed=0: want >= 1"),
        ({"clips_per_epoch": 0}, "clips_per_epoch=0: want >= 1"),
        ({"root": "scans"}, "root='scans': want null"),
        ({"distinct": 0}, "distinct=0: want >= 1"),
        ({"pictures": -1}, "pictures=-1: want >= 0"),
        ({"pictures": 4, "frames": 1}, "pictures=4: want 0 with frames=1"),
        ({"backdrops": 2.0}, "backdrops=2.0: want 0 to 1"),
    ],
)
def test_bad_settings_are_reported_with_the_allowed_values(settings, problem):
    found = list(replace(CONFIG, **settings).problems())
    assert len(found) == 1 and found[0].startswith(problem)


def test_the_default_config_lists_its_fields():
    assert CONFIG.provides() == {"video", "captions", "digit_captions", "label", "prompts"}
    assert CONFIG.metric() == "digits"
    assert not list(CONFIG.problems())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_clip_that_moves_twice_as_fast_has_half_the_fps(split):
    source = MovingDigits(replace(CONFIG, frames=5, speed=2, random_speed=True, fps=24.0))
    seen = set()
    for i in range(20):
        clip = source.split(split).load(i, keyed(0, "data", 0, str(i)))
        ink = clip["video"].max(0).values + 1  # (T, H, W)
        weights = ink / ink.sum((1, 2), keepdim=True)
        centres = torch.stack([(weights * torch.arange(16).view(s)).sum((1, 2))
                              for s in ((1, 16, 1), (1, 1, 16))])  # fmt: skip
        speed = centres.diff(dim=1).abs().sum(0)
        torch.testing.assert_close(speed, torch.full((4,), 24 / clip["fps"]), rtol=0, atol=1e-3)
        seen.add(clip["fps"])
    assert seen == {12, 24}


def test_fps_is_provided_if_it_is_set():
    assert "fps" in replace(CONFIG, fps=24.0).provides()
    assert list(replace(CONFIG, fps=0.0).problems()) == ["fps=0.0: want > 0"]


def test_distinct_limits_training_clips_and_not_validation():
    few = source(distinct=10).split("train")
    shown = [few.load(i, keyed(i))["video"] for i in range(40)]
    assert len({clip.numpy().tobytes() for clip in shown}) == 10
    more = source(distinct=25).split("train")
    assert all(torch.equal(more.load(i, keyed(0))["video"], shown[i]) for i in range(10))
    assert len(source(distinct=10).split("val")) == 192


def test_images_are_first_frames_at_the_set_ratio():
    cfg = replace(CONFIG, pictures=3, batch_size=4, clips_per_epoch=400)
    items = MovingDigits(cfg).split("train")
    sizes = [items.bucket(i, keyed(i)) for i in range(400)]
    clips = [items.load(i, keyed(i))["video"] for i in range(40)]
    assert [Clip(*clip.shape) for clip in clips] == sizes[:40]
    assert 0.65 < sum(size.frames == 1 for size in sizes) / 400 < 0.85
    loader = Loader(items, 4, 0, batch_of=cfg.batch_of, turns=cfg.alternates_sizes())
    shapes = [tuple(batch.video.shape[::2]) for batch in islice(loader, 8)]  # (clips, frames, W)
    assert shapes == [(12, 1, 16), (4, 9, 16)] * 4
    assert not hasattr(source().split("train"), "bucket")


def test_backgrounds_are_grey_with_varying_brightness():
    clips = torch.stack([clip["video"] for clip in train_clips(200, backdrops=0.8)])
    corner = (clips[:, :, :, 0, 0] + 1) / 2  # (N, 3, T): outside the lanes of digits
    assert torch.equal(corner, corner[:, :1, :1].expand_as(corner))
    assert 0 <= corner.min() < 0.05 and 0.75 < corner.max() <= 0.8
    assert clips.min() >= -1 and clips.max() <= 1 + 1e-6
    cfg = replace(CONFIG, backdrops=0.8)
    assert cfg.metric() == "brightness" and "digit_captions" not in cfg.provides()


def test_fitting_uses_all_clips_without_images():
    cfg = replace(CONFIG, distinct=10, pictures=4, backdrops=0.3)
    assert cfg.all_clips() == replace(CONFIG, backdrops=0.3)
