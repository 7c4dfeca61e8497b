"""Captions: dropping, splitting into words, and hashing words to table rows."""

import hashlib
import re
from functools import lru_cache

from torch import Tensor

from sandbox.contracts import Batch


def captions_of(batch: Batch, drop: Tensor | None, plugin: str) -> list[str]:
    """The batch's captions; those with `drop` (B,) True become the negative prompt, or "".

    Raises ValueError if the batch has no captions; `plugin` is the conditioning named in the error.
    """
    if batch.captions is None:
        raise ValueError(f"conditioning={plugin} needs captions, and the batch has none")
    if drop is None:
        return batch.captions
    negative = batch.negative or [""] * len(batch.captions)
    rows = zip(drop.tolist(), negative, batch.captions, strict=True)
    return [other if is_dropped else own for is_dropped, other, own in rows]


@lru_cache(maxsize=65_536)
def row(word: str, buckets: int) -> int:
    """Table row of `word` in 1..buckets, the same on every machine; words can collide."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest) % buckets


def words_of(caption: str) -> list[str]:
    """Lower-case words without punctuation: "A red 3, moving." -> a, red, 3, moving."""
    return re.findall(r"\w+", caption.lower())
