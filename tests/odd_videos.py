"""Odd video files with known answers, written with PyAV: `ODD` is the table of all of them.

Frame i is grey, of the level 5 i; a white band at the top tells which way is up, and a black one at
the left whether it is mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

STEP = 5  # grey levels between frames
FPS = 10


@dataclass(frozen=True)
class Odd:
    """How a file is written, and what is shown of it.

    numbers: of the shown frames; size: height and width as shown; seconds, fps: of what is shown.
    """

    write: Callable[[Path], None]
    ending: str = ".mp4"
    numbers: Sequence[int] = range(20)
    size: tuple[int, int] = (48, 64)
    seconds: float = 2.0
    fps: float = FPS


def image(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(height, width, 3) uint8."""
    pixels = np.full((height, width, 3), STEP * number, np.uint8)
    pixels[: height // 6] = 255
    pixels[:, : width // 8] = 0
    return pixels


def number(pixels: np.ndarray) -> int:
    """The number of an upright frame, from the middle of its lower right quarter."""
    height, width = pixels.shape[:2]
    part = pixels[5 * height // 8 : 7 * height // 8, 5 * width // 8 : 7 * width // 8]
    return round(float(part.mean()) / STEP)


def is_upright(pixels: np.ndarray) -> bool:
    """Whether the white band is at the top, and the black one at the left."""
    height, width = pixels.shape[:2]
    middle = pixels[height // 2 :, : max(1, width // 16)].mean()
    return pixels[: height // 12, width // 2 :].mean() > 180 and middle < 60


@dataclass
class Written:
    """Settings of `encode`."""

    count: int = 20
    first: int = 0
    codec: str = "libx264"
    pixels: str = "yuv420p"
    height: int = 48
    width: int = 64
    aspect: Fraction | None = None
    options: dict[str, str] = field(default_factory=lambda: {"bf": "2", "g": "12"})
    times: list[int] | None = None  # in 1/1000 s
    last: int = 0  # duration of the last frame, in 1/1000 s
    turn: tuple[float, bool, bool] | None = None  # degrees, mirrored: left to right, top to bottom


def add_track(file: Any, about: Written, rate: int = FPS) -> Any:
    stream = file.add_stream(about.codec, rate=rate)
    stream.height, stream.width, stream.pix_fmt = about.height, about.width, about.pixels
    stream.options = dict(about.options) | ({"crf": "1"} if about.codec == "libx264" else {})
    if not about.codec.startswith("libx26"):
        stream.bit_rate = 8_000_000
    if about.aspect:
        stream.codec_context.sample_aspect_ratio = about.aspect
    if about.times:
        stream.codec_context.time_base = Fraction(1, 1000)
    if about.turn:
        degrees, hflip, vflip = about.turn
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
    return stream


def coded(pixels: np.ndarray, about: Written) -> np.ndarray:
    """What is stored so that `pixels` are shown, except for their size."""
    if about.turn is None:
        return pixels
    degrees, hflip, vflip = about.turn
    shown = pixels[:: -1 if vflip else 1, :: -1 if hflip else 1]
    if degrees % 180:  # a turned copy with the size of the stored frames
        shown = image(0, about.width, about.height)
        shown[about.width // 6 :, about.height // 8 :] = pixels[-1, -1]
        shown = shown[:: -1 if vflip else 1, :: -1 if hflip else 1]
    return np.ascontiguousarray(np.rot90(shown, -degrees // 90))


def put_frames(file: Any, stream: Any, about: Written) -> None:
    packets = []
    for i in range(about.count):
        pixels = coded(image(about.first + i, about.height, about.width), about)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=about.pixels)
        frame.pts = about.times[i] if about.times else i
        frame.time_base = Fraction(1, 1000) if about.times else Fraction(1, FPS)
        packets += stream.encode(frame)
    packets += stream.encode()
    for packet in packets:
        if about.times:
            later = [t for t in about.times if t > packet.pts]
            packet.duration = (min(later) - packet.pts) if later else about.last
        file.mux(packet)


def encode(to: Path, file_options: dict[str, str] | None = None, **settings: Any) -> None:
    about = Written(**settings)
    to.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(to), "w", options=file_options or {}) as file:
        put_frames(file, add_track(file, about), about)


def copied(
    source: Path, to: Path, start: float = 0, seconds: float | None = None, delay: float = 0,
    options: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """As `ffmpeg -ss start -i source -t seconds -c copy to`: an edit list hides what is before."""
    with av.open(str(source)) as file, av.open(str(to), "w", options=options or {}) as copy:
        stream = file.streams.video[0]
        target = copy.add_stream_from_template(stream)
        unit = stream.time_base
        file.seek(int(start / unit), stream=stream)
        for packet in file.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            if seconds is not None and packet.pts * unit >= start + seconds - 1e-6:
                continue
            move = int((delay - start) / unit)
            packet.pts, packet.dts, packet.stream = packet.pts + move, packet.dts + move, target
            copy.mux(packet)


def trimmed(to: Path, copy_options: dict[str, str] | None = None, **settings: Any) -> None:
    """Frames 17 to 46 of 50, from the key frame before them."""
    whole = to.with_name(f"whole-{to.stem}.mp4")
    encode(whole, count=50, **{"options": {"bf": "2", "g": "36"}} | settings)
    copied(whole, to, 1.7, 3.0, options=copy_options)
    whole.unlink()


def with_cover(to: Path, codec: str = "png") -> None:
    """A cover image as the first video track."""
    about = Written()
    with av.open(str(to), "w") as file:
        pixels = "rgb24" if codec == "png" else "yuvj420p"
        cover = file.add_stream(codec, rate=1)
        cover.height, cover.width, cover.pix_fmt = 200, 300, pixels
        cover.disposition = Disposition.attached_pic
        stream = add_track(file, about)
        cover_image = av.VideoFrame.from_ndarray(image(45, 200, 300), format="rgb24")
        for packet in [*cover.encode(cover_image.reformat(format=pixels)), *cover.encode()]:
            file.mux(packet)
        put_frames(file, stream, about)


def with_two_tracks(to: Path, marks: bool = True) -> None:
    """A small preview comes first; the larger track is the default one."""
    preview, main = Written(height=24, width=32, first=25), Written()
    with av.open(str(to), "w") as file:
        streams = [add_track(file, about) for about in (preview, main)]
        if marks:
            streams[1].disposition = Disposition.default
        for about, stream in zip((preview, main), streams, strict=True):
            put_frames(file, stream, about)


def with_sound_first(to: Path) -> None:
    about = Written()
    with av.open(str(to), "w") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        stream = add_track(file, about)
        put_frames(file, stream, about)
        for i in range(64):  # twice as long
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            file.mux(sound.encode(frame))
        file.mux(sound.encode())


def with_hidden_tail(to: Path) -> None:
    """The edit list ends after 1.5 of 2 seconds, as a phone's trimming does."""
    encode(to, options={"bf": "0", "g": "12"})
    content = bytearray(to.read_bytes())
    at = content.find(b"elst")
    assert at > 0 and int.from_bytes(content[at + 8 : at + 12]) == 1
    content[at + 12 : at + 16] = (1500).to_bytes(4)  # in the movie's 1/1000 s
    to.write_bytes(bytes(content))


def with_bad_title(to: Path) -> None:
    """A title in Latin-1."""
    with av.open(str(to), "w") as file:
        file.metadata["title"] = "Caf#"
        about = Written()
        put_frames(file, add_track(file, about), about)
    content = to.read_bytes()
    assert content.count(b"Caf#") == 1
    to.write_bytes(content.replace(b"Caf#", b"Caf\xe9"))


def with_hidden_frame(to: Path) -> None:
    """VP8 whose frame 7 is not to be shown, as those that only help to decode others."""
    whole = to.with_name("whole.webm")
    encode(whole, codec="libvpx", options={"auto-alt-ref": "0"})
    with av.open(str(whole)) as file, av.open(str(to), "w") as copy:
        stream = file.streams.video[0]
        target = copy.add_stream_from_template(stream)
        for i, packet in enumerate(p for p in file.demux(stream) if p.size):
            content = bytearray(bytes(packet))
            content[0] &= 0xFF if i != 7 else 0xEF  # RFC 6386, section 9.1: show_frame
            changed = av.Packet(bytes(content))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, target
            copy.mux(changed)
    whole.unlink()


def from_open_group(to: Path) -> None:
    """HEVC that starts with a key frame whose leading frames need the one before it."""
    whole = to.with_name(f"whole{to.suffix}")
    params = "log-level=none:open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
    encode(whole, count=30, codec="libx265", options={"x265-params": params})
    with av.open(str(whole)) as file, av.open(str(to), "w") as copy:
        stream = file.streams.video[0]
        target, keys = copy.add_stream_from_template(stream), 0
        for packet in file.demux(stream):
            keys += packet.size > 0 and packet.is_keyframe
            if packet.size and keys > 1:
                packet.stream = target
                copy.mux(packet)
    whole.unlink()


def made(**settings: Any) -> Callable[[Path], None]:
    return lambda to: encode(to, **settings)


def cut(copy_options: dict[str, str] | None = None, **settings: Any) -> Callable[[Path], None]:
    return lambda to: trimmed(to, copy_options, **settings)


def delayed(to: Path) -> None:
    whole = to.with_name("whole.mp4")
    encode(whole)
    copied(whole, to, delay=3.0)
    whole.unlink()


NO_B = {"bf": "0", "g": "36"}
GAPS = [0, 50, 100, 400, 450, 500, 900, 950, 1000, 1100]
SLOW = [0, 100, 200, 300, 400]
WIDE = Fraction(2, 1)
TRIMMED = {"numbers": range(17, 47), "seconds": 3.0}

ODD: dict[str, Odd] = {
    # edit lists
    "trimmed": Odd(cut(), **TRIMMED),
    "trimmed without reordering": Odd(cut(options=NO_B), **TRIMMED),
    "trimmed, index first": Odd(cut({"movflags": "faststart"}), **TRIMMED),
    "trimmed mov": Odd(cut(), ".mov", **TRIMMED),
    "trimmed m4v": Odd(cut(), ".m4v", **TRIMMED),
    "trimmed, wide pixels": Odd(cut(aspect=WIDE), size=(48, 128), **TRIMMED),
    "hidden tail": Odd(with_hidden_tail, numbers=range(15), seconds=1.5),
    "delayed": Odd(delayed),
    # turned and mirrored
    "turned 90": Odd(made(turn=(90, False, False)), size=(64, 48)),
    "turned 180": Odd(made(turn=(180, False, False))),
    "turned 270": Odd(made(turn=(270, False, False)), ".mov", size=(64, 48)),
    "mirrored": Odd(made(turn=(0, True, False))),
    "turned and mirrored": Odd(made(turn=(90, True, False)), size=(64, 48)),
    # pixels that are not square
    "wide pixels": Odd(made(aspect=WIDE), size=(48, 128)),
    "wide pixels mkv": Odd(made(aspect=WIDE), ".mkv", size=(48, 128)),
    "wide pixels avi": Odd(
        made(aspect=WIDE, codec="mpeg4", options={}), ".avi", size=(48, 128)
    ),
    "narrow pixels": Odd(made(aspect=Fraction(1, 2)), size=(48, 32)),
    "dv pixels": Odd(made(aspect=Fraction(16, 15)), ".mov", size=(48, 68)),
    "wide pixels, turned": Odd(
        made(aspect=WIDE, turn=(90, False, False)), size=(128, 48)
    ),
    # times
    "variable": Odd(made(count=10, times=GAPS, last=100), numbers=range(10), seconds=1.2,
                    fps=10 / 1.2),
    "variable mkv": Odd(made(count=10, times=GAPS, last=100), ".mkv", numbers=range(10),
                        seconds=1.2, fps=10 / 1.2),
    "long last frame": Odd(made(count=5, times=SLOW, last=2000, options=NO_B), numbers=range(5),
                           seconds=2.4, fps=5 / 2.4),
    "long last frame mkv": Odd(made(count=5, times=SLOW, last=2000, options=NO_B), ".mkv",
                               numbers=range(5), seconds=2.4, fps=5 / 2.4),
    "one frame": Odd(made(count=1), numbers=range(1), seconds=0.1),
    # tracks
    "cover": Odd(with_cover),
    "cover jpeg": Odd(lambda to: with_cover(to, "mjpeg"), ".mp4"),
    "two tracks": Odd(with_two_tracks),
    "two tracks mkv": Odd(with_two_tracks, ".mkv"),
    "sound first": Odd(with_sound_first),
    "sound first mov": Odd(with_sound_first, ".mov"),
    # containers and codecs
    "mkv": Odd(made(), ".mkv"),
    "mov": Odd(made(), ".mov"),
    "m4v": Odd(made(codec="mpeg4", options={}), ".m4v"),
    "webm": Odd(made(codec="libvpx-vp9", options={}), ".webm"),
    "webm with a hidden frame": Odd(
        with_hidden_frame, ".webm", numbers=[i for i in range(20) if i != 7], fps=9.5
    ),
    "avi": Odd(made(codec="mpeg4", options={}), ".avi"),
    "avi with reordering": Odd(made(), ".avi"),
    "avi of jpegs": Odd(made(codec="mjpeg", pixels="yuvj420p", options={}), ".avi"),
    "gif": Odd(made(codec="gif", pixels="rgb8", options={}), ".gif"),
    "fragments": Odd(made(file_options={"movflags": "frag_keyframe"}, options=NO_B | {"g": "5"})),
    "fragments alone": Odd(
        made(file_options={"movflags": "frag_keyframe+empty_moov"}, options=NO_B | {"g": "5"})
    ),
    "odd size": Odd(made(height=47, width=63, pixels="yuv444p"), size=(47, 63)),
    "deep colour": Odd(made(codec="ffv1", pixels="yuv422p10le", options={}), ".mkv"),
    "open group": Odd(from_open_group, ".mkv", numbers=range(12, 30), seconds=1.8),
    "open group mp4": Odd(from_open_group, numbers=range(12, 30), seconds=1.8),
    "title in Latin-1": Odd(with_bad_title),
}  # fmt: skip
