"""Validates prompts, images and scalars against the conditioning, without importing torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sandbox.config.root import Root
from sandbox.contracts import LABEL, BadItem, ConfigError

# conditioning image -> task.SETTING
SETTINGS = {"start": "images", "end": "end_images", "video": "videos"}
PROMPTED = frozenset({"captions", "text", LABEL})  # fields that a prompt gives
LARGEST = 64 * 2**20  # bytes of a file of prompts
Files = Sequence[Path | str]


def read_prompts(file: str) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are skipped. Raises ConfigError."""
    path = Path(file).expanduser()
    name = f"task.prompts_file={file}"
    if not path.is_file():
        raise ConfigError(f"{name}: no such file or folder")
    if (size := path.stat().st_size) > LARGEST:
        raise ConfigError(f"{name}: {size} bytes; want at most {LARGEST}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{name}: cannot be read ({e}); want UTF-8 text") from e
    if not (found := tuple(line.strip() for line in lines if line.strip())):
        raise ConfigError(f"{name}: no prompts in it; want one prompt a line")
    return found


def check(
    root: Root,
    captions: Sequence[str],
    images: Files,
    end_images: Files,
    scalars: Mapping[str, float | None],
    videos: Files = (),
) -> None:
    """Raises ConfigError for unused or missing inputs, and for files that are not images.

    Without captions and images, the data provide them. scalars: by name, such as fps=24; None is
    unset.
    """
    problems = [*of_captions(root, captions)]
    if captions or images or end_images or videos:
        files = {"images": images, "end_images": end_images, "videos": videos}
        problems += _of_images(root, captions, files)
    problems += [
        f"task.{name}={value}: {_name(root)} does not use {name} with these settings"
        for name, value in scalars.items()
        if value is not None and name not in root.conditioning.needs()
    ]
    if problems:
        raise ConfigError(*problems)


def of_captions(root: Root, captions: Sequence[str]) -> Iterator[str]:
    """The problem with captions that the conditioning does not use."""
    if captions and not root.conditioning.needs() & PROMPTED:
        yield f"prompts={short(captions)}: {_name(root)} uses no captions; want only a count"


def short(captions: Sequence[str]) -> str:
    """The first captions, cut, for a message."""
    more = f", and {len(captions) - 3} more" if len(captions) > 3 else ""
    return f"[{', '.join(repr(c[:60] + '...' * (len(c) > 60)) for c in captions[:3])}{more}]"


def _name(root: Root) -> str:
    return f"conditioning={root.conditioning.plugin.rpartition('/')[2]}"


def _of_images(root: Root, captions: Sequence[str], files: dict[str, Files]) -> Iterator[str]:
    from sandbox.data.image_files import image_size
    from sandbox.data.video_files import video_size

    needed = {"images": "start image", "end_images": "end image",
              "videos": "known frames as a video"}  # fmt: skip
    wanted = {SETTINGS[name]: name for name in root.conditioning.images()}
    count = max(1, len(captions), *map(len, files.values()))
    for setting, of in files.items():
        typed = f"task.{setting}=[{', '.join(map(str, of))}]"
        if of and setting not in wanted:
            yield f"{typed}: {_name(root)} does not use this image with these settings; remove it"
        elif setting in wanted and len(of) not in (1, count):
            yield (
                f"{typed}: {_name(root)} needs the {needed[setting]}; give one file for all "
                f"prompts, or one for each of the {count}"
            )
    if len(captions) not in (0, 1, count):
        yield f"task.prompts has {len(captions)} captions: want 1 or {count}, the number of images"
    for setting, of in files.items():
        for i, file in enumerate(of):
            try:
                size_of = video_size if setting == "videos" else image_size
                size_of(Path(file).expanduser())
            except BadItem as e:
                yield f"task.{setting}[{i}]={file}: {e}"
