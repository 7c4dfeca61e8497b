"""Pictures of clips: exact pixels, readable files, nothing half-written."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sandbox.contracts import StorageError
from sandbox.reports.media import (
    BACKGROUND,
    NAN,
    contact_sheet,
    enlargement,
    evenly_spaced,
    frames_uint8,
    grid_of_clips,
    reconstruction_sheet,
    replacing,
    upscale,
    wrap,
    write_gif,
    write_video,
)


def clip(frames: int = 9, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Saturated squares that move one pixel a frame, as the digits do."""
    rng = np.random.default_rng(seed)
    video = -torch.ones(3, frames, height, width)
    colour = torch.tensor(rng.uniform(-1, 1, 3), dtype=torch.float32)
    for t in range(frames):
        at = t % max(1, width - 6)
        video[:, t, 4:10, at : at + 6] = colour[:, None, None]
    return video


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        rate = float(stream.average_rate)
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(stream)]), rate


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_comes_back_exactly(dtype):
    levels = torch.arange(256).view(1, 1, 16, 16).expand(3, 1, 16, 16)
    frames = frames_uint8(levels.to(dtype) / 127.5 - 1)
    assert (frames[0] == levels[0, 0].numpy()[..., None]).all()


def test_values_go_to_the_nearest_level():
    video = torch.full((3, 1, 1, 2), 0.0)
    video[..., 0], video[..., 1] = (100.49 / 127.5) - 1, (100.51 / 127.5) - 1
    assert frames_uint8(video)[0, 0, :, 0].tolist() == [100, 101]


def test_values_outside_are_clamped():
    video = (
        torch.tensor([-3.0, float("-inf"), 1.5, float("inf")]).view(1, 1, 1, 4).expand(3, 1, 1, 4)
    )
    assert frames_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 255, 255]


def test_nan_is_magenta():
    video = torch.zeros(3, 1, 2, 2)
    video[1, 0, 0, 1] = float("nan")
    frames = frames_uint8(video)
    assert tuple(frames[0, 0, 1]) == NAN and tuple(frames[0, 0, 0]) == (128, 128, 128)


def test_bfloat16_and_gradients_are_accepted():
    video = torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    assert frames_uint8(video).shape == (2, 4, 4, 3)


@pytest.mark.parametrize("shape", [(1, 9, 16, 16), (3, 16, 16), (2, 3, 9, 16, 16), (3, 0, 16, 16)])
def test_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"want \(3, T, H, W\)"):
        frames_uint8(torch.zeros(shape))


def test_enlarging_repeats_pixels():
    frames = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    big = upscale(frames, 3)
    assert big.shape == (1, 6, 6, 3)
    assert (big[:, ::3, ::3] == frames).all() and (big[:, 2::3, 2::3] == frames).all()


@pytest.mark.parametrize(("size", "factor"), [((16, 16), 10), ((24, 24), 8), ((320, 512), 1)])
def test_enlargement_makes_small_clips_visible(size, factor):
    assert enlargement(*size) == factor


def test_thinning_keeps_first_and_last():
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(33, 9) == [0, 4, 8, 12, 16, 20, 24, 28, 32]


# --- videos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 23.976])
def test_mp4_has_the_frames_the_rate_and_the_pixels(tmp_path, fps):
    video = clip()
    write_video(tmp_path / "a.mp4", video, fps, enlarge=10)
    frames, rate = decoded(tmp_path / "a.mp4")
    assert frames.shape == (9, 160, 160, 3)
    assert rate == pytest.approx(fps, rel=1e-4)  # rates are stored as a fraction
    middles = frames[:, 5::10, 5::10].astype(int)
    # yuv in 8 bits loses up to 3 levels, crf 10 a few more at edges
    assert np.abs(middles - frames_uint8(video)).max() <= 12


def test_colours_do_not_bleed_between_enlarged_pixels(tmp_path):
    video = clip()
    write_video(tmp_path / "a.mp4", video, 8, enlarge=10, crf=0)
    frames, _ = decoded(tmp_path / "a.mp4")
    # crf 0 leaves the rounding of yuv, at most 3 levels, even at the borders of pixels
    assert np.abs(frames.astype(int) - upscale(frames_uint8(video), 10)).max() <= 3


def test_odd_sizes_become_even(tmp_path):
    write_video(tmp_path / "a.mp4", clip(3, 15, 17), 8)
    assert decoded(tmp_path / "a.mp4")[0].shape == (3, 16, 18, 3)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    write_video(tmp_path / "a.mp4", clip(1), 8)
    assert len(decoded(tmp_path / "a.mp4")[0]) == 1


def test_the_same_clip_gives_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip(), 8, 4)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("fps", [0, -1, float("nan")])
def test_impossible_rates_are_refused(tmp_path, fps):
    with pytest.raises(ValueError, match="fps="):
        write_video(tmp_path / "a.mp4", clip(), fps)


