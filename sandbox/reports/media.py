"""Videos, images, animated walls and contact sheets of clips.

Clips are (3, T, H, W) in [-1, 1]; an image has T = 1. Small clips are enlarged by integer factors
with nearest neighbour, so that pixels stay sharp squares. Files are written atomically.

PyAV and Pillow do the encoding. The sheet layout is our own: matplotlib would resample pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import zip_longest
from math import ceil, inf, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from sandbox.reports.fonts import draw_text, wrap
from sandbox.storage import atomic

if TYPE_CHECKING:
    from torch import Tensor

    SheetRow = tuple[str, Mapping[str, Tensor | np.ndarray]]  # caption, column label -> clip

BACKGROUND, FRAME, INK = (20, 20, 22), (58, 58, 62), (236, 236, 238)
NAN = (255, 0, 255)  # magenta, which is easier to notice than black
MAX_FRAMES = 9  # of one strip
SHEET_WIDTH = 1900  # target, in pixels
CAPTION_WIDTH, MARGIN, HEADER, GAP, ROW_GAP, FILM = 190, 18, 22, 18, 6, 3  # pixels
TEXT, LINE = 14, 19  # font size, line height
BT709 = 1  # code of ITU-T H.273 for matrix, primaries and transfer
LIMITED = 1  # AVCOL_RANGE_MPEG: luma 16..235


# --- atomic files ---------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file, renamed to `path` when the block succeeds. Creates the folder.

    An exception leaves `path` unchanged. Raises StorageError where the file cannot be written.
    """
    path = Path(path)
    with atomic.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as draft:
            yield draft


# --- pixels ---------------------------------------------------------------------------------------


