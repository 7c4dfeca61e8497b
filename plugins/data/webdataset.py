"""Shards as webdataset has them (KEY.mp4, KEY.txt, ... in tar files), read by index.

Nothing streams: a shard's index says where each member is, so that the order of an epoch is that of
all data plugins, whatever the number of shards, loader processes and machines.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plugins._blocks.buckets import nearest
from plugins._blocks.folders import folder_of, held_out
from plugins._blocks.tars import Entry, Shard, first_of, read_shards
from plugins._blocks.video_io import IMAGES, Fit, chooser, read_image, read_video
from plugins._configs.buckets import BucketedDataConfig
from sandbox.contracts import BadItem, Clip, DataError, Sample, above, in_range, one_of
from sandbox.registry import register

MEDIA = ("mp4", "webm", "gif", "jpg", "jpeg", "png", "webp")
SPLITS = ("auto", "shard", "key")
MISSING = ("skip", "empty")
PLACES = ("random", "centre")

log = logging.getLogger(__name__)


@register("data", "webdataset")
class WebDataset:
    """Tar shards of videos or images with captions, as task=prepare and others write them."""

    @dataclass
    class Config(BucketedDataConfig):
        """The settings beyond those of every data plugin.

        media: endings of members with pixels, the first that a sample has is used (1.mp4 is an
        ending, too); caption: ending of the member with the caption (null: none), of one that ends
        in json the entry `caption_field`; missing_caption: "skip" counts the sample as bad,
        "empty" makes it "". split_by: "auto" goes by index.json, else by names such as
        train-00000.tar and val/0.tar, and is "key" where those do not have both; "shard" and "key"
        hold out `val_fraction` of the shards or samples, by the hashes of their names. index:
        folder where the indices of shards are kept that come without index.json. stride: file
        frames from one frame to the next; start, crop: "random" or "centre", for training
        (validation takes the centre); num_prompts: captions of the validation split to sample with.

        With `buckets` a sample goes to the most frames that it has (else to the fewest), and among
        the sizes with so many to the one whose aspect is nearest, then to the nearest in pixels.
        Images need a size of one frame.
        """

        media: tuple[str, ...] = MEDIA
        caption: str | None = "txt"
        caption_field: str = "caption"
        missing_caption: str = "skip"
        split_by: str = "auto"
        val_fraction: float = 0.05
        index: str = "outputs/cache/webdataset"
        stride: int = 1
        start: str = "random"
        crop: str = "centre"
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if not self.media:
                yield "media=[]: want at least one ending"
            for ending in self.media:
                if ending.rpartition(".")[2] not in MEDIA:
                    yield f"media={ending!r}: want endings in lower case, the last part of {MEDIA}"
            yield from one_of("missing_caption", self.missing_caption, MISSING)
            yield from one_of("split_by", self.split_by, SPLITS)
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            yield from in_range("stride", self.stride, 1)
            yield from one_of("start", self.start, PLACES)
            yield from one_of("crop", self.crop, PLACES)
            yield from in_range("num_prompts", self.num_prompts, 0)

        def files(self) -> dict[str, str | None]:
            return {"root": self.root}

        def provides(self) -> frozenset[str]:
            fields = {"video"}
            if min(clip.frames for clip in self.clips()) > 1:
                fields |= {"fps", "frame_stride"}
            if self.caption is not None:
                fields |= {"captions", "prompts"} if self.num_prompts else {"captions"}
            return frozenset(fields)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._shards: list[Shard] | None = None

    def split(self, name: str) -> "Samples":
        """Clips of "train" or "val". Raises DataError where there are none or shards are damaged.

        StorageError where their indices cannot be kept.
        """
        if name not in ("train", "val"):
            raise ValueError(f"split {name!r}: want 'train' or 'val'")
        root = folder_of(self.cfg)
        found, left_out = self._usable(root, name)
        said = "".join(f", {n} {why}" for why, n in left_out.items())
        if not found:
            raise DataError(
                f"data.root={self.cfg.root}: no sample for {name!r} in its .tar files{said}; add "
                "shards, or set data.split_by=key, or data.media to the endings of their members"
            )
        if left_out and name == "train":
            log.warning("data.root=%s: left out%s", self.cfg.root, said)
        return Samples(root, found, self.cfg, training=name == "train")

    def prompts(self) -> list[str]:
        """Captions of the first samples of the validation split that have one."""
        found: list[str] = []
        if "prompts" in self.cfg.provides():
            val = self.split("val")
            for entry in val.entries:
                if len(found) == self.cfg.num_prompts:
                    break
                try:
                    found.append(caption_of(entry, self.cfg))
                except BadItem:
                    continue  # it is counted where the split is loaded
        return found

    def _usable(self, root: Path, split: str) -> tuple[list[Entry], Counter[str]]:
        """Samples of a split that can give clips, and how many of all were left out, and why."""
        cfg, left_out = self.cfg, Counter[str]()
        if self._shards is None:
            keep = Path(cfg.index).expanduser()
            self._shards = read_shards(root, keep, cfg.media, looks=len(cfg.clips()) > 1)
        has_images = any(clip.frames == 1 for clip in cfg.clips())
        found: list[Entry] = []
        for entry, side in sides(self._shards, cfg):
            ending = first_of(cfg.media, entry.places)
            if ending is None:
                left_out["samples without a member of data.media"] += 1
            elif is_image(ending) and not has_images:
                left_out["images, because no clip has one frame"] += 1
            elif side not in ("train", "val"):
                left_out["samples in shards of neither split"] += 1
            elif side == split:
                found.append(entry)
        return found, left_out


def sides(shards: list[Shard], cfg: WebDataset.Config) -> Iterator[tuple[Entry, str | None]]:
    """All samples with the split that each is in."""
    told = {shard.name: shard.split for shard in shards}
    if cfg.split_by == "auto" and {"train", "val"} <= {*told.values()}:
        yield from ((entry, told[shard.name]) for shard in shards for entry in shard.entries)
        return
    by_shard = cfg.split_by == "shard"
    names = told if by_shard else {entry.key for shard in shards for entry in shard.entries}
    held = held_out(sorted(names), cfg.val_fraction)
    for shard in shards:
        for entry in shard.entries:
            is_held = (shard.name if by_shard else entry.key) in held
            yield entry, "val" if is_held else "train"


def is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in IMAGES


def caption_of(entry: Entry, cfg: WebDataset.Config) -> str:
    """Raises BadItem where it cannot be read, or is missing and such are to be skipped."""
    ending = cfg.caption or ""
    text = ""
    if ending in entry.places:
        payload = entry.member(ending).read()
        try:
            text = payload.decode("utf-8-sig")
            if ending.rpartition(".")[2] == "json":
                text = json.loads(text).get(cfg.caption_field) or ""
            text = " ".join(text.split())
        except (ValueError, AttributeError, RecursionError) as e:
            raise BadItem(f"its caption .{ending} cannot be read: {e}") from e
    if not text and cfg.missing_caption == "skip":
        raise BadItem(f"has no caption in .{ending} (data.missing_caption=empty would take it)")
    return text


@dataclass
class Samples:
    """The clips of one split."""

    root: Path
    entries: list[Entry]
    cfg: WebDataset.Config
    training: bool

    def __len__(self) -> int:
        return len(self.entries)

    def id(self, index: int) -> str:
        """Shard and key, with what cannot be printed escaped."""
        entry = self.entries[index]
        return repr(f"{entry.shard.relative_to(self.root).as_posix()}/{entry.key}")[1:-1]

    def content(self, index: int) -> str:
        """SHA-256 of all that is read for a clip."""
        entry, found = self.entries[index], hashlib.sha256()
        for ending in (first_of(self.cfg.media, entry.places), self.cfg.caption):
            if ending in entry.places:
                payload = entry.member(ending).read()
                found.update(f"{ending} {len(payload)}\n".encode() + payload)
        return found.hexdigest()

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        """The clip of an entry whose look tells its frames, height and width."""
        main, *others = self.cfg.clips()
        look = self.entries[index].look
        if not others or not isinstance(look, tuple):
            return main
        frames, height, width = look
        return nearest(((frames - 1) // self.cfg.stride + 1, height, width), (main, *others))

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        entry, cfg, clip = self.entries[index], self.cfg, self.bucket(index, rng)
        if isinstance(entry.look, str):
            raise BadItem(entry.look)
        ending = first_of(cfg.media, entry.places)
        assert ending is not None  # others were left out
        media = entry.member(ending)
        sample: Sample = {} if cfg.caption is None else {"caption": caption_of(entry, cfg)}
        fit = Fit(clip.height, clip.width, chooser(self.training and cfg.crop == "random", rng))
        if is_image(ending):
            return sample | {"video": read_image(media, fit)}
        start = chooser(self.training and cfg.start == "random", rng)
        video, rate = read_video(media, clip.frames, cfg.stride, start, fit)
        if "fps" in cfg.provides():
            sample |= {"fps": rate / cfg.stride, "frame_stride": float(cfg.stride)}
        return sample | {"video": video}
