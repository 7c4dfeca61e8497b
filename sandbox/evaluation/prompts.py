"""What to sample for: captions, and the images and rates that the conditioning is told, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.contracts import SCALARS, SIZES, Batch, Clip, ConfigError
from sandbox.evaluation.evaluate import gather
from sandbox.evaluation.prompt_checks import SETTINGS, Files, check, of_captions
from sandbox.model.latent_diffusion import prompts_batch

if TYPE_CHECKING:
    from PIL.Image import Image

RATES = SCALARS - set(SIZES)


def of_data(root: Root, captions: Sequence[str], count: int) -> Batch:
    """A batch of `captions`, else of the data's first `count`, else of so many empty ones.

    Images and rates that the conditioning is told are those of the first validation clips, and so
    are then the captions that are not given. Embeddings are those that the data have stored, where
    the conditioning has no encoder. Raises ConfigError for captions that none is told.
    """
    conditioning, source = root.conditioning, registry.create(root.data)
    if not conditioning.needs() & {"captions", "text"}:
        if found := [*of_captions(root, captions)]:
            raise ConfigError(*found)
        return prompts_batch([""] * count)
    if not conditioning.images() and not conditioning.needs() & RATES:
        found = [*captions] or source.prompts()[:count] or [""] * count
        return prompts_batch(found, **_stored_text(root, source, found))
    clips = gather(source.split("val"), len(captions) or count, root.seed)
    found = [*captions] or clips.captions or [""] * clips.size
    places = torch.arange(len(found)) % clips.size  # the first again where they end
    fields: dict[str, Any] = {"scalars": {k: v[places] for k, v in clips.scalars.items()}}
    if asked := conditioning.images():
        shown = clips.image if clips.video is None else clips.video[:, :, [0, -1][: len(asked)]]
        assert shown is not None  # wiring has asked for one of them
        fields["image"] = shown[places]
    return prompts_batch(found, **fields, **_stored_text(root, source, found))


def _stored_text(root: Root, source: Any, captions: Sequence[str]) -> dict[str, Any]:
    """Embeddings of captions where conditioning wants them from the data; else nothing."""
    if "text" not in root.conditioning.needs():
        return {}
    found = [source.embedded(caption) for caption in captions]
    absent = [c for c, tensors in zip(captions, found, strict=True) if tensors is None]
    if absent:
        raise ConfigError(
            f"prompts: no embedding of {absent[0]!r} is stored, and conditioning.weights=cached "
            "has no encoder; name one with conditioning.weights=FOLDER, or store it: task=encode "
            "task.prompts=[...]"
        )
    return {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}


def given(
    root: Root,
    captions: Sequence[str],
    images: Files = (),
    end_images: Files = (),
    count: int = 8,
    **scalars: float | None,
) -> Batch:
    """A batch of `captions` with images, one for all or one for each, and rates that are not None.

    Without captions and images that of the data. Raises ConfigError for what the conditioning is
    not told, for what it must be told and is not, and for files that are no images.
    """
    files = {"images": images, "end_images": end_images}
    check(root, captions, images, end_images, scalars)
    if not captions and not images and not end_images:
        batch = of_data(root, (), count)
    else:
        size = max(len(captions), *map(len, files.values()))
        words = _for_each(captions or [""], size)
        batch = prompts_batch(words, **_stored_text(root, registry.create(root.data), words))
        if asked := root.conditioning.images():
            clip = root.data.clips()[0]
            rows = [_for_each(files[SETTINGS[name]], size) for name in asked]
            shown = [[picture(file, clip) for file in row] for row in rows]
            batch.image = torch.stack([torch.stack(row) for row in shown], 2)
    rates = {name: value for name, value in scalars.items() if value is not None}
    told = {name: torch.full((batch.size,), float(value)) for name, value in rates.items()}
    return replace(batch, scalars=batch.scalars | told)


def _for_each(values: Sequence[Any], count: int) -> list[Any]:
    return [*values] * count if len(values) == 1 else [*values]


def picture(file: Path | str, clip: Clip) -> Tensor:
    """A file as (3, H, W) in [-1, 1] of the size of `clip`: covered, and the middle cut out.

    Resized as published for DynamiCrafter (antialiased, bilinear), but where a picture is narrower
    than the clip: there its width fills the clip, and the original adds black bars. Raises
    ConfigError where it is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(Path(file).expanduser()) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read as an image ({e})") from e
    pixels = torch.from_numpy(np.asarray(_covering(image, clip.height, clip.width)).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _covering(image: Image, height: int, width: int) -> Image:
    from PIL.Image import Resampling

    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image if size == image.size else image.resize(size, Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