def frames_uint8(video: Tensor | np.ndarray) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8, rounded and clamped; NaN becomes magenta.

    -1 is 0 and 1 is 255: u / 127.5 - 1 maps back to u. (T, H, W, 3) uint8 is returned unchanged.
    """
    # bfloat16 has no numpy type
    array = video if isinstance(video, np.ndarray) else video.detach().float().cpu().numpy()
    if array.dtype == np.uint8:
        if array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(f"frames have shape {array.shape}: want (T, H, W, 3)")
        return array
    if array.ndim != 4 or array.shape[0] != 3 or 0 in array.shape:
        raise ValueError(f"video has shape {array.shape}: want (3, T, H, W)")
    pixels = array.astype(np.float32).transpose(1, 2, 3, 0)  # (T, H, W, 3)
    broken = np.isnan(pixels)
    levels = np.rint((pixels.clip(-1, 1) + 1) * 127.5)
    frames = np.where(broken, 0, levels).astype(np.uint8)
    frames[broken.any(-1)] = NAN
    return frames


def enlargement(height: int, width: int, least: int = 160) -> int:
    """Integer factor that brings the longer side to at least `least` pixels; 1 or even.

    Even, because yuv420p stores one colour per 2 x 2 pixels: no two source pixels share one.
    """
    factor = ceil(least / max(height, width))
    return factor + factor % 2 if factor > 1 else 1


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """(T, H, W, 3) -> (T, factor * H, factor * W, 3), nearest neighbour."""
    if factor < 1:
        raise ValueError(f"enlarge={factor}: want >= 1")
    return frames.repeat(factor, 1).repeat(factor, 2)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spaced, including the first and the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


# --- videos and images ----------------------------------------------------------------------------


def write_video(
    path: str | Path,
    video: Tensor | np.ndarray,
    fps: float,
    enlarge: int = 1,
    crf: int = 10,
) -> None:
    """Writes a clip (3, T, H, W) in [-1, 1], or frames (T, H, W, 3) uint8, as mp4 (h264, yuv420p).

    Odd sizes are padded by repeating the last row or column. `crf` 10 deviates by a few levels, 0
    by rounding only. Deterministic: the same clip gives the same bytes.
    """
    frames = upscale(frames_uint8(video), enlarge)
    height, width = frames.shape[1:3]
    write_frames(
        path,
        np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge"),
        fps,
        crf,
    )


def write_frames(
    path: str | Path, frames: Iterable[np.ndarray], fps: float, crf: float, preset: str = "slow"
) -> tuple[int, int, int]:
    """Streams frames (H, W, 3) uint8 of one even size into an mp4 (h264, yuv420p).

    Returns (frames, height, width). Deterministic.
    """
    import av

    _check_fps(fps)
    count, height, width = 0, 0, 0
    with (
        replacing(path) as draft,
        av.open(str(draft), "w", format="mp4", options={"movflags": "+faststart"}) as file,
    ):
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        # no B-frames: the first frame is at 0 s; one thread: the same bytes on any core count
        stream.options = {"crf": str(crf), "preset": preset, "bf": "0", "threads": "1"}
        codec: Any = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED
        for count, frame in enumerate(frames, 1):
            if count == 1:
                height, width = stream.height, stream.width = frame.shape[:2]
            encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            # AREA: the default interpolation blends the colours of neighbouring pixels
            encoded = encoded.reformat(
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation="AREA",
            )
            file.mux(stream.encode(encoded))
        file.mux(stream.encode())
    return count, height, width


def write_image(path: str | Path, clip: Tensor | np.ndarray) -> None:
    """Writes a clip of one frame (3, 1, H, W) in [-1, 1] as a PNG."""
    frames = frames_uint8(clip)
    if len(frames) != 1:
        raise ValueError(f"clip has {len(frames)} frames: want 1; use write_video")
    with replacing(path) as draft:
        Image.fromarray(frames[0]).save(draft, format="PNG", optimize=True)


def write_gif(path: str | Path, video: Tensor | np.ndarray, fps: float, enlarge: int = 1) -> None:
    """Writes a clip (3, T, H, W) in [-1, 1], or frames (T, H, W, 3) uint8, as a looping GIF.

    All frames share one palette of 256 colours, which avoids flicker. Delays are in 10 ms units.
    """
    _check_fps(fps)
    small = frames_uint8(video)
    # the default median cut spends colours on dark noise and distorts bright strokes
    palette = Image.fromarray(np.concatenate(list(small))).quantize(
        256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
    )
    first, *rest = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in upscale(small, enlarge)
    )
    with replacing(path) as draft:
        first.save(
            draft,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=max(20, round(100 / fps) * 10),
            loop=0,
            optimize=False,
        )


def _check_fps(fps: float) -> None:
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps}: want > 0 and <= 1000")


def grid_of_clips(
    clips: Sequence[tuple[str, Tensor | np.ndarray]], columns: int = 6, least: int = 128
) -> np.ndarray:
    """Captioned clips side by side -> frames (T, H, W, 3) uint8 for `write_video` or `write_gif`.

    Each clip (3, T, H, W) is enlarged to `least` pixels; shorter clips repeat their last frame.
    """
    if not clips:
        raise ValueError("grid_of_clips: want at least one clip")
    small = [frames_uint8(video) for _, video in clips]
    shown = [upscale(f, enlargement(f.shape[1], f.shape[2], least)) for f in small]
    width, height = max(f.shape[2] for f in shown), max(f.shape[1] for f in shown)
    texts = _texts([caption for caption, _ in clips], width, most=2)
    frames = []
    for t in range(max(map(len, shown))):
        images = [Image.fromarray(clip[min(t, len(clip) - 1)]) for clip in shown]
        cells = [
            _table([[_pad(image, width, height)], [text]], (0, 6))
            for image, text in zip(images, texts, strict=True)
        ]
        table = _table(_in_rows(cells, columns), (12, 12), 12)
        frames.append(_pad(table, table.width + table.width % 2, table.height + table.height % 2))
    return np.stack(frames)


# --- contact sheets -------------------------------------------------------------------------------


def contact_sheet(path: str | Path, rows: Sequence[SheetRow]) -> None:
    """Writes `sheet` as a PNG."""
    image = sheet(rows)
    with replacing(path) as draft:
        image.save(draft, format="PNG", optimize=True)


def sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Rows of a caption and its filmstrips, one labelled column per kind of clip.

    Columns keep the order in which labels first appear; missing clips stay blank. Strips show at
    most 9 evenly spaced frames. If every clip is an image, rows become cells of a grid.
    """
    labels = list(dict.fromkeys(label for _, strips in rows for label in strips))
    if not labels:
        raise ValueError("sheet: want at least one row with a clip")
    clips = [{k: frames_uint8(v) for k, v in strips.items()} for _, strips in rows]
    count = max(min(len(c), MAX_FRAMES) for of_row in clips for c in of_row.values())
    largest = max(max(c.shape[1:3]) for of_row in clips for c in of_row.values())
    layout, least, reserved = (_grid, 128, 2 * MARGIN) if count == 1 else (_film, 96, CAPTION_WIDTH)
    side = min(
        least if largest <= least else 2 * least,
        (SHEET_WIDTH - reserved) / (count * len(labels)),
    )
    strips = [{k: _strip(c, side) for k, c in of_row.items()} for of_row in clips]
    return layout([caption for caption, _ in rows], strips, labels)


def _film(
    captions: list[str], strips: list[dict[str, Image.Image]], labels: list[str]
) -> Image.Image:
    """Rows of filmstrips with captions on the left."""
    widths = [max(s[k].width for s in strips if k in s) for k in labels]
    header = [None, *map(_label, labels, widths)]
    rows = [
        [*_texts([caption], CAPTION_WIDTH, most=6), *map(of_row.get, labels)]
        for caption, of_row in zip(captions, strips, strict=True)
    ]
    return _table([header, *rows] if any(labels) else rows, (GAP, ROW_GAP), MARGIN, is_centred=True)


