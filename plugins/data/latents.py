"""Latents and embeddings that task=encode has stored, in place of clips; read by index."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plugins._blocks.folders import folder_of
from plugins._blocks.shards import read_index, read_tensors
from plugins._configs.buckets import BucketedDataConfig
from sandbox.contracts import SIZES, Clip, DataError, Sample, in_range
from sandbox.registry import register


@register("data", "latents")
class Latents:
    """Stored latents of task=encode, named by data.root: training needs no first stage."""

    @dataclass
    class Config(BucketedDataConfig):
        """The settings beyond those of every data plugin; frames, height and width are of pixels.

        buckets: the other sizes that clips were encoded in, and bucket_batch_sizes theirs.
        text: bring the stored embeddings of captions (conditioning.weights=cached); image: bring
        the stored picture of each clip, which image-to-video is told; num_prompts: captions of the
        validation split to sample with. The order of clips is that of the data they were made from.
        """

        text: bool = False
        image: bool = False
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("num_prompts", self.num_prompts, 0)

        def files(self) -> dict[str, str | None]:
            return {"root": self.root}

        def provides(self) -> frozenset[str]:
            also = {"text": self.text, "image": self.image, "prompts": self.num_prompts > 0}
            return frozenset(
                {"stored", "captions"} | {name for name, is_in in also.items() if is_in}
            )

        def stored(self) -> str | None:
            return self.root

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._found: tuple[Path, dict[str, Any]] | None = None

    def split(self, name: str) -> "Stored":
        """Clips of "train" or "val". Raises DataError where the folder holds others or none."""
        if name not in ("train", "val"):
            raise ValueError(f"split {name!r}: want 'train' or 'val'")
        folder, index = self._index()
        rows = index["splits"].get(name)
        if not rows:
            raise DataError(
                f"data.root={self.cfg.root}: nothing is stored for {name!r}; task=encode "
                "task.splits=[train,val] stores both"
            )
        sizes = [size_of(row, Clip(*index["clip"])) for row in rows]
        return Stored(folder, rows, sizes, self.cfg, index["no_text"] if self.cfg.text else None)

    def prompts(self) -> list[str]:
        """Captions of the first clips of the validation split that have one."""
        rows = self._index()[1]["splits"].get("val", ()) if self.cfg.num_prompts else ()
        captions = [row["caption"] for row in rows if row["caption"] is not None]
        return captions[: self.cfg.num_prompts]

    def embedded(self, caption: str) -> dict[str, Tensor] | None:
        """The stored embedding of a caption, with that of none; None where it is not there."""
        folder, index = self._index()
        rows = (row for split in index["splits"].values() for row in split)
        places = {row["caption"] or "": row["text"] for row in rows} | index.get("prompts", {})
        places |= {"": index["no_text"]}
        if places.get(caption) is None:
            return None
        nothing = read_tensors(folder, index["no_text"])
        return read_tensors(folder, places[caption]) | {f"no_{k}": v for k, v in nothing.items()}

    def _index(self) -> tuple[Path, dict[str, Any]]:
        """The folder and its index, once it is found to hold what the Config says."""
        if self._found is None:
            cfg, folder = self.cfg, folder_of(self.cfg)
            index = read_index(folder)
            check_sizes(cfg, index)
            for name in ("text", "image"):
                if getattr(cfg, name) and not index[name]:
                    raise DataError(
                        f"data.{name}=true: there is none in {cfg.root}; task=encode stores it for "
                        "a conditioning that wants it"
                    )
            self._found = folder, index
        return self._found


def check_sizes(cfg: Latents.Config, index: dict[str, Any]) -> None:
    """Raises DataError where clips of other sizes are stored than the Config says."""
    main = Clip(*index["clip"])
    for name in ("frames", "height", "width"):
        if not cfg.buckets and getattr(cfg, name) != getattr(main, name):
            raise DataError(
                f"data.{name}={getattr(cfg, name)}: the latents in {cfg.root} are of clips of "
                f"{text_of(main)} (frames, height, width)"
            )
    found = {size_of(row, main) for rows in index["splits"].values() for row in rows}
    if others := sorted(map(text_of, found - set(cfg.clips()))):
        raise DataError(
            f"data.buckets={list(cfg.buckets)}: in {cfg.root} there are clips of "
            f"{', '.join(others)}, too; name all sizes but frames x height x width"
        )


def size_of(row: dict[str, Any], main: Clip) -> Clip:
    """Of the pixels; `main` where the index was written before there were several sizes."""
    return Clip(3, *row["size"]) if "size" in row else main


def text_of(clip: Clip) -> str:
    return f"{clip.frames}x{clip.height}x{clip.width}"


@dataclass
class Stored:
    """The clips of one split; nothing is random."""

    folder: Path
    rows: list[dict[str, Any]]
    sizes: list[Clip]  # of pixels
    cfg: Latents.Config
    no_text: list[Any] | None
    empty: dict[str, Tensor] | None = None  # the embedding of the empty caption, once it is read

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return self.rows[index]["id"]

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        return self.sizes[index]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        row, size = self.rows[index], self.sizes[index]
        tensors = read_tensors(self.folder, row["latents"])
        told = dict(zip(SIZES, (size.height, size.width, size.height / size.width), strict=True))
        sample: Sample = {"stored": tensors["stored"], **told, **row["scalars"]}
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
    """Pixels in [-1, 1], float32, of uint8 or of themselves."""
    return image / 127.5 - 1 if image.dtype == torch.uint8 else image
