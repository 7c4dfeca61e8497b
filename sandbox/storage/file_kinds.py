"""Detects the kind of a file from its first bytes, for messages about wrong files."""

import json
import re
import zipfile
from pathlib import Path

SAFETENSORS, TORCH, PICKLE = "a safetensors file", "a torch file", "a pickle"
HEAD = 1024  # bytes that are looked at
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
LONGEST_JSON = 50_000_000  # bytes; an index of weights has less
PREFIXES = {
    b"GGUF": "a GGUF file (quantised weights); want the original safetensors",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras weights)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\xfd7zXZ\x00": "an xz archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"\x1aE\xdf\xa3": "a Matroska or WebM video",
    b"PAR1": "a Parquet table",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
}
WANT, AGAIN = "want the file itself", "the download was not finished; download it again"


def kind_of_file(path: Path) -> str:
    """The kind of the file at `path`, such as "an HTML page (...)", with a hint where one helps.

    SAFETENSORS, TORCH and PICKLE for files that may hold weights. Raises OSError.
    """
    if path.is_dir():
        return "a folder"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not size:
        return f"an empty file; {AGAIN}"
    if not any(head) and size > 8:
        return f"a file of zeros; {AGAIN}"
    if found := next((what for start, what in PREFIXES.items() if head.startswith(start)), None):
        return found
    if head.startswith(b"PK"):
        return _zip(path)
    if head[4:8] == b"ftyp":
        return "an MP4 or QuickTime video"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "a WebP image", b"AVI ": "an AVI video"}.get(head[8:12], "a RIFF file")
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < max(LONGEST_HEADER, size):
        return _safetensors(path, size)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    return _text(path, head)


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.rpartition("/")[2] for name in file.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"a torch file or zip archive that is cut short or damaged; {AGAIN}"
    if "constants.pkl" in names:
        return "a TorchScript program; want its state_dict"
    if "data.pkl" in names:
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return "a zip archive; unpack it first"


def _safetensors(path: Path, size: int) -> str:
    """SAFETENSORS, or how the file is damaged; its header states its length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length < LONGEST_HEADER else b""
    if 8 + length > size:
        return f"{SAFETENSORS} that is cut short in its header; {AGAIN}"
    try:
        ends = [e["data_offsets"][1] for k, e in json.loads(text).items() if k != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{SAFETENSORS} whose header is damaged; {AGAIN}"
    if size < wanted:
        return f"{SAFETENSORS} that is cut short ({size} of {wanted} bytes); {AGAIN}"
    return SAFETENSORS


def _text(path: Path, head: bytes) -> str:
    """The kind of a text, or the first bytes of anything else."""
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < HEAD else "ignore").lstrip()
    except UnicodeDecodeError:
        text = "\0"
    if not text.isprintable() and any(c < " " and c not in "\t\r\n\f" for c in text):
        return f"a file of an unknown kind (first bytes: {head[:8].hex(' ')})"
    lower = text.lower()
    if lower.startswith("version https://git-lfs"):
        size = re.search(r"size (\d+)", text)
        of = f" of a file of {int(size[1]) / 1e6:,.1f} MB" if size else ""
        return f"a Git LFS pointer{of}; {WANT}: run `git lfs pull` in its repository"
    if "/annex/objects/" in lower[:200]:
        return f"a git-annex pointer; {WANT}: run `git annex get`"
    if lower.startswith(("<!doctype html", "<html", "<head")):
        return "an HTML page, not the file: the link leads to a web page or asks for a login"
    if lower.startswith("<"):
        return f"an XML text ({_line(text)}); {WANT}"
    if text.startswith(("{", "[")):
        return _json(path)
    return f"a text ({_line(text)}); {WANT}"


def _json(path: Path) -> str:
    try:
        found = json.loads(path.read_text("utf-8")) if path.stat().st_size < LONGEST_JSON else None
    except (ValueError, OSError, RecursionError):
        return f"a text that begins like JSON; {WANT}"
    if isinstance(found, dict) and "weight_map" in found:
        return f"the index of weights in several files; name its folder: {path.parent}"
    if isinstance(found, dict) and ("_class_name" in found or "architectures" in found):
        return f"the configuration of a model; name its folder or its weights: {path.parent}"
    return f"a JSON text; {WANT}"


def _line(text: str) -> str:
    line = text.splitlines()[0].strip() if text.strip() else ""
    return repr(line[:40] + ("..." if len(line) > 40 else ""))
