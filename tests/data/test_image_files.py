"""Image files of many kinds as 8-bit sRGB: values by hand, and by Pillow's own functions."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from plugins.data.celebahq import CelebAHQ
from plugins.data.cogvideox_folder import CogVideoXFolder
from plugins.data.easyanimate_json import EasyAnimateJSON
from plugins.data.video_folder import VideoFolder
from plugins.data.webdataset import MEDIA, WebDataset
from sandbox.contracts import BadItem, Clip, ConfigError
from sandbox.data.image_files import FORMATS, IMAGES, image_size, read_rgb
from sandbox.data.randomness import keyed
from sandbox.evaluation.prompts import load_image
from tests.plugins.data.test_video_folder import write_video

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
ALPHA = np.repeat(np.array([0, 64, 128, 255], np.uint8), 64).reshape(16, 16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return np.rint(colours * weight + 255 * (1 - weight)).astype(np.uint8)


def renamed(icc: bytes, *names: tuple[bytes, bytes], space: bytes | None = None) -> bytes:
    """A profile with other names of its tags, and of its colour space."""
    count = struct.unpack(">I", icc[128:132])[0]
    table = icc[132 : 132 + 12 * count]
    entries = [table[i : i + 12] for i in range(0, len(table), 12)]
    entries = [dict(names).get(e[:4], e[:4]) + e[4:] for e in entries]
    head = icc[:128] if space is None else icc[:16] + space + icc[20:128]
    return head + icc[128:132] + b"".join(entries) + icc[132 + 12 * count :]


SWAPPED = renamed(SRGB, (b"rXYZ", b"gXYZ"), (b"gXYZ", b"rXYZ"))  # red is green, and the reverse


def png16(channels: int, samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits, of any number of channels: Pillow writes grey ones only."""
    height, width = samples.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = samples.astype(">u2").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts
    )


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgba(colours: np.ndarray = NOISE, alpha: np.ndarray = ALPHA) -> Image.Image:
    return Image.fromarray(np.dstack([colours, alpha]))


def palette(kind: str, transparency: int | bytes) -> bytes:
    """Index i is the colour (i, 0, 255 - i)."""
    image = Image.fromarray(RAMP, "L").convert("P")
    image.putpalette([v for i in range(256) for v in (i, 0, 255 - i)])
    return encoded(image, kind, transparency=transparency)


PALETTE = np.dstack([RAMP, np.zeros_like(RAMP), 255 - RAMP])


def rotated(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    return encoded(Image.fromarray(RAMP[:8]).convert("RGB"), kind, exif=exif,
                   **options.get(kind, {}))  # fmt: skip


def tiff(image: Image.Image, **tags: int) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[getattr(TiffImagePlugin, name)] = value
    return encoded(image, "TIFF", tiffinfo=info)


def f32(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


def i32(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.int32)), "TIFF")