def test_gif_keeps_frames_and_colours(tmp_path):
    video = clip()
    write_gif(tmp_path / "a.gif", video, 8, enlarge=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 9 and gif.info["loop"] == 0 and gif.info["duration"] == 120
        gif.seek(4)
        middles = np.asarray(gif.convert("RGB"))[::2, ::2].astype(int)
    # two colours need no quantising; the palette is an average of equal pixels
    assert np.abs(middles - frames_uint8(video)[4]).max() <= 2


def test_a_wall_shows_every_clip_and_rests_on_last_frames():
    clips = [("a", clip(9, seed=1)), ("b", clip(3, seed=2)), ("c", clip(9, seed=3))]
    frames = grid_of_clips(clips, columns=2, least=32)
    assert len(frames) == 9 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    for _, video in clips:
        colour = frames_uint8(video)[-1, 5, 2 + len(video[0]) % 9 + 1]
        assert (frames[-1] == colour).all(-1).any()


# --- files ----------------------------------------------------------------------------------------


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_video_replaces_the_old_file_whole(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    for _ in range(2):
        write_video(path, clip(), 8)
    assert list(path.parent.iterdir()) == [path] and len(decoded(path)[0]) == 9


def test_an_unwritable_place_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", clip(), 8)


# --- sheets ---------------------------------------------------------------------------------------


def opened(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def strip_places(sheet: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Left edges of the stretches of `colour` in the sheet."""
    found = (sheet == colour).all(-1).any(0)
    return np.flatnonzero(np.diff(found.astype(int), prepend=0) == 1)


def test_sheet_shows_columns_in_order_and_at_most_nine_frames(tmp_path):
    red, blue = (torch.full((3, 30, 16, 16), -1.0) for _ in range(2))
    red[0], blue[2] = 1, 1
    contact_sheet(
        tmp_path / "s.png",
        [("both", {"real": red, "model": blue}), ("one", {"model": blue})],
    )
    sheet = opened(tmp_path / "s.png")
    reds = strip_places(sheet, np.array([255, 0, 0]))
    blues = strip_places(sheet, np.array([0, 0, 255]))
    assert len(reds) == len(blues) == 9 and reds.max() < blues.min()
    assert tuple(sheet[0, 0]) == BACKGROUND
    lower = sheet[sheet.shape[0] // 2 + 20 :]
    assert not (lower == [255, 0, 0]).all(-1).any()  # the row that lacks it leaves it empty


def test_sheet_enlarges_to_whole_squares(tmp_path):
    video = torch.full((3, 1, 16, 16), -1.0)
    video[0, 0, 5, 7] = 1
    contact_sheet(tmp_path / "s.png", [("dot", {"a": video})])
    rows, columns = np.nonzero((opened(tmp_path / "s.png") == [255, 0, 0]).all(-1))
    side = rows.max() - rows.min() + 1
    assert side == columns.max() - columns.min() + 1 == 8 and len(rows) == side**2


def test_images_become_a_grid(tmp_path):
    rows = [(f"image {i}", {"": clip(1, seed=i)}) for i in range(16)]
    contact_sheet(tmp_path / "s.png", rows)
    height, width = opened(tmp_path / "s.png").shape[:2]
    assert 0.5 < height / width < 2


def test_large_frames_are_made_smaller(tmp_path):
    contact_sheet(tmp_path / "s.png", [("large", {"a": clip(9, 320, 512), "b": clip(9, 320, 512)})])
    assert opened(tmp_path / "s.png").shape[1] < 2200


def test_a_sheet_without_clips_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet(tmp_path / "s.png", [("nothing", {})])


def test_long_captions_wrap_and_end_in_an_ellipsis():
    lines = wrap("many words " * 30 + "w" * 300, 190, 14, most=6)
    assert len(lines) == 6 and lines[-1].endswith("...")
    assert wrap("w" * 100, 190, 14, most=9) and "".join(wrap("w" * 100, 190, 14, 9)) == "w" * 100
    assert wrap("", 190, 14, most=6) == []


def test_reconstruction_sheet_shows_the_difference(tmp_path):
    video = torch.full((3, 1, 16, 16), -1.0)
    other = video.clone()
    other[1, 0, 8, 8] = 40 / 127.5 - 1
    reconstruction_sheet(tmp_path / "r.png", [video], [other], ["x"], gain=3)
    sheet = opened(tmp_path / "r.png")
    assert (sheet == [0, 40, 0]).all(-1).any() and (sheet == [0, 120, 0]).all(-1).any()


def test_reconstructions_must_match(tmp_path):
    with pytest.raises(ValueError, match="1 originals and 0 reconstructions"):
        reconstruction_sheet(tmp_path / "r.png", [clip()], [])
