"""Video files: what is shown of odd ones, counted the same in preparing, buckets and readers.

The judges are the way in which each file is written, PyAV's full decode, and ffprobe.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from plugins._blocks.video_io import media_size, read_frames
from sandbox.contracts import BadItem
from sandbox.data.video_files import VideoClip, probe
from tests.odd_videos import ODD, Odd, encode, is_upright, number, trimmed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All odd files, each at the name of its entry."""
    to = tmp_path_factory.mktemp("odd")
    for name, odd in ODD.items():
        odd.write(to / f"{name}{odd.ending}")
    return to


def each(test):
    return pytest.mark.parametrize("name", ODD)(test)


def of(folder: Path, name: str) -> tuple[Path, Odd]:
    return folder / f"{name}{ODD[name].ending}", ODD[name]


@each
def test_preparing_measures_what_is_shown(folder, name):
    path, odd = of(folder, name)
    info = probe(path)
    assert (info.frames, info.height, info.width) == (len(odd.numbers), *odd.size)
    assert info.seconds == pytest.approx(odd.seconds, abs=0.002)
    assert info.fps == pytest.approx(odd.fps, rel=0.001)
    assert info.variable == (name.startswith("variable") or "hidden frame" in name)


@each
def test_preparing_shows_every_frame_upright(folder, name):
    path, odd = of(folder, name)
    frames = [*VideoClip(path, probe(path)).stream()]
    assert [number(x) for _, x in frames] == list(odd.numbers)
    assert all(x.shape == (*odd.size, 3) and is_upright(x) for _, x in frames)
    assert frames[0][0] == 0


@each
def test_buckets_count_what_is_shown(folder, name):
    path, odd = of(folder, name)
    assert media_size(path) == (len(odd.numbers), *odd.size)


