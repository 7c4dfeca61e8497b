"""Raw videos with known answers: scenes, motion, writing, copies, and files that are broken."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from sandbox.reports.media import write_video

FPS = 10.0


def texture(seed: int, height: int, width: int, detail: float = 0.4) -> np.ndarray:
    """(height, width, 3) uint8: blobs and grain in colours unlike those of other seeds."""
    import cv2

    draw = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 0.9), (9, 0.6), (40, detail)):
        noise = draw.random((cells, cells, 3), np.float32) - 0.5
        picture += weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    tint = draw.random(3).astype(np.float32) * 120 + 60
    return (tint + 110 * picture).clip(0, 255).astype(np.uint8)


def scene(
    seed: int,
    seconds: float,
    speed: tuple[float, float] = (2.0, 0.0),
    height: int = 64,
    width: int = 96,
    fps: float = FPS,
    detail: float = 0.4,
) -> np.ndarray:
    """(T, height, width, 3): a picture that moves by `speed` = (x, y) pixels a frame."""
    count = round(seconds * fps)
    far = [abs(round(s * count)) + 1 for s in speed]
    whole = texture(seed, height + far[1], width + far[0], detail)
    frames = []
    for i in range(count):
        left, top = (round(abs(s) * i) for s in speed)
        left = left if speed[0] >= 0 else far[0] - left
        top = top if speed[1] >= 0 else far[1] - top
        frames.append(whole[top : top + height, left : left + width])
    return np.stack(frames)


def write(path: Path, frames: np.ndarray, fps: float = FPS, crf: int = 10) -> Path:
    write_video(path, frames, fps, crf=crf)
    return path


def written(frames: np.ndarray, text: str, scale: float = 1.0) -> np.ndarray:
    """The same with white writing, and a black edge around it, in the middle."""
    import cv2

    out = frames.copy()
    (w, h), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, scale, 2)
    at = (max(2, (frames.shape[2] - w) // 2), (frames.shape[1] + h) // 2)
    for frame in out:
        for colour, thick in (((0, 0, 0), 6), ((255, 255, 255), 2)):
            cv2.putText(frame, text, at, cv2.FONT_HERSHEY_DUPLEX, scale, colour, thick, cv2.LINE_AA)
    return out


def write_strange(
    path: Path,
    frames: np.ndarray,
    times: list[int] | None = None,
    rotation: int = 0,
    codec: str = "libx264",
    pixels: str = "yuv420p",
) -> Path:
    """A file with frames at `times` (in 1/1000 s), turned, or of another codec or pixel format."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=Fraction(int(FPS)))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            stream.options = {"bf": "0", "threads": "1"}
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = times[i] if times else round(i * 1000 / FPS)
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame.reformat(format=pixels)))
        file.mux(stream.encode())
    return path


def precision_recall(want: set, found: set) -> tuple[float, float]:
    """Parts of what is found that is right, and of what is right that is found."""
    return len(want & found) / max(len(found), 1), len(want & found) / max(len(want), 1)