def plain_tiff(data: bytes, bits: int, signed: bool = False) -> bytes:
    """16x16 grey pixels of a kind that Pillow does not write."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, 1), (273, 134), (277, 1),
            (278, 16), (279, len(data)), *([(339, 2)] if signed else [])]  # fmt: skip
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory += bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory)[:134].ljust(134, b"\0") + data


def twelve_bits() -> bytes:
    levels = np.rint(RAMP * (4095 / 255)).astype(int).reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in levels.tolist())


DEEP_RGB = np.dstack([WIDE, WIDE[::-1], np.full_like(WIDE, 32896)])
HALVES = WIDE.astype(float) / 65535
KEYED = np.where(RAMP == 7, 255, RAMP)  # level 7 is transparent

# name, bytes of the file, the wanted pixels, tolerance in levels
KINDS: list[tuple[str, Callable[[], bytes], np.ndarray, int]] = [
    ("rgb.png", lambda: encoded(Image.fromarray(NOISE), "PNG"), NOISE, 0),
    ("rgb.bmp", lambda: encoded(Image.fromarray(NOISE), "BMP"), NOISE, 0),
    ("rgb.tiff", lambda: encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw"), NOISE, 0),
    ("rgb.webp", lambda: encoded(Image.fromarray(NOISE), "WEBP", lossless=True), NOISE, 0),
    ("rgb.avif", lambda: encoded(Image.new("RGB", (16, 16), (200, 30, 90)), "AVIF", quality=100),
     np.full((16, 16, 3), (200, 30, 90), np.uint8), 3),
    ("grey.jfif", lambda: encoded(Image.fromarray(RAMP), "JPEG", quality=100), grey(RAMP), 2),
    ("bits.png", lambda: encoded(Image.fromarray(RAMP > 99), "PNG"), grey(255 * (RAMP > 99)), 0),
    ("webp_named.jpg", lambda: encoded(Image.fromarray(NOISE), "WEBP", lossless=True), NOISE, 0),
    # bit depth
    ("grey16.png", lambda: encoded(Image.fromarray(WIDE), "PNG"), grey(RAMP), 0),
    ("grey16.tif", lambda: encoded(Image.fromarray(WIDE), "TIFF"), grey(RAMP), 0),
    ("inverted16.tif", lambda: tiff(Image.fromarray(WIDE), PHOTOMETRIC_INTERPRETATION=0),
     grey(255 - RAMP), 0),
    ("dark16.png", lambda: encoded(Image.fromarray(WIDE // 8), "PNG"),
     grey(np.rint(WIDE // 8 / 257)), 0),
    ("rgb16.png", lambda: png16(3, DEEP_RGB),
     np.dstack([RAMP, RAMP[::-1], np.full_like(RAMP, 128)]), 1),
    ("rgba16.png", lambda: png16(4, np.dstack([DEEP_RGB, ALPHA.astype(np.uint16) * 257])),
     over_white(np.dstack([RAMP, RAMP[::-1], np.full_like(RAMP, 128)]), ALPHA), 1),
    ("grey_alpha16.png", lambda: png16(2, np.dstack([WIDE, ALPHA.astype(np.uint16) * 257])),
     over_white(grey(RAMP), ALPHA), 1),
    ("int32_of_16_bits.tif", lambda: i32(WIDE), grey(RAMP), 0),
    ("int32.tif", lambda: i32(RAMP * (2**31 - 1.0) // 255), grey(RAMP), 0),
    ("int32_of_8_bits.tif", lambda: i32(RAMP), grey(RAMP), 0),
    ("uint32.tif", lambda: plain_tiff((RAMP * np.uint32(2**24 + 2**16 + 257)).tobytes(), 32),
     grey(RAMP), 0),
    ("int16.tif", lambda: plain_tiff((RAMP.astype(np.int16) * 128).tobytes(), 16, signed=True),
     grey(np.rint(RAMP * (128.0 * 255 / 32767))), 0),
    ("grey12.tif", lambda: plain_tiff(twelve_bits(), 12), grey(RAMP), 0),
    ("signed.tif", lambda: i32(RAMP.astype(int) * 100 - 9000), grey(RAMP), 0),
    ("float_unit.tif", lambda: f32(HALVES), grey(RAMP), 0),
    ("float_dark.tif", lambda: f32(HALVES / 5), grey(np.rint(HALVES * 51)), 0),
    ("float_levels.tif", lambda: f32(RAMP), grey(RAMP), 0),
    ("float_any.tif", lambda: f32(HALVES * 9e4 - 4e4), grey(RAMP), 0),
    # transparency
    ("rgba.png", lambda: encoded(rgba(), "PNG"), over_white(NOISE, ALPHA), 1),
    ("rgba.tiff", lambda: encoded(rgba(), "TIFF"), over_white(NOISE, ALPHA), 1),
    ("rgba.webp", lambda: encoded(rgba(), "WEBP", lossless=True, exact=True),
     over_white(NOISE, ALPHA), 1),
    ("opaque.png", lambda: encoded(rgba(alpha=np.full_like(ALPHA, 255)), "PNG"), NOISE, 0),
    ("grey_alpha.png", lambda: encoded(Image.fromarray(np.dstack([RAMP, ALPHA])), "PNG"),
     over_white(grey(RAMP), ALPHA), 1),
    ("grey_key.png", lambda: encoded(Image.fromarray(RAMP), "PNG", transparency=7),
     grey(KEYED), 0),
    ("grey16_key.png", lambda: png16(1, WIDE, (b"tRNS", struct.pack(">H", 7 * 257))),
     grey(KEYED), 0),
    ("rgb_key.png", lambda: encoded(Image.fromarray(grey(RAMP)), "PNG", transparency=(7, 7, 7)),
     grey(KEYED), 0),
    ("rgb16_key.png",
     lambda: png16(3, np.dstack([WIDE] * 3), (b"tRNS", struct.pack(">3H", *[7 * 257] * 3))),
     grey(KEYED), 1),
    ("bits_key.png", lambda: encoded(Image.fromarray(RAMP > 99), "PNG", transparency=0),
     grey(np.full_like(RAMP, 255)), 0),
    # palettes
    ("palette.png", lambda: palette("PNG", b"\xff" * 256), PALETTE, 0),
    ("palette_key.png", lambda: palette("PNG", 7),
     np.where((RAMP == 7)[..., None], 255, PALETTE), 0),
    ("palette_alpha.png", lambda: palette("PNG", ALPHA.tobytes()), over_white(PALETTE, ALPHA), 1),
    # colour
    ("cmyk.tif", lambda: encoded(Image.fromarray(NOISE).convert("CMYK"), "TIFF"), NOISE, 1),
    ("cmyk.jpg", lambda: encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100),
     np.full((16, 16, 3), (0, 255, 255), np.uint8), 2),
    ("srgb.png", lambda: encoded(Image.fromarray(NOISE), "PNG", icc_profile=SRGB), NOISE, 0),
    ("swapped.png", lambda: encoded(Image.fromarray(NOISE), "PNG", icc_profile=SWAPPED),
     NOISE[..., [1, 0, 2]], 1),
    ("swapped.webp",
     lambda: encoded(Image.fromarray(NOISE), "WEBP", lossless=True, icc_profile=SWAPPED),
     NOISE[..., [1, 0, 2]], 1),
    ("swapped_rgba.tif", lambda: encoded(rgba(), "TIFF", icc_profile=SWAPPED),
     over_white(NOISE[..., [1, 0, 2]], ALPHA), 2),
    ("swapped_palette.png", lambda: encoded(Image.fromarray(NOISE).quantize(256), "PNG",
                                            icc_profile=SWAPPED),
     np.asarray(Image.fromarray(NOISE).quantize(256).convert("RGB"))[..., [1, 0, 2]], 1),
    ("rgb_profile_on_grey.png", lambda: encoded(Image.fromarray(RAMP), "PNG", icc_profile=SWAPPED),
     grey(RAMP), 1),
    ("grey_profile.png", lambda: encoded(Image.fromarray(RAMP), "PNG", icc_profile=renamed(
        SRGB, (b"rTRC", b"kTRC"), space=b"GRAY")), grey(RAMP), 1),
    ("grey_profile_on_rgb.png", lambda: encoded(Image.fromarray(NOISE), "PNG", icc_profile=renamed(
        SRGB, (b"rTRC", b"kTRC"), space=b"GRAY")), NOISE, 0),
    ("damaged_profile.png", lambda: encoded(Image.fromarray(NOISE), "PNG", icc_profile=b"none"),
     NOISE, 0),
    # first images
    ("animation.webp", lambda: encoded(Image.fromarray(NOISE), "WEBP", lossless=True, save_all=True,
                                       append_images=[Image.new("RGB", (16, 16))]), NOISE, 0),
    ("pages.tif", lambda: encoded(Image.fromarray(NOISE), "TIFF", save_all=True,
                                  append_images=[Image.new("RGB", (4, 4))]), NOISE, 0),
    ("damaged_exif.png", lambda: encoded(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0no"),
     NOISE, 0),
]  # fmt: skip


@pytest.mark.parametrize("name, make, wanted, tolerance", KINDS, ids=[k[0] for k in KINDS])
def test_a_file_becomes_8_bit_srgb(tmp_path, name, make, wanted, tolerance):
    (tmp_path / name).write_bytes(make())
    got = read_rgb(tmp_path / name)
    assert (got.mode, got.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(got).astype(int) - wanted).max() <= tolerance
    assert image_size(tmp_path / name) == (16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_equals_that_of_pillow(tmp_path, kind, orientation):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(rotated(kind, orientation))
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    got = np.asarray(read_rgb(path))
    assert np.array_equal(got, wanted)
    assert got.shape[:2] == image_size(path) == ((16, 8) if orientation > 4 else (8, 16))


def test_orientation_and_depth_together(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(WIDE[:8]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), np.rot90(grey(RAMP[:8]), -1))


def test_compositing_and_profiles_equal_those_of_pillow(tmp_path):
    rgba().save(tmp_path / "a.png")
    white = Image.new("RGBA", (16, 16), "white")
    wanted = Image.alpha_composite(white, rgba()).convert("RGB")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), np.asarray(wanted))
    Image.fromarray(NOISE).save(tmp_path / "b.jpg", quality=100, icc_profile=SWAPPED)
    with Image.open(tmp_path / "b.jpg") as image:
        source = ImageCms.ImageCmsProfile(io.BytesIO(SWAPPED))
        wanted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    assert wanted is not None
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "b.jpg")), np.asarray(wanted))


@pytest.mark.parametrize(
    "payload, reason",
    [
        (b"", "(it is empty)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "(it is a Git LFS pointer; download"),
        (b"<!DOCTYPE html><html>", "(it is a web page)"),
        (b"\xff\xd8\xff\xe0", "(it is a damaged JPEG image)"),
        (b"text", f"(it is damaged, or no {', '.join(FORMATS)} that Pillow reads)"),
        (encoded(Image.fromarray(NOISE), "JPEG", quality=100)[:-200], "is truncated"),
        (encoded(Image.fromarray(NOISE), "PNG")[:200], "cannot be read as an image ("),
        (encoded(Image.fromarray(NOISE), "WEBP")[:100], "cannot be read as an image ("),
        (encoded(Image.fromarray(NOISE), "TIFF")[:300], "cannot be read as an image ("),
        (f32(np.where(RAMP == 7, np.nan, RAMP)), "(some values are not finite)"),
        (encoded(Image.fromarray(NOISE), "PPM"), "or no JPEG, PNG"),
    ],
)
def test_unreadable_files_are_bad_items_with_a_reason(tmp_path, payload, reason):
    (tmp_path / "a.png").write_bytes(payload)
    with pytest.raises(BadItem) as raised:
        read_rgb(tmp_path / "a.png")
    assert reason in str(raised.value) and len(str(raised.value)) < 160
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read as an image \("):
        load_image(tmp_path / "a.png", Clip(3, 1, 16, 16))


def test_missing_files_and_too_many_pixels_are_bad_items(tmp_path, monkeypatch):
    with pytest.raises(BadItem, match=r"\(No such file or directory\)"):
        read_rgb(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_rgb, image_size):
        with pytest.raises(BadItem, match=r"\(more than 200 pixels; resize it\)"):
            read(tmp_path / "a.png")


# --- all data plugins and prompts -----------------------------------------------------------------


def video_folder(root: Path, names: list[str]):
    return VideoFolder(VideoFolder.Config(root=str(root), captions="none", frames=1, height=16,
                                          width=16)), "video"  # fmt: skip


def celebahq(root: Path, names: list[str]):
    return CelebAHQ(CelebAHQ.Config(root=str(root), height=16, width=16)), "video"


def easyanimate(root: Path, names: list[str]):
    rows = [{"file_path": f"train/{n}", "text": "a", "type": "image"} for n in names]
    (root / "metadata.json").write_text(json.dumps(rows))
    cfg = EasyAnimateJSON.Config(root=str(root), val_fraction=0, height=16, width=16)
    return EasyAnimateJSON(cfg), "video"


def cogvideox(root: Path, names: list[str]):
    for i in range(len(names)):
        write_video(root / "videos" / f"{i}.mp4")
    (root / "videos.txt").write_text("\n".join(f"videos/{i}.mp4" for i in range(len(names))))
    (root / "prompts.txt").write_text("\n".join("a" for _ in names))
    (root / "images.txt").write_text("\n".join(f"train/{n}" for n in names))
    cfg = CogVideoXFolder.Config(root=str(root), images="images.txt", val_fraction=0, frames=1,
                                 height=16, width=16)  # fmt: skip
    return CogVideoXFolder(cfg), "image"


def webdataset(root: Path, names: list[str]):
    (root / "shards").mkdir()
    for side in ("train", "val"):
        with tarfile.open(root / f"shards/{side}.tar", "w") as tar:
            for i, name in enumerate(names):
                tar.add(root / "train" / name, f"{i:03}.{name.rpartition('.')[2]}")
    cfg = WebDataset.Config(root=str(root / "shards"), index=str(root / "index"), caption=None,
                            val_fraction=0.5, frames=1, height=16, width=16,
                            media=MEDIA)  # fmt: skip
    return WebDataset(cfg), "video"


@pytest.mark.parametrize(
    "of", [video_folder, celebahq, easyanimate, cogvideox, webdataset], ids=lambda f: f.__name__
)
def test_data_plugins_read_every_kind(tmp_path, of):
    """None is lost, and none has other values."""
    wanted = {}
    for side in ("train", "val"):
        (tmp_path / side).mkdir()
    for i, (name, make, pixels, _) in enumerate(sorted(KINDS, key=lambda k: k[0])):
        file = f"{i:03}{Path(name).suffix}"
        wanted[file] = pixels
        (tmp_path / "train" / file).write_bytes(make())
    (tmp_path / "val" / "a.png").write_bytes(KINDS[0][1]())
    source, field = of(tmp_path, [*wanted])
    pixels, read = [*wanted.values()], set()
    for items in (source.split("train"), source.split("val")):
        for i in range(len(items)):
            if (number := Path(items.id(i)).stem).isdigit():
                got = items.load(i, keyed(0))[field][:, 0].permute(1, 2, 0).numpy()
                assert np.abs((127.5 * (got + 1)).round() - pixels[int(number)]).max() <= 3
                read.add(int(number))
    assert read == {*range(len(pixels))}


def test_prompts_read_every_kind(tmp_path):
    for name, make, pixels, _ in KINDS:
        (tmp_path / name).write_bytes(make())
        got = (load_image(tmp_path / name, Clip(3, 1, 16, 16)).permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(got.round() - pixels).max() <= 3, name


def test_the_table_has_every_extension():
    assert {Path(k[0]).suffix for k in KINDS} | {".jpeg"} == {*IMAGES}


def test_an_image_with_damaged_exif_is_named_once(tmp_path, caplog):
    from sandbox.data import image_files

    image_files._warn_of_damage.cache_clear()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(
            encoded(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0no")
        )
        read_rgb(tmp_path / f"{i}.png")
        image_size(tmp_path / f"{i}.png")
    for i in range(3):
        assert caplog.text.count(f"{i}.png: damaged EXIF data") == 1
