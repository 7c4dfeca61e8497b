"""Latents and text embeddings cached by task=encode, read by index in place of clips."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plugins._blocks.folders import check_split, folder_of
from plugins._blocks.latent_shards import read_index, read_tensors
from plugins._configs.buckets import BucketedDataConfig
from sandbox.contracts import SIZES, Clip, DataError, Sample, added, in_range
from sandbox.registry import register


@register("data", "latents")
class Latents:
    """Latents cached by task=encode in the folder data.root; training needs no first stage."""

    @dataclass
    class Config(BucketedDataConfig):
        """Settings in addition to those of every data plugin; sizes are those of the pixels.

        buckets, bucket_batch_sizes: the other sizes that clips were encoded in. text: whether
        batches have the cached caption embeddings (conditioning.weights=cached); image: whether
        they have the cached condition image of each clip (image-to-video); num_prompts: validation
        captions to sample with; num_classes: number of classes of clips that were encoded with
        labels. Clips keep the order of the data that they were encoded from.
        """

        text: bool = False
        image: bool = False
        num_prompts: int = 8
        num_classes: int = added(0)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("num_prompts", self.num_prompts, 0)
            yield from in_range("num_classes", self.num_classes, 0)

        def files(self) -> dict[str, str | None]:
            return {"root": self.root}

        def provides(self) -> frozenset[str]:
            optional = {"text": self.text, "image": self.image, "prompts": self.num_prompts > 0}
            optional |= {"label": self.num_classes > 0}
            return frozenset(
                {"stored", "captions"} | {name for name, is_there in optional.items() if is_there}
            )

        def labels(self) -> int:
            return self.num_classes

        def stored(self) -> str | None:
            return self.root

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._checked: tuple[Path, dict[str, Any]] | None = None

    def split(self, name: str) -> "CachedClips":
        """Clips of "train" or "val". Raises DataError if there are none or sizes differ."""
        check_split(name)
        folder, index = self._index()
        rows = index["splits"].get(name)
        if not rows:
            raise DataError(
                f"data.root={self.cfg.root}: no cached latents for {name!r}; run task=encode "
                "task.splits=[train,val]"
            )
        sizes = [size_of(row, Clip(*index["clip"])) for row in rows]
        no_text = index["no_text"] if self.cfg.text else None
        return CachedClips(folder, rows, sizes, self.cfg, no_text)

    def prompts(self) -> list[str]:
        """Captions of the first validation clips that have one."""
        rows = self._index()[1]["splits"].get("val", ()) if self.cfg.num_prompts else ()
        captions = [row["caption"] for row in rows if row["caption"] is not None]
        return captions[: self.cfg.num_prompts]

    def label(self, caption: str) -> int | None:
        """The class of the clips with this caption; None if it is not cached."""
        rows = (row for split in self._index()[1]["splits"].values() for row in split)
        found = (row["scalars"].get("label") for row in rows if row["caption"] == caption)
        return None if (label := next(found, None)) is None else int(label)

    def embedded(self, caption: str) -> dict[str, Tensor] | None:
        """The cached embeddings of `caption` and of no caption; None if it is not cached."""
        folder, index = self._index()
        rows = (row for split in index["splits"].values() for row in split)
        places = {row["caption"] or "": row["text"] for row in rows} | index.get("prompts", {})
        places |= {"": index["no_text"]}
        if places.get(caption) is None:
            return None
        no_text = read_tensors(folder, index["no_text"])
        return read_tensors(folder, places[caption]) | {f"no_{k}": v for k, v in no_text.items()}

    def _index(self) -> tuple[Path, dict[str, Any]]:
        """The folder and its index, checked against the Config on the first call."""
        if self._checked is None:
            cfg, folder = self.cfg, folder_of(self.cfg)
            index = read_index(folder)
            check_sizes(cfg, index)
            for name in ("text", "image"):
                if getattr(cfg, name) and not index[name]:
                    raise DataError(
                        f"data.{name}=true: there is none in {cfg.root}; run task=encode with a "
                        "conditioning that uses it"
                    )
            check_labels(cfg, index)
            self._checked = folder, index
        return self._checked


def check_sizes(cfg: Latents.Config, index: dict[str, Any]) -> None:
    """Raises DataError if the cached clips have other sizes than the Config."""
    main = Clip(*index["clip"])
    for name in ("frames", "height", "width"):
        if not cfg.buckets and getattr(cfg, name) != getattr(main, name):
            raise DataError(
                f"data.{name}={getattr(cfg, name)}: the latents in {cfg.root} come from clips of "
                f"{text_of(main)} (frames x height x width); want that size"
            )
    found = {size_of(row, main) for rows in index["splits"].values() for row in rows}
    if others := sorted(map(text_of, found - set(cfg.clips()))):
        raise DataError(
            f"data.buckets={list(cfg.buckets)}: {cfg.root} also has clips of "
            f"{', '.join(others)}; want all sizes except frames x height x width"
        )


def check_labels(cfg: Latents.Config, index: dict[str, Any]) -> None:
    """Raises DataError unless all clips have a class below `num_classes`, where it is set."""
    if not cfg.num_classes:
        return
    rows = (row for split in index["splits"].values() for row in split)
    for row in rows:
        label = row["scalars"].get("label")
        if label is None or label >= cfg.num_classes:
            what = "no class" if label is None else f"class {label:g}"
            raise DataError(
                f"data.num_classes={cfg.num_classes}: {row['id']!r} in {cfg.root} has {what}; want "
                "the number of classes of the data that were encoded, or 0 for none"
            )


def size_of(row: dict[str, Any], main: Clip) -> Clip:
    """Size in pixels; `main` if the index predates buckets."""
    return Clip(3, *row["size"]) if "size" in row else main


def text_of(clip: Clip) -> str:
    return f"{clip.frames}x{clip.height}x{clip.width}"


@dataclass
class CachedClips:
    """The clips of one split, without randomness."""

    folder: Path
    rows: list[dict[str, Any]]
    sizes: list[Clip]  # of pixels
    cfg: Latents.Config
    no_text: list[Any] | None
    empty: dict[str, Tensor] | None = None  # embedding of the empty caption, read on first use

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return self.rows[index]["id"]

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        return self.sizes[index]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        row, size = self.rows[index], self.sizes[index]
        tensors = read_tensors(self.folder, row["latents"])
        scalars = dict(zip(SIZES, (size.height, size.width, size.height / size.width), strict=True))
        sample: Sample = {"stored": tensors["stored"], **scalars, **row["scalars"]}
        if row["caption"] is not None:
            sample["caption"] = row["caption"]
        if self.cfg.image:
            sample["image"] = pixels(tensors["image"])
        if self.cfg.text:
            sample |= read_tensors(self.folder, row["text"])
            if self.no_text is not None:
                self.empty = self.empty or read_tensors(self.folder, self.no_text)
                sample |= {f"no_{name}": tensor for name, tensor in self.empty.items()}
        return sample


def pixels(image: Tensor) -> Tensor:
    """Pixels in [-1, 1]: uint8 is converted, float32 is returned as it is."""
    return image / 127.5 - 1 if image.dtype == torch.uint8 else image