@each
def test_readers_pick_from_what_is_shown(folder, name):
    path, odd = of(folder, name)
    count = len(odd.numbers)
    for wanted in ([*range(count)], [0], [count // 2], [count - 1], [*range(count // 3, count, 4)]):
        got = []

        def pick(frames: int, fps: float, wanted=wanted, got=got) -> list[int]:
            got.append((frames, fps))
            return wanted

        images, fps = read_frames(path, pick, np.asarray)
        assert [number(x) for x in images] == [odd.numbers[i] for i in wanted]
        assert all(x.shape == (*odd.size, 3) and is_upright(x) for x in images)
        assert got == [(count, fps)]
        assert fps == pytest.approx(odd.fps, rel=0.001)


@each
def test_a_span_starts_at_its_frame(folder, name):
    path, _ = of(folder, name)
    info, all_frames = probe(path), [*VideoClip(path, probe(path)).stream()]
    for at, image in all_frames[:: max(1, len(all_frames) // 4)]:
        _, first = next(VideoClip(path, info, at).stream())
        assert number(first) == number(image)


@each
def test_full_decoding_gives_as_many_frames(folder, name):
    path, odd = of(folder, name)
    with av.open(str(path), metadata_errors="ignore") as file:
        best = file.streams.best("video")
        assert best is not None
        decoded = [number(f.to_ndarray(format="rgb24")) for f in file.decode(best)]
    assert len(decoded) == len(odd.numbers)


DURATIONS = ("duration_time", "pkt_duration_time")  # from ffprobe 6 on, and before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")
@each
def test_ffprobe_counts_and_measures_the_same(folder, name):
    path, _ = of(folder, name)
    with av.open(str(path), metadata_errors="ignore") as file:
        best = file.streams.best("video")
        assert best is not None
        index = str(best.index)
    words = ["ffprobe", "-v", "error", "-select_streams", index, "-count_frames", "-of", "json"]
    entries = "stream=nb_read_frames,width,height,sample_aspect_ratio:stream_side_data=rotation"
    said = subprocess.run(
        [*words, "-show_entries", f"{entries}:frame=pts_time,{','.join(DURATIONS)}", "-show_frames",
         str(path)], capture_output=True, check=True, text=True,
    )  # fmt: skip
    found = json.loads(said.stdout)
    (stream,), info = found["streams"], probe(path)
    assert info.frames == int(stream["nb_read_frames"])
    shape = stream.get("sample_aspect_ratio", "1:1")
    above, below = map(int, ("1:1" if shape in ("N/A", "0:1") else shape).split(":"))
    size = stream["height"], max(1, round(stream["width"] * above / below))
    turns = [d["rotation"] for d in stream.get("side_data_list", []) if "rotation" in d]
    assert (info.height, info.width) == (size[::-1] if sum(turns) % 180 else size)
    times = [float(f["pts_time"]) for f in found["frames"] if "pts_time" in f]
    if times == sorted(times) and len(times) == info.frames:
        known = [x for d in DURATIONS if (x := found["frames"][-1].get(d, "N/A")) != "N/A"]
        longest = max((b - a for a, b in pairwise(times)), default=0)
        low, high = (float(known[0]),) * 2 if known else (0, longest)
        assert low - 0.05 <= info.seconds - (times[-1] - times[0]) <= high + 0.05


# --- files that are cut off, or are something else ------------------------------------------------


INDEX_FIRST = {"movflags": "faststart"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def index_first(to: Path) -> None:
    encode(to, INDEX_FIRST)


CUT = {  # what is cut off, and its ending
    "mp4": (index_first, ".mp4"),
    "mov": (index_first, ".mov"),
    "trimmed": (lambda to: trimmed(to, INDEX_FIRST), ".mp4"),
    "index last": (encode, ".mp4"),
    "mkv": (encode, ".mkv"),
    "avi": (lambda to: encode(to, codec="mpeg4", options={}), ".avi"),
    "webm": (lambda to: encode(to, codec="libvpx-vp9", options={}), ".webm"),
}


@pytest.mark.parametrize("part", [0.3, 0.6, 0.75])
@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_off_is_left_out(tmp_path, name, part):
    write, ending = CUT[name]
    path = tmp_path / f"whole{ending}"
    write(path)
    probe(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(BadItem, match=r"is truncated|cannot be decoded|has no|corrupt"):
        info = probe(path)
        for _ in VideoClip(path, info).stream():
            pass


@pytest.mark.parametrize("write", [encode, trimmed], ids=["mp4", "trimmed"])
def test_a_cut_off_file_has_the_same_count_for_buckets_and_readers(tmp_path, write):
    path = tmp_path / "whole.mp4"
    write(path, INDEX_FIRST, options={"bf": "0", "g": "4"})
    whole = media_size(path)[0]
    path.write_bytes(path.read_bytes()[:-200])
    got = []
    read_frames(path, lambda count, fps: got.append(count) or [0], np.asarray)
    assert got == [media_size(path)[0]]
    assert 2 < got[0] < whole


def test_a_matroska_named_mp4_and_others_are_read_by_their_content(tmp_path):
    for ending, other in ((".mkv", ".mp4"), (".mp4", ".avi"), (".webm", ".mov"), (".gif", ".mp4")):
        codec = {".webm": "libvpx-vp9", ".gif": "gif"}.get(ending, "libx264")
        path = tmp_path / f"a{ending}"
        encode(path, codec=codec, pixels="rgb8" if codec == "gif" else "yuv420p", options={})
        named = path.rename(tmp_path / f"{ending[1:]}{other}")
        assert media_size(named) == (20, 48, 64)


OTHERS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"\n<!DOCTYPE html><html><body>Not found</body></html>",
    "a WebP image": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
    "a PNG image": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "a playlist": b"#EXTM3U\nhttp://example.org/a.mp4\n",
    "a zip archive": b"PK\x03\x04\x14\x00",
    "empty": b"",
    "starts with zeros": bytes(5000),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_that_is_no_video_is_named(tmp_path, what):
    path = tmp_path / "a.mp4"
    path.write_bytes(OTHERS[what])
    with pytest.raises(BadItem, match=what):
        media_size(path)


def test_pixels_of_a_senseless_shape_are_refused(tmp_path):
    from fractions import Fraction

    encode(tmp_path / "a.mp4", aspect=Fraction(40, 1))
    with pytest.raises(BadItem, match="40:1"):
        probe(tmp_path / "a.mp4")


def test_a_song_with_a_cover_is_no_video(tmp_path):
    from av.stream import Disposition

    with av.open(str(tmp_path / "song.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        cover = file.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        cover_image = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        for packet in [*cover.encode(cover_image), *cover.encode()]:
            file.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        for packet in [*sound.encode(frame), *sound.encode()]:
            file.mux(packet)
    with pytest.raises(BadItem, match="has no video; it has only a cover image"):
        probe(tmp_path / "song.mp4")
