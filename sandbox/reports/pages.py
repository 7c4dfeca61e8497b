"""Self-contained HTML pages and texts from the jinja2 templates in `templates/`."""

import base64
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sandbox.runs.identity import flat_settings

FILE_LIMIT = 4 * 2**20  # bytes of one embedded file
PAGE_LIMIT = 16 * 2**20  # bytes of all embedded files
CHARS = 300  # of one setting
MEDIA = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg",
         ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}  # fmt: skip

TEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$",
})  # fmt: skip


def flatten(settings: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Dotted name -> value of nested settings."""
    return {k: json.loads(value) for k, value in flat_settings(settings, name).items()}


def render(template: str, **context: Any) -> str:
    """The text `templates/TEMPLATE.j2`, such as "run.html"; only HTML is escaped."""
    return _environment().get_template(f"{template}.j2").render(context)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader, autoescape=lambda name: ".html" in (name or ""), trim_blocks=True,
        lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "setting": setting, "size": byte_size, "percent": percent, "unquote": unquote,
        "tex": lambda text: text.translate(TEX),
    }  # fmt: skip
    return environment


def setting(value: object) -> str:
    """A setting as typed on the command line, at most CHARS long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
    return shown if len(shown) <= CHARS else shown[: CHARS - 3] + "..."


def byte_size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


class Media:
    """Files embedded in a page as data URIs, up to PAGE_LIMIT."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.room = PAGE_LIMIT

    def item(self, path: Path, caption: str) -> dict[str, Any]:
        """What the template's `media` macro shows: the file, or why it is not embedded."""
        file = self.find(path)
        kind = MEDIA.get(file.suffix.lower())
        item = {"caption": caption, "name": path.name, "href": self.href(file), "source": None}
        if not file.is_file():
            return item | {"problem": "no such file"}
        size = file.stat().st_size
        if kind is None:
            return item | {"problem": "is not an image or video", "bytes": size}
        if size > min(FILE_LIMIT, self.room):
            return item | {"problem": "is too large for this page", "bytes": size}
        self.room -= size
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        return item | {"source": f"data:{kind};base64,{data}", "is_video": "video" in kind}

    def find(self, path: Path) -> Path:
        """Relative paths are resolved against the run folder, else the current directory."""
        inside = self.folder / path
        return path if path.is_file() and not inside.is_file() else inside

    def href(self, file: Path) -> str | None:
        """A relative link to a file in the run folder; None for files elsewhere."""
        folder, file = self.folder.resolve(), file.resolve()
        return quote(file.relative_to(folder).as_posix()) if file.is_relative_to(folder) else None
