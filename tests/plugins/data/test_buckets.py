"""Buckets by aspect and frames, against the published tables and examples."""

import json

import pytest

from plugins._blocks.buckets import (
    batch_frames,
    covering_size,
    frame_shares,
    nearest_ratio,
    pick_by_share,
)
from plugins._configs.buckets import ASPECTS, CROPS, crop_size
from tests.golden_easyanimate import GOLDEN

FACTS = json.loads((GOLDEN / "easyanimate_buckets.json").read_text())


def table(name: str) -> dict[float, tuple[int, ...]]:
    return {float(k): tuple(map(int, v)) for k, v in FACTS[name].items()}


def test_sizes_equal_the_published_table_in_order() -> None:
    assert list(ASPECTS.items()) == list(table("aspect_ratio_512_height_width").items())


def test_random_crop_ratios_have_the_published_sizes_and_frequencies() -> None:
    assert {ratio: crop_size(ratio, 512) for ratio in CROPS} == table(
        "random_crop_512_height_width"
    )
    shares = [weight / sum(CROPS.values()) for weight in CROPS.values()]
    assert shares == pytest.approx(FACTS["random_crop_prob"])


@pytest.mark.parametrize("example", FACTS["closest_ratio_and_resize_examples"])
def test_images_get_the_published_bucket_and_resize(example) -> None:
    ratio = nearest_ratio(tuple(example["source_hw"]), ASPECTS)
    crop = crop_size(ratio, example["video_sample_size"])
    assert ratio == example["bucket"]
    assert list(crop) == example["crop_hw"]
    assert list(covering_size(tuple(example["source_hw"]), crop)) == example["resize_hw"]


@pytest.mark.parametrize("source", [(7, 1000), (333, 777), (480, 641), (1999, 37), (512, 512)])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 1.46])
def test_a_resized_image_covers_the_crop(source, ratio) -> None:
    crop = crop_size(ratio, 512)
    rows, columns = covering_size(source, crop)
    assert rows >= crop[0] and columns >= crop[1]
    assert rows == crop[0] or columns == crop[1]


@pytest.mark.parametrize("example", FACTS["random_frame_crop"])
def test_random_temporal_crops_have_the_published_probabilities(example) -> None:
    shares = frame_shares(example["video_sample_n_frames"], example["bucket_interval"])
    assert list(shares) == example["choices"]
    assert [*shares.values()] == pytest.approx(example["p"])


@pytest.mark.parametrize(("frames", "interval"), [(1, 9), (8, 9), (10, 9), (3, 1)])
def test_frame_probabilities_sum_to_one(frames, interval) -> None:
    shares = frame_shares(frames, interval)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares) <= frames


@pytest.mark.parametrize("example", FACTS["batch_frames_examples"])
def test_batches_have_the_published_number_of_frames(example) -> None:
    most = example["video_sample_n_frames"]
    found = batch_frames(example["example_frames"], example["interval"], most)
    assert found == example["batch_frames"]


def test_long_clips_exceed_the_limit_by_at_most_one_interval() -> None:
    assert batch_frames([500, 400], 9, 144) == 153


def test_picked_follows_the_shares() -> None:
    shares = {"a": 0.25, "b": 0.5, "c": 0.25}
    found = [pick_by_share(shares, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999999)]
    assert found == ["a", "a", "b", "b", "c", "c"]
    assert pick_by_share(CROPS, 1 - 2**-53) == 2.4


@pytest.mark.parametrize(("call", "message"), [
    (lambda: crop_size(0.3, 512), "ratio=0.3: want one of"),
    (lambda: frame_shares(0, 9), "frames=0, interval=9: want both"),
    (lambda: frame_shares(9, 0), "frames=9, interval=0: want both"),
])  # fmt: skip
def test_bad_numbers_are_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
