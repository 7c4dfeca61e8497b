"""Sampling inputs: captions, conditioning images and scalars."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.contracts import (
    LABEL,
    SCALARS,
    SIZES,
    BadItem,
    Batch,
    Clip,
    ConfigError,
    Labelled,
)
from sandbox.data.image_files import read_rgb
from sandbox.evaluation.evaluate import first_clips
from sandbox.evaluation.prompt_checks import PROMPTED, SETTINGS, Files, check, of_captions, short
from sandbox.model.latent_diffusion import prompts_batch

SCALAR_INPUTS = SCALARS - set(SIZES)


def data_batch(root: Root, captions: Sequence[str], count: int) -> Batch:
    """A batch of `captions`, else of the data's first `count` captions, else of empty ones.

    Conditioning images and scalars, and then missing captions, come from the first validation
    clips. Without a text encoder, cached embeddings are used. Raises ConfigError for captions that
    the conditioning does not use.
    """
    conditioning, source = root.conditioning, registry.create(root.data)
    if not conditioning.needs() & PROMPTED:
        if problems := [*of_captions(root, captions)]:
            raise ConfigError(*problems)
        return prompts_batch([""] * count)
    if not conditioning.images() and not conditioning.needs() & SCALAR_INPUTS:
        texts = [*captions] or source.prompts()[:count] or [""] * count
        return prompts_batch(texts, **_of_texts(root, source, texts))
    clips = first_clips(source.split("val"), len(captions) or count, root.seed)
    texts = [*captions] or clips.captions or [""] * clips.size
    places = torch.arange(len(texts)) % clips.size  # repeats clips
    fields: dict[str, Any] = {"scalars": {k: v[places] for k, v in clips.scalars.items()}}
    if wanted := conditioning.images():
        shown = clips.image if clips.video is None else clips.video[:, :, [0, -1][: len(wanted)]]
        assert shown is not None  # wiring checks that data provide one
        fields["image"] = shown[places]
    given = _of_texts(root, source, texts)
    fields["scalars"] |= given.pop("scalars", {})
    return prompts_batch(texts, **fields, **given)


def _of_texts(root: Root, source: Any, captions: Sequence[str]) -> dict[str, Any]:
    """Fields of a batch that the data derive from captions: cached embeddings and labels."""
    found = _cached_text(root, source, captions)
    if LABEL in root.conditioning.needs():
        labels = [_label(root, source, caption) for caption in captions]
        found["scalars"] = {LABEL: torch.tensor(labels, dtype=torch.float32)}
    return found


def _label(root: Root, source: Any, caption: str) -> int:
    """The class of a prompt: a name, a number, or the number after the last one for "" (none)."""
    count = root.data.labels()
    if not caption:
        return count
    if caption.isdecimal() and int(caption) < count:
        return int(caption)
    found = source.label(caption) if isinstance(source, Labelled) else None
    if found is None:
        raise ConfigError(
            f"prompts: {short([caption])} names no class of data={root.data.plugin[5:]}; want a "
            f"number below {count}, a name of the data, or an empty prompt for no class"
        )
    return found


def _cached_text(root: Root, source: Any, captions: Sequence[str]) -> dict[str, Any]:
    """Cached caption embeddings if the conditioning takes them from the data; else empty."""
    if "text" not in root.conditioning.needs():
        return {}
    embedded = [source.embedded(caption) for caption in captions]
    absent = [c for c, tensors in zip(captions, embedded, strict=True) if tensors is None]
    if absent:
        raise ConfigError(
            f"prompts: no embedding of {short(absent)} is cached, and conditioning.weights=cached "
            "has no encoder; set conditioning.weights=FOLDER, or cache it with task=encode "
            "task.prompts=[...]"
        )
    return {name: torch.stack([tensors[name] for tensors in embedded]) for name in embedded[0]}


def user_batch(
    root: Root,
    captions: Sequence[str],
    images: Files = (),
    end_images: Files = (),
    count: int = 8,
    **scalars: float | None,
) -> Batch:
    """A batch of `captions` with images (one for all, or one for each) and scalars.

    Without captions and images, `data_batch`. Raises ConfigError as `check` does.
    """
    files = {"images": images, "end_images": end_images}
    check(root, captions, images, end_images, scalars)
    if not captions and not images and not end_images:
        batch = data_batch(root, (), count)
    else:
        size = max(len(captions), *map(len, files.values()))
        texts = _for_each(captions or [""], size)
        batch = prompts_batch(texts, **_of_texts(root, registry.create(root.data), texts))
        if wanted := root.conditioning.images():
            clip = root.data.clips()[0]
            rows = [_for_each(files[SETTINGS[name]], size) for name in wanted]
            shown = [torch.stack([load_image(file, clip) for file in row]) for row in rows]
            batch.image = torch.stack(shown, 2)
    filled = {k: torch.full((batch.size,), float(v)) for k, v in scalars.items() if v is not None}
    return replace(batch, scalars=batch.scalars | filled)


def _for_each(values: Sequence[Any], count: int) -> list[Any]:
    return [*values] * count if len(values) == 1 else [*values]


def load_image(file: Path | str, clip: Clip) -> Tensor:
    """An image file as (3, H, W) in [-1, 1], resized to cover `clip` and centre-cropped.

    Resized as published for DynamiCrafter (antialiased, bilinear), except for images narrower than
    the clip, which fill its width; the original adds black bars. Raises ConfigError for files that
    are not images.
    """
    try:
        image = read_rgb(Path(file).expanduser())
    except BadItem as e:
        raise ConfigError(f"{file}: {e}") from e
    pixels = torch.from_numpy(np.asarray(_resize_and_crop(image, clip.height, clip.width)).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
