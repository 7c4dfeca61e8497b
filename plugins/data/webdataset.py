"""Shards in webdataset's format (KEY.mp4, KEY.txt, ... in tar files), read by index.

Nothing is streamed: an index gives the offset of each member. The order of an epoch is therefore
the same as for other data, for any number of shards, loader processes and machines.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.buckets import nearest
from plugins._blocks.captions import first_captions, one_line
from plugins._blocks.folders import (
    Unused,
    check_split,
    files_below,
    folder_of,
    held_out,
    print_once,
    printable,
)
from plugins._blocks.tar_shards import INDEX, Entry, Shard, first_ending, read_shards, user_caches
from plugins._blocks.video_io import IMAGES, Fit, chooser, read_image, read_video
from plugins._configs.buckets import BucketedDataConfig
from sandbox.contracts import BadItem, Clip, DataError, Sample, above, in_range, one_of
from sandbox.registry import register

DEFAULT_MEDIA = ("mp4", "webm", "gif", "jpg", "jpeg", "png", "webp")  # part of a run's identity
MEDIA = (  # all that can be read
    *DEFAULT_MEDIA, "avif", "bmp", "jfif", "tif", "tiff", "mov", "mkv", "avi", "m4v"
)  # fmt: skip
CAPTIONS = ("txt", "caption", "json")
SPLITS = ("auto", "shard", "key")
MISSING = ("skip", "empty")
PLACES = ("random", "centre")
SHOWN = 5  # extensions that a summary names


@register("data", "webdataset")
class WebDataset:
    """Tar shards of videos or images with captions, as written by task=prepare or webdataset."""

    @dataclass
    class Config(BucketedDataConfig):
        """Settings in addition to those of every data plugin.

        media: extensions of members with pixels, in order of preference (1.mp4 also counts as an
        extension); caption: extension of the caption member (null: no captions), for json the
        entry `caption_field`; missing_caption: "skip" counts the sample as unusable, "empty" uses
        "". split_by: "auto" follows index.json, else names such as train-00000.tar and val/0.tar,
        else "key"; "shard" and "key" hold out `val_fraction` of the shards or samples, by a hash
        of their names. index: cache folder for the indices of shards without index.json. stride:
        file frames between clip frames; start, crop: "random" or "centre" in training (validation
        uses the centre); num_prompts: validation captions to sample with.

        With `buckets`, a sample takes the bucket with the most frames that it has (else the
        fewest), then the nearest aspect, then the nearest size in pixels. Images need a bucket of
        one frame.
        """

        media: tuple[str, ...] = DEFAULT_MEDIA
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
                yield "media=[]: want at least one extension"
            for ending in self.media:
                if ending.rpartition(".")[2] not in MEDIA:
                    yield f"media={ending!r}: want a lower-case extension that ends in {MEDIA}"
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
        """Clips of "train" or "val". Raises DataError if there are none or a shard is damaged.

        Raises StorageError if an index cannot be cached.
        """
        check_split(name)
        root = folder_of(self.cfg)
        found, excluded = self._usable(root, name)
        if not found:
            raise DataError(
                f"data.root={self.cfg.root}: no sample for {name!r} in its .tar files"
                f"{excluded.summary()}; add shards, or set data.split_by=key, or data.media to "
                "their extensions"
            )
        if name == "train":
            excluded.report(self.cfg)
        return Samples(root, found, self.cfg, training=name == "train")

    def prompts(self) -> list[str]:
        """Captions of the first validation samples that have one."""
        if "prompts" not in self.cfg.provides():
            return []
        entries = self.split("val").entries
        return first_captions(entries, lambda e: caption_of(e, self.cfg), self.cfg.num_prompts)

    def _usable(self, root: Path, split: str) -> tuple[list[Entry], Unused]:
        """Usable samples of a split; and what of all splits is not used."""
        cfg, excluded = self.cfg, Unused()
        if self._shards is None:
            caches = [Path(cfg.index).expanduser()]
            if cfg.index == WebDataset.Config.index:  # the current folder may be read-only
                caches += user_caches("webdataset")
            self._shards = read_shards(root, caches, cfg.media, with_sizes=len(cfg.clips()) > 1)
        has_images = any(clip.frames == 1 for clip in cfg.clips())
        found: list[Entry] = []
        without = MissingMedia()
        for entry, entry_split in entries_with_splits(self._shards, cfg):
            ending = first_ending(cfg.media, entry.members)
            if entry.problem:
                excluded.add(entry.problem)
            elif ending is None:
                without.add(entry)
            elif is_image(ending) and not has_images:
                excluded.add("images, because no clip has one frame")
            elif entry_split not in ("train", "val"):
                excluded.add("samples in shards of neither split")
            elif entry_split == split:
                found.append(entry)
        without.report(excluded)
        for name in files_below(root):
            if re.search(r"\.(tgz|tar\.\w+)$", name.lower()):
                excluded.add("compressed shards; decompress them")
            elif not name.lower().endswith(".tar") and PurePosixPath(name).name != INDEX:
                excluded.add_file(name)
        return found, excluded


class MissingMedia:
    """Samples without a member of data.media."""

    def __init__(self) -> None:
        self.count = 0
        self.endings: set[str] = set()
        self.dotted: list[str] = []  # members with pixels whose key was cut at a dot

    def add(self, entry: Entry) -> None:
        dotted = [e for e in entry.members if "." in e and e.rpartition(".")[2] in MEDIA]
        self.dotted += [f"{entry.key}.{ending}" for ending in dotted]
        if not dotted:
            self.count += 1
            self.endings |= {f".{ending}" for ending in entry.members}

    def report(self, excluded: Unused) -> None:
        shown = ", ".join(sorted(self.endings)[:SHOWN])
        excluded.add(f"samples without a member of data.media (they have {shown})", self.count)
        if self.dotted:
            key, _, ending = self.dotted[0].rpartition("/")[2].partition(".")
            excluded.add(
                f"members with a dot in their name, such as {self.dotted[0]} (read as key {key!r} "
                f"and extension {ending!r}; rename them, or set data.media=[{ending}])",
                len(self.dotted),
            )


def entries_with_splits(
    shards: list[Shard], cfg: WebDataset.Config
) -> Iterator[tuple[Entry, str | None]]:
    """All samples, each with its split."""
    splits = {shard.name: shard.split for shard in shards}
    if cfg.split_by == "auto" and {"train", "val"} <= {*splits.values()}:
        yield from ((entry, splits[shard.name]) for shard in shards for entry in shard.entries)
        return
    by_shard = cfg.split_by == "shard"
    names = set(splits)
    if not by_shard:
        names = {e.key for shard in shards for e in shard.entries if e.problem is None}
    held = held_out(names, cfg.val_fraction)
    if len(names) == 1 and not by_shard:
        print_once(f"there is only {min(names)!r}: it is used for training and for validation")
        yield from (
            (e, side) for shard in shards for e in shard.entries for side in ("train", "val")
        )
        return
    for shard in shards:
        for entry in shard.entries:
            is_held = (shard.name if by_shard else entry.key) in held
            yield entry, "val" if is_held else "train"


def is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in IMAGES


def caption_of(entry: Entry, cfg: WebDataset.Config) -> str:
    """Raises BadItem for an unreadable caption, and for a missing one unless those become ""."""
    ending = cfg.caption or ""
    text = ""
    if ending in entry.members:
        payload = entry.member(ending).read()
        try:
            text = payload.decode("utf-8-sig")
            if ending.rpartition(".")[2] == "json":
                text = json.loads(text).get(cfg.caption_field) or ""
            text = one_line(text)
        except (ValueError, AttributeError, RecursionError) as e:
            raise BadItem(f"its caption .{ending} cannot be read: {e}") from e
    if not text and cfg.missing_caption == "skip":
        others = [name for name in CAPTIONS if name in entry.members and name != ending]
        use = f"data.caption={others[0]} reads another member, " if others else ""
        raise BadItem(f"has no caption in .{ending}; {use}data.missing_caption=empty keeps it")
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
        """Shard and key."""
        entry = self.entries[index]
        return printable(f"{entry.shard.relative_to(self.root).as_posix()}/{entry.key}")

    def content(self, index: int) -> str:
        """SHA-256 of the members that the clip is made from. Raises BadItem."""
        entry, digest = self.entries[index], hashlib.sha256()
        for ending in (first_ending(self.cfg.media, entry.members), self.cfg.caption):
            if ending in entry.members:
                payload = entry.member(ending).read()
                digest.update(f"{ending} {len(payload)}\n".encode() + payload)
        return digest.hexdigest()

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        main, *others = self.cfg.clips()
        size = self.entries[index].size
        if not others or not isinstance(size, tuple):
            return main
        frames, height, width = size
        return nearest(((frames - 1) // self.cfg.stride + 1, height, width), (main, *others))

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        entry, cfg, clip = self.entries[index], self.cfg, self.bucket(index, rng)
        if isinstance(entry.size, str):
            raise BadItem(entry.size)
        ending = first_ending(cfg.media, entry.members)
        assert ending is not None  # such entries were excluded
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
