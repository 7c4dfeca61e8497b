"""What a file is that is neither an image nor a video, from its first bytes."""

STARTS = {
    b"version https://git-lfs": "a Git LFS pointer; download the file with `git lfs pull`",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"#EXTM3U": "a playlist; download its videos",
}
PAGES = (b"<!doctype html", b"<html")


def kind_of(start: bytes) -> str | None:
    """ "it is a web page", from the first 64 bytes of a file; None if they tell nothing."""
    if not start:
        return "it is empty"
    if not any(start):
        return "it starts with zeros; copy it again"
    if start.lstrip().lower().startswith(PAGES):
        return "it is a web page"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "it is a WebP image"
    return next((f"it is {kind}" for head, kind in STARTS.items() if start.startswith(head)), None)