def _grid(
    captions: list[str], strips: list[dict[str, Image.Image]], labels: list[str]
) -> Image.Image:
    """A grid of images with captions below; labels are above the first row."""
    width = max(s.width for of_row in strips for s in of_row.values())
    height = max(s.height for of_row in strips for s in of_row.values())
    blank = Image.new("RGB", (width, height), BACKGROUND)
    shown = [[_pad(s.get(k, blank), width, height) for k in labels] for s in strips]
    texts = _texts(captions, (width + 2) * len(labels) - 2, most=3)
    cells = [
        _table([[_table([images], (2, 0))], [text]], (0, 4))
        for images, text in zip(shown, texts, strict=True)
    ]
    most = max(1, SHEET_WIDTH // (cells[0].width + GAP))
    rows = _in_rows(cells, min(most, max(4, ceil(len(cells) ** 0.5))))
    header = _table([[_label(label, width) for label in labels]], (2, 0))
    header_rows = [[header] * len(rows[0])] if any(labels) else []
    return _table([*header_rows, *rows], (GAP, ROW_GAP), MARGIN)


def reconstruction_sheet(
    path: str | Path,
    originals: Sequence[Tensor | np.ndarray],
    reconstructions: Sequence[Tensor | np.ndarray],
    captions: Sequence[str] = (),
    gain: float = 2.0,
) -> None:
    """Writes a contact sheet: original | reconstruction | absolute difference times `gain`.

    Clips are (3, T, H, W) in [-1, 1]; each caption gets the PSNR of its clip in dB (peak 255).
    """
    if len(originals) != len(reconstructions):
        raise ValueError(f"{len(originals)} originals and {len(reconstructions)} reconstructions")
    rows = []
    for i, (x, y) in enumerate(zip(originals, reconstructions, strict=True)):
        a, b = frames_uint8(x), frames_uint8(y)
        if a.shape != b.shape:
            raise ValueError(f"original {i} has shape {a.shape}, its reconstruction {b.shape}")
        error = np.abs(a.astype(np.float32) - b)
        mse = np.square(error).mean()
        decibels = 10 * log10(255**2 / mse) if mse else inf
        caption = captions[i] if i < len(captions) else ""
        difference = np.rint(error * gain).clip(0, 255).astype(np.uint8)
        strips = {"original": a, "reconstruction": b, f"difference x{gain:g}": difference}
        rows.append((f"{caption}\n{decibels:.1f} dB".strip(), strips))
    contact_sheet(path, rows)


# --- layout ---------------------------------------------------------------------------------------


def _table(
    rows: Sequence[Sequence[Image.Image | None]],
    gaps: tuple[int, int],
    margin: int = 0,
    colour: tuple[int, int, int] = BACKGROUND,
    is_centred: bool = False,
) -> Image.Image:
    """Images in rows and columns, `gaps` (between columns, between rows) pixels apart.

    An image is at the left of its column, and at the top or in the vertical centre of its row.
    """
    columns = zip_longest(*rows)
    widths = [max(image.width for image in column if image) for column in columns]
    heights = [max(image.height for image in row if image) for row in rows]
    lefts = [margin, *(margin + np.cumsum(np.add(widths, gaps[0]))).tolist()]
    tops = [margin, *(margin + np.cumsum(np.add(heights, gaps[1]))).tolist()]
    size = lefts[-1] - gaps[0] + margin, tops[-1] - gaps[1] + margin
    table = Image.new("RGB", size, colour)
    for row, top, height in zip(rows, tops, heights, strict=False):
        for image, left in zip(row, lefts, strict=False):
            if image is not None:
                lower = (height - image.height) // 2 if is_centred else 0
                table.paste(image, (left, top + lower))
    return table


def _in_rows(cells: list[Image.Image], across: int) -> list[list[Image.Image]]:
    return [cells[i : i + across] for i in range(0, len(cells), across)]


def _pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image in the upper left corner of a larger one."""
    return ImageOps.expand(image, (0, 0, width - image.width, height - image.height), BACKGROUND)


def _texts(texts: Sequence[str], width: int, most: int) -> list[Image.Image]:
    """Texts of at most `most` lines, as images of one size."""
    lines = [wrap(text, width, TEXT, most) for text in texts]
    height = LINE * max(map(len, lines))
    return [_draw_lines(of_text, width, height) for of_text in lines]


def _label(text: str, width: int) -> Image.Image:
    return _draw_lines(wrap(text, width, TEXT, 1, bold=True), width, HEADER, bold=True)


def _draw_lines(lines: list[str], width: int, height: int, bold: bool = False) -> Image.Image:
    image = Image.new("RGB", (width, height), BACKGROUND)
    for i, line in enumerate(lines):
        draw_text(ImageDraw.Draw(image), (0, i * LINE), line, INK, TEXT, bold)
    return image


def _strip(frames: np.ndarray, side: float) -> Image.Image:
    """(T, H, W, 3) -> at most 9 frames of about `side` pixels on a grey film.

    Enlarged by an integer factor, or shrunk with Lanczos.
    """
    height, width = frames.shape[1:3]
    longest = max(height, width)
    if longest <= 1.25 * side:
        factor, method = max(1, round(side / longest)), Image.Resampling.NEAREST
        size = width * factor, height * factor
    else:
        method = Image.Resampling.LANCZOS
        size = max(1, round(width * side / longest)), max(1, round(height * side / longest))
    shown = frames[evenly_spaced(len(frames), MAX_FRAMES)]
    images = [Image.fromarray(frame).resize(size, method) for frame in shown]
    return _table([images], (FILM, 0), FILM, FRAME)
