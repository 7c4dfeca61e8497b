"""Images prepared as CelebA-HQ in CompVis latent-diffusion: short side resized, centre crop."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.folders import (
    Unused,
    check_split,
    files_below,
    folder_of,
    inside,
    printable,
    split_by_hash,
    unlisted,
)
from plugins._blocks.video_io import IMAGES, read_rgb
from sandbox.contracts import BadItem, DataConfig, DataError, Sample, above, one_of
from sandbox.registry import register

USABLE = (".npy", *IMAGES)


@register("data", "celebahq")
class CelebAHQ:
    """Images of a folder (.npy as published, or any of the image formats), without captions."""

    @dataclass
    class Config(DataConfig):
        """train_list, val_list: text files of names relative to `root`, one per line, as published.

        Without lists the folders train/ and val/ are the splits. Without those folders
        `val_fraction` of the files is held out, by a hash of their names.
        """

        frames: int = 1
        train_list: str | None = None
        val_list: str | None = None
        val_fraction: float = 0.05

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("frames", self.frames, [1])
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            if (self.train_list is None) != (self.val_list is None):
                yield f"val_list={self.val_list}: want both train_list and val_list, or neither"

        def files(self) -> dict[str, str | None]:
            lists = {"train_list": self.train_list, "val_list": self.val_list}
            return {"root": self.root} | {k: v for k, v in lists.items() if v is not None}

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> "Images":
        """Images of "train" or "val". Raises DataError if there are none."""
        check_split(name)
        root = folder_of(self.cfg)
        names = self._listed(name) if self.cfg.train_list else self._found(root, name)
        if not names:
            raise DataError(
                f"data.root={self.cfg.root}: no image for {name!r}; want files "
                f"({', '.join(USABLE)}) in folders train/ and val/ or at least two"
            )
        if name == "train":
            self._unused(root, names).report(self.cfg)
        return Images(root, names, self.cfg.height, self.cfg.width)

    def prompts(self) -> list[str]:
        return []

    def _listed(self, split: str) -> list[str]:
        root = folder_of(self.cfg)
        train, val = (
            [inside(root, name) or name for name in read_list(file)]
            for file in (self.cfg.train_list, self.cfg.val_list)
        )
        if both := set(train) & set(val):
            raise DataError(
                f"data.val_list={self.cfg.val_list}: {len(both)} names are also in train_list, "
                f"such as {min(both)!r}; remove them from one"
            )
        return train if split == "train" else val

    def _unused(self, root: Path, names: list[str]) -> Unused:
        if self.cfg.train_list:
            return unlisted(root, {*names, *self._listed("val")}, USABLE)
        unused, used = Unused(), {*names, *self._found(root, "val")}
        for file in files_below(root):
            if PurePosixPath(file).suffix.lower() not in USABLE:
                unused.add_file(file)
            elif file not in used:
                unused.add("images outside train/ and val/")
        return unused

    def _found(self, root: Path, split: str) -> list[str]:
        names = sorted(n for n in files_below(root) if PurePosixPath(n).suffix.lower() in USABLE)
        sides = {s: [n for n in names if n.startswith(f"{s}/")] for s in ("train", "val")}
        if all(sides.values()):
            return sides[split]
        return split_by_hash(names, str, self.cfg.val_fraction, split)


def read_list(path: str | None) -> list[str]:
    """Names, one per line, without empty lines and repetitions. Raises DataError."""
    try:
        lines = Path(path or "").expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read: {e}; want a text file of names") from e
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


@dataclass
class Images:
    """One split: names of image files, relative to `root`."""

    root: Path
    names: list[str]
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        return printable(self.names[index])

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """As published: no flip, no random crop."""
        return {"video": prepare(read(self.root / self.names[index]), self.height, self.width)}


def read(path: Path) -> np.ndarray:
    """(3, H, W) uint8 from an image or a .npy of (3, H, W) or (1, 3, H, W). Raises BadItem."""
    suffix = path.suffix.lower()
    if suffix not in USABLE:
        raise BadItem(f"ends in {suffix!r}: want one of {', '.join(USABLE)}")
    if suffix in IMAGES:
        return np.asarray(read_rgb(path)).transpose(2, 0, 1)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as e:
        raise BadItem(f"cannot be read: {e}") from e
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype != np.uint8 or not array.size:
        raise BadItem(f"has {array.shape} {array.dtype}: want (1, 3, H, W) or (3, H, W) uint8")
    return array


def prepare(image: np.ndarray, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, 1, height, width) float32 in [-1, 1].

    As published for squares: resizes the short side (bilinear, no antialiasing), then crops the
    centre. Other sizes are covered in the same way.
    """
    scale = max(height / image.shape[1], width / image.shape[2])
    size = [round(side * scale) for side in image.shape[1:]]
    pixels = torch.from_numpy(np.array(image)).float()[None]
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return (pixels / 127.5 - 1).permute(1, 0, 2, 3).contiguous()  # (3, 1, height, width)
