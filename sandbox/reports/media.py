"""Videos, images, animated walls and contact sheets of clips.

Clips are (3, T, H, W) in [-1, 1]; an image has T = 1. Small clips are enlarged by integer factors
with nearest neighbour, so that pixels stay sharp squares. Files are written atomically.

PyAV and Pillow do the encoding. The sheet layout is our own: matplotlib would resample pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sandbox.storage import atomic
from sandbox.storage.atomic import storing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from torch import Tensor

BACKGROUND, FRAME, INK = (20, 20, 22), (58, 58, 62), (236, 236, 238)
NAN = (255, 0, 255)  # magenta, which is easier to notice than black
MAX_FRAMES = 9  # of one strip
SHEET_WIDTH = 1900  # target, in pixels
CAPTION_WIDTH, MARGIN, HEADER, GAP, ROW_GAP, FILM = 190, 18, 28, 18, 6, 3  # pixels
TEXT, LINE = 14, 19  # font size, line height
ELLIPSIS = "..."
BT709 = 1  # code of ITU-T H.273 for matrix, primaries and transfer
LIMITED = 1  # AVCOL_RANGE_MPEG: luma 16..235


# --- atomic files ---------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file, renamed to `path` when the block succeeds. Creates the folder.

    An exception leaves `path` unchanged. Raises StorageError where the file cannot be written.
    """
    path = Path(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as draft:
            yield draft


# --- pixels ---------------------------------------------------------------------------------------


def frames_uint8(video: Tensor | np.ndarray) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8, rounded and clamped; NaN becomes magenta.

    -1 is 0 and 1 is 255: u / 127.5 - 1 maps back to u. (T, H, W, 3) uint8 is returned unchanged.
    """
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        if video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(f"frames have shape {video.shape}: want (T, H, W, 3)")
        return video
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"video has shape {tuple(video.shape)}: want (3, T, H, W)")
    if isinstance(video, np.ndarray):
        pixels = video.astype(np.float32)
    else:
        pixels = video.detach().float().cpu().numpy()  # bfloat16 has no numpy type
    pixels = pixels.transpose(1, 2, 3, 0)  # (T, H, W, 3)
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


def enlarged(frames: np.ndarray, factor: int) -> np.ndarray:
    """(T, H, W, 3) -> (T, factor * H, factor * W, 3), nearest neighbour."""
    if factor < 1:
        raise ValueError(f"enlarge={factor}: want >= 1")
    return frames.repeat(factor, 1).repeat(factor, 2)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spaced, including the first and the last."""
    if count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


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
    frames = enlarged(frames_uint8(video), enlarge)
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
    from PIL import Image

    frames = frames_uint8(clip)
    if len(frames) != 1:
        raise ValueError(f"clip has {len(frames)} frames: want 1; use write_video")
    with replacing(path) as draft:
        Image.fromarray(frames[0]).save(draft, format="PNG", optimize=True)


def write_gif(path: str | Path, video: Tensor | np.ndarray, fps: float, enlarge: int = 1) -> None:
    """Writes a clip (3, T, H, W) in [-1, 1], or frames (T, H, W, 3) uint8, as a looping GIF.

    All frames share one palette of 256 colours, which avoids flicker. Delays are in 10 ms units.
    """
    from PIL import Image

    _check_fps(fps)
    small = frames_uint8(video)
    # the default median cut spends colours on dark noise and distorts bright strokes
    palette = Image.fromarray(np.concatenate(list(small))).quantize(
        256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
    )
    first, *rest = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in enlarged(small, enlarge)
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


def wall(
    clips: Sequence[tuple[str, Tensor | np.ndarray]], columns: int = 6, least: int = 128
) -> np.ndarray:
    """Captioned clips side by side -> frames (T, H, W, 3) uint8 for `write_video` or `write_gif`.

    Each clip (3, T, H, W) is enlarged to `least` pixels; shorter clips repeat their last frame.
    """
    from PIL import Image, ImageDraw

    if not clips:
        raise ValueError("wall: want at least one clip")
    small = [frames_uint8(video) for _, video in clips]
    shown = [enlarged(f, enlargement(f.shape[1], f.shape[2], least)) for f in small]
    gap = 12
    columns = min(columns, len(shown))
    width, height = max(f.shape[2] for f in shown), max(f.shape[1] for f in shown)
    texts = [wrapped(caption, width, TEXT, most=2) for caption, _ in clips]
    cell = height + 6 + LINE * max(len(t) for t in texts) + gap
    shape = (gap + ceil(len(shown) / columns) * cell, gap + columns * (width + gap))
    canvas = Image.new("RGB", (shape[1] + shape[1] % 2, shape[0] + shape[0] % 2), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    places = [
        (gap + i // columns * cell, gap + i % columns * (width + gap)) for i in range(len(shown))
    ]
    for (top, left), lines in zip(places, texts, strict=True):
        _lines(draw, lines, left, top + height + 6)
    frames = np.repeat(np.asarray(canvas)[None], max(len(f) for f in shown), 0)
    for (top, left), clip in zip(places, shown, strict=True):
        for t, frame in enumerate(frames):
            frame[top : top + clip.shape[1], left : left + clip.shape[2]] = clip[
                min(t, len(clip) - 1)
            ]
    return frames


# --- text -----------------------------------------------------------------------------------------


@cache
def font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans from matplotlib: Latin, Greek and Cyrillic; other scripts show as boxes."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def wrapped(text: str, width: int, size: int, most: int, bold: bool = False) -> list[str]:
    """Lines of at most `width` pixels; text beyond `most` lines is cut with an ellipsis."""

    def fits(line: str) -> bool:
        return font(size, bold).getlength(line) <= width

    lines: list[str] = []
    for paragraph in text[: (most + 1) * width].splitlines():  # a character has a pixel or more
        line = ""
        for word in paragraph.split():
            if fits(f"{line} {word}".strip()):
                line = f"{line} {word}".strip()
                continue
            lines += [line] if line else []
            while len(word) > 1 and not fits(word):  # wider than the column: cut anywhere
                cut = next((n for n in range(min(len(word), width), 1, -1) if fits(word[:n])), 1)
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and not fits(last + ELLIPSIS):
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + ELLIPSIS]


# --- contact sheets -------------------------------------------------------------------------------


@dataclass
class SheetRow:
    """A row of a contact sheet: a caption, and column label -> clip (3, T, H, W)."""

    caption: str
    strips: dict[str, Tensor | np.ndarray] = field(default_factory=dict)


def contact_sheet(path: str | Path, rows: Sequence[SheetRow]) -> None:
    """Writes `sheet` as a PNG."""
    image = sheet(rows)
    with replacing(path) as draft:
        image.save(draft, format="PNG", optimize=True)


def sheet(rows: Sequence[SheetRow]) -> Image:
    """Rows of a caption and its filmstrips, one labelled column per kind of clip.

    Columns keep the order in which labels first appear; missing clips stay blank. Strips show at
    most 9 evenly spaced frames. If every clip is an image, rows become cells of a grid.
    """
    labels = list(dict.fromkeys(label for row in rows for label in row.strips))
    if not labels:
        raise ValueError("sheet: want at least one row with a clip")
    clips = [{k: frames_uint8(v) for k, v in row.strips.items()} for row in rows]
    images = all(len(clip) == 1 for strips in clips for clip in strips.values())
    draw = _grid if images else _film
    return draw([row.caption for row in rows], clips, labels)


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
        caption = captions[i] if i < len(captions) else ""
        difference = np.rint(error * gain).clip(0, 255).astype(np.uint8)
        strips = {"original": a, "reconstruction": b, f"difference x{gain:g}": difference}
        rows.append(SheetRow(f"{caption}\n{_psnr(error):.1f} dB".strip(), strips))
    contact_sheet(path, rows)


def _psnr(error: np.ndarray) -> float:
    mse = float(np.square(error).mean())
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def _film(captions: list[str], clips: list[dict[str, np.ndarray]], labels: list[str]) -> Image:
    """Rows of filmstrips with captions on the left."""
    from PIL import Image, ImageDraw

    count = max(min(len(c), MAX_FRAMES) for strips in clips for c in strips.values())
    largest = max(max(c.shape[1:3]) for strips in clips for c in strips.values())
    most = 96 if largest <= 96 else 192
    side = min(most, (SHEET_WIDTH - CAPTION_WIDTH) / (count * len(labels)))
    drawn = [{k: _strip(c, side) for k, c in strips.items()} for strips in clips]
    texts = [wrapped(caption, CAPTION_WIDTH, TEXT, most=6) for caption in captions]
    heights = [
        max(LINE * len(text), *(s.shape[0] for s in strips.values()), 0)
        for text, strips in zip(texts, drawn, strict=True)
    ]
    widths = [max(s[k].shape[1] for s in drawn if k in s) for k in labels]
    lefts = np.cumsum([MARGIN + CAPTION_WIDTH + GAP] + [w + GAP for w in widths]).tolist()
    header = HEADER if any(labels) else 0
    tops = np.cumsum([MARGIN + header] + [h + ROW_GAP for h in heights]).tolist()
    sheet = Image.new("RGB", (lefts[-1] - GAP + MARGIN, tops[-1] - ROW_GAP + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for label, left, width in zip(labels, lefts, widths, strict=False):
        draw.text((left, MARGIN), _label(label, width), INK, font(TEXT, True))
    for text, strips, top, height in zip(texts, drawn, tops, heights, strict=False):
        _lines(draw, text, MARGIN, top + (height - LINE * len(text)) // 2)
        for label, left in zip(labels, lefts, strict=False):
            if label in strips:
                place = (left, top + (height - strips[label].shape[0]) // 2)
                sheet.paste(Image.fromarray(strips[label]), place)
    return sheet


def _grid(captions: list[str], clips: list[dict[str, np.ndarray]], labels: list[str]) -> Image:
    """A grid of images with captions below; labels are above the first row."""
    from PIL import Image, ImageDraw

    largest = max(max(c.shape[1:3]) for strips in clips for c in strips.values())
    side = min(128 if largest <= 128 else 256, (SHEET_WIDTH - 2 * MARGIN) / len(labels))
    drawn = [{k: _strip(c, side) for k, c in strips.items()} for strips in clips]
    width = max(s.shape[1] for strips in drawn for s in strips.values())
    height = max(s.shape[0] for strips in drawn for s in strips.values())
    cell = (width + 2) * len(labels) - 2
    across = min(max(1, SHEET_WIDTH // (cell + GAP)), max(4, ceil(len(drawn) ** 0.5)), len(drawn))
    texts = [wrapped(caption, cell, TEXT, most=3) for caption in captions]
    pitch = height + 4 + LINE * max(len(t) for t in texts) + ROW_GAP
    header = HEADER if any(labels) else 0
    size = (
        2 * MARGIN - GAP + across * (cell + GAP),
        2 * MARGIN - ROW_GAP + header + ceil(len(drawn) / across) * pitch,
    )
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (text, strips) in enumerate(zip(texts, drawn, strict=True)):
        left, top = MARGIN + i % across * (cell + GAP), MARGIN + header + i // across * pitch
        for j, label in enumerate(labels):
            if i < across and header:
                draw.text(
                    (left + j * (width + 2), MARGIN), _label(label, width), INK, font(TEXT, True)
                )
            if label in strips:
                sheet.paste(Image.fromarray(strips[label]), (left + j * (width + 2), top))
        _lines(draw, text, left, top + height + 4)
    return sheet


def _label(text: str, width: int) -> str:
    return " ".join(wrapped(text, width, TEXT, most=1, bold=True))


def _lines(draw: ImageDraw, lines: list[str], left: int, top: int) -> None:
    for i, line in enumerate(lines):
        draw.text((left, top + i * LINE), line, INK, font(TEXT))


def _strip(frames: np.ndarray, side: float) -> np.ndarray:
    """(T, H, W, 3) -> (H', W', 3): at most 9 frames of about `side` pixels on a grey film."""
    shown = _fitted(frames[evenly(len(frames), MAX_FRAMES)], side)  # (T', h, w, 3)
    count, height, width = shown.shape[:3]
    film = np.empty((height + 2 * FILM, count * (width + FILM) + FILM, 3), np.uint8)
    film[:] = FRAME
    for i, frame in enumerate(shown):
        left = FILM + i * (width + FILM)
        film[FILM : FILM + height, left : left + width] = frame
    return film


def _fitted(frames: np.ndarray, side: float) -> np.ndarray:
    """Frames of about `side` pixels: enlarged by an integer factor, or shrunk with Lanczos."""
    from PIL import Image

    height, width = frames.shape[1:3]
    longest = max(height, width)
    if longest <= 1.25 * side:
        return enlarged(frames, max(1, round(side / longest)))
    size = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
    shrunk = [Image.fromarray(f).resize(size, Image.Resampling.LANCZOS) for f in frames]
    return np.stack([np.asarray(f) for f in shrunk])
