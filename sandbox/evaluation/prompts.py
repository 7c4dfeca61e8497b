"""Sampling inputs: captions, conditioning images and scalars."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
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
from sandbox.data.video_files import CONTAINERS, opened
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
    if problems := [*of_captions(root, captions)]:
        raise ConfigError(*problems)
    takes_text = bool(conditioning.needs() & PROMPTED)
    if not conditioning.images() and not conditioning.needs() & SCALAR_INPUTS:
        texts = [*captions] or (takes_text and source.prompts()[:count]) or [""] * count
        return prompts_batch(texts, **_of_texts(root, source, texts))
    clips = first_clips(source.split("val"), len(captions) or count, root.seed)
    texts = [*captions] or (takes_text and clips.captions) or [""] * clips.size
    places = torch.arange(len(texts)) % clips.size  # repeats clips
    fields: dict[str, Any] = {"scalars": {k: v[places] for k, v in clips.scalars.items()}}
    if conditioning.images():
        shown = clips.image
        if clips.video is not None:
            shown = clips.video[:, :, list(conditioning.known_frames(clips.video.shape[2]))]
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
    videos: Files = (),
    **scalars: float | None,
) -> Batch:
    """A batch of `captions` with images or videos (one for all, or one for each) and scalars.

    Without captions and files, `data_batch`. Raises ConfigError as `check` does.
    """
    files = {"images": images, "end_images": end_images, "videos": videos}
    check(root, captions, images, end_images, scalars, videos)
    if not captions and not any(files.values()):
        batch = data_batch(root, (), count)
    else:
        size = max(len(captions), *map(len, files.values()))
        texts = _for_each(captions or [""], size)
        batch = prompts_batch(texts, **_of_texts(root, registry.create(root.data), texts))
        if wanted := root.conditioning.images():
            clip = root.data.clips()[0]
            rows = [_for_each(files[SETTINGS[name]], size) for name in wanted]
            known = root.conditioning.known_frames(clip.frames)
            shown = [torch.stack([load_frames(file, clip, known) for file in row]) for row in rows]
            batch.image = torch.cat(shown, 2)
    filled = {k: torch.full((batch.size,), float(v)) for k, v in scalars.items() if v is not None}
    return replace(batch, scalars=batch.scalars | filled)


def _for_each(values: Sequence[Any], count: int) -> list[Any]:
    return [*values] * count if len(values) == 1 else [*values]


def load_frames(file: Path | str, clip: Clip, known: Sequence[int]) -> Tensor:
    """An image file as (3, 1, H, W), or the frames `known` of a video file as (3, N, H, W).

    A video has those frames alone, or at least all frames of the clip. Raises ConfigError.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() not in CONTAINERS:
        return load_image(file, clip)[:, None]
    try:
        with opened(path) as video:
            times = video.times
            frames = video.frames(times[0], times[0])
            images = [Image.fromarray(video.image(f)) for _, f in islice(frames, clip.frames)]
    except BadItem as e:
        raise ConfigError(f"{file}: {e}") from e
    if len(images) != len(known):
        if len(images) < clip.frames:
            raise ConfigError(
                f"{file}: has {len(images)} frames: want the {len(known)} known ones, or the "
                f"{clip.frames} of a clip"
            )
        images = [images[place] for place in known]
    return torch.stack([_pixels(image, clip) for image in images], 1)


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
    return _pixels(image, clip)


def _pixels(image: Image.Image, clip: Clip) -> Tensor:
    pixels = torch.from_numpy(np.asarray(_resize_and_crop(image, clip.height, clip.width)).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
