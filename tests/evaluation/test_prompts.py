"""Sampling inputs: captions, conditioning images and scalars."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sandbox.cli.jobs import check_and_wire
from sandbox.config import registry
from sandbox.contracts import Clip, ConfigError
from sandbox.data.loader import batches
from sandbox.evaluation.prompt_checks import check
from sandbox.evaluation.prompts import data_batch, load_image, user_batch
from tests.helpers import composed, tiny

IMAGE = ("data=moving_digits_rates", "conditioning=dynamicrafter",
        "conditioning.fps_condition_type=fps")  # fmt: skip
BOTH_ENDS = (*IMAGE, "conditioning.interp_mode=true", "conditioning.rand_cond_frame=false")


@pytest.fixture
def files(tmp_path) -> list[str]:
    """A red and a blue picture of the size of the clips."""
    found = []
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        found.append(str(tmp_path / f"{name}.png"))
        Image.new("RGB", (16, 16), colour).save(found[-1])
    return found


def colours(image: torch.Tensor) -> list[list[float]]:
    """The first pixel of each of the images (B, 3, N, H, W), in a list of (r, g, b)."""
    return image[..., 0, 0].transpose(1, 2).flatten(0, 1).tolist()


# --- of the data ----------------------------------------------------------------------------------


def test_captions_are_those_given_or_those_of_the_data():
    root = tiny()
    assert data_batch(root, ("one", "two"), 9).captions == ["one", "two"]
    assert data_batch(root, (), 3).captions == registry.create(root.data).prompts()[:3]


def test_images_and_rates_of_the_data_are_those_of_its_validation_clips():
    root = composed(*IMAGE)
    clips = next(batches(registry.create(root.data).split("val"), 3, root.seed))
    batch = data_batch(root, (), 3)
    assert batch.captions == clips.captions
    assert torch.equal(batch.image, clips.video[:, :, :1])
    assert torch.equal(batch.scalars["fps"], clips.scalars["fps"])


def test_interpolation_gets_the_first_and_the_last_frame():
    root = composed(*BOTH_ENDS)
    clips = next(batches(registry.create(root.data).split("val"), 3, root.seed))
    assert torch.equal(data_batch(root, (), 3).image, clips.video[:, :, [0, 4]])


def test_own_captions_go_with_the_images_of_the_data():
    batch = data_batch(composed(*IMAGE), ("one", "two"), 9)
    assert batch.captions == ["one", "two"]
    assert batch.image.shape == (2, 3, 1, 16, 16)


def test_an_unconditional_model_has_no_captions():
    root = composed("conditioning=none")
    assert data_batch(root, (), 3).captions == [""] * 3
    for refused in (lambda: data_batch(root, ("one",), 3), lambda: user_batch(root, ["one"])):
        with pytest.raises(ConfigError, match="conditioning=none uses no captions"):
            refused()


# --- given ----------------------------------------------------------------------------------------


def test_one_image_is_for_all_prompts(files):
    batch = user_batch(composed(*IMAGE), ["a", "b"], files[:1], fps=24)
    assert batch.captions == ["a", "b"]
    assert colours(batch.image) == [[1, -1, -1], [1, -1, -1]]
    assert batch.scalars["fps"].tolist() == [24, 24]


def test_each_prompt_has_its_image(files):
    assert colours(user_batch(composed(*IMAGE), ["a", "b"], files).image) == [
        [1, -1, -1],
        [-1, -1, 1],
    ]


def test_images_need_no_caption(files):
    assert user_batch(composed(*IMAGE), [], files).captions == ["", ""]


def test_start_and_end_image_make_one_clip(files):
    batch = user_batch(composed(*BOTH_ENDS), ["a"], files[:1], files[1:])
    assert batch.size == 1
    assert colours(batch.image) == [[1, -1, -1], [-1, -1, 1]]


def test_without_prompts_and_images_the_datas_are_taken_at_the_rate_that_is_given():
    batch = user_batch(composed(*IMAGE), [], count=2, fps=6.0, frame_stride=None)
    assert batch.size == 2
    assert batch.scalars["fps"].tolist() == [6, 6]


@pytest.mark.parametrize(
    "settings, captions, images, ends, rates, message",
    [
        (IMAGE, ["a"], 0, 0, {}, r"task.images=\[\]: conditioning=dynamicrafter needs the start"),
        (IMAGE, ["a"] * 3, 2, 0, {}, "give one file for all prompts, or one for each of the 3"),
        (IMAGE, ["a"], 1, 1, {}, r"task.end_images=.*does not use this image"),
        (BOTH_ENDS, ["a"], 1, 0, {}, r"task.end_images=\[\]: .* needs the end image"),
        (IMAGE, ["a"], 1, 0, {"frame_stride": 3.0}, "frame_stride=3.0: .* does not use fr"),
        ((), ["a"], 1, 0, {}, "task.images=.*conditioning=words does not use this image"),
        ((), ["a"], 0, 0, {"fps": 8.0}, "task.fps=8.0: conditioning=words does not use fps"),
    ],
)
def test_what_the_conditioning_cannot_use_or_lacks_is_named(
    files, settings, captions, images, ends, rates, message
):
    with pytest.raises(ConfigError, match=message):
        user_batch(composed(*settings), captions, files[:images], files[:ends], **rates)


# --- pictures -------------------------------------------------------------------------------------


def test_a_picture_of_the_clips_size_keeps_its_pixels(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    got = load_image(tmp_path / "a.png", Clip(3, 1, 6, 8))
    want = torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # rounding of float32


@pytest.mark.parametrize("size", [(64, 20), (20, 64), (7, 5)], ids=str)
def test_other_shapes_cover_the_clip_and_lose_their_sides(tmp_path, size):
    """A picture that is red in the middle and at its ends blue."""
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 2] = 255
    middle = (slice(None), slice(width // 4, -(width // 4)))
    image[middle if width > height else (middle[0], slice(None))] = (255, 0, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    got = load_image(tmp_path / "a.png", Clip(3, 1, 12, 10))
    assert got.shape == (3, 12, 10)
    assert got[:, 6, 5].tolist() == [1, -1, -1]
    assert got.min() >= -1


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read as an image"):
        load_image(tmp_path / "a.png", Clip(3, 1, 12, 10))


def test_all_problems_of_a_request_are_reported_at_once(tmp_path):
    (tmp_path / "a.png").write_text("none")
    root = composed(*IMAGE)
    with pytest.raises(ConfigError) as e:
        check(root, ["a", "b", "c"], [tmp_path / "a.png", tmp_path / "b.png"], [], {"ofs": 2.0})
    said = "\n".join(e.value.problems)
    assert "give one file for all prompts, or one for each of the 3" in said
    for i, name in enumerate(("a.png", "b.png")):
        assert f"task.images[{i}]={tmp_path / name}: cannot be read as an image" in said
    assert "task.ofs=2.0" in said


# --- before a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openclip", "dynamicrafter", "t5"])
def test_absent_weights_of_the_conditioning_are_found_before_a_run_folder_is_made(name):
    """A name on the hub is left to the hub."""
    with pytest.raises(ConfigError, match=r"conditioning\.weights=\./none\.ckpt: no such file"):
        check_and_wire(composed(f"conditioning={name}", "conditioning.weights=./none.ckpt"))
    assert not composed(f"conditioning={name}", "conditioning.weights=a/b").conditioning.files()
