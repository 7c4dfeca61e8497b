"""Whether prompts, images and rates are what a conditioning is told; asked before torch is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sandbox.config.root import Root
from sandbox.contracts import ConfigError

SETTINGS = {"start": "images", "end": "end_images"}  # of task=sample, for what a conditioning asks
Files = Sequence[Path | str]


def check(
    root: Root,
    captions: Sequence[str],
    images: Files,
    end_images: Files,
    rates: Mapping[str, float | None],
) -> None:
    """Raises ConfigError for what the conditioning is not told, for what it must be told and is
    not, and for files that are no images. Without captions and images, all is that of the data.
    rates: by name, such as fps=24; None is not told.
    """
    files = {"images": images, "end_images": end_images}
    is_of_data = not captions and not images and not end_images
    found = [*of_captions(root, captions)]
    if not is_of_data:
        found += _of_images(root, captions, files)
        found += _unreadable(files)
    needs, name = root.conditioning.needs(), _name(root)
    found += [
        f"task.{rate}={value}: {name} is told no {rate} with these settings"
        for rate, value in rates.items()
        if value is not None and rate not in needs
    ]
    if found:
        raise ConfigError(*found)


def of_captions(root: Root, captions: Sequence[str]) -> Iterator[str]:
    """The problem with captions that none is told."""
    if captions and not root.conditioning.needs() & {"captions", "text"}:
        yield f"prompts={[*captions]}: {_name(root)} is told none; want a count alone"


def _name(root: Root) -> str:
    return f"conditioning={root.conditioning.plugin.rpartition('/')[2]}"


def _of_images(root: Root, captions: Sequence[str], files: dict[str, Files]) -> Iterator[str]:
    asked = {SETTINGS[name]: name for name in root.conditioning.images()}
    count = max(1, len(captions), *map(len, files.values()))
    for setting, of in files.items():
        said = f"task.{setting}=[{', '.join(map(str, of))}]"
        if of and setting not in asked:
            yield f"{said}: {_name(root)} is told no such image with these settings; leave it out"
        elif setting in asked and len(of) not in (1, count):
            yield (
                f"{said}: {_name(root)} is told the {asked[setting]} image; name a file for all "
                f"prompts, or one for each of the {count}"
            )
    if len(captions) not in (0, 1, count):
        yield f"task.prompts has {len(captions)} captions: want one for all {count} images or each"


def _unreadable(files: dict[str, Files]) -> Iterator[str]:
    from PIL import Image

    for setting, of in files.items():
        for i, file in enumerate(of):
            try:
                Image.open(Path(file).expanduser()).close()
            except OSError as e:
                why = str(e).partition(": ")[0] if isinstance(e, FileNotFoundError) else e
                yield f"task.{setting}[{i}]={file}: cannot be read as an image ({why})"
