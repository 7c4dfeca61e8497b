"""Captions as words, and words as numbers, without a vocabulary."""

import hashlib
import re
from functools import lru_cache


@lru_cache(maxsize=65_536)
def row(word: str, buckets: int) -> int:
    """Row of `word` in 1..buckets, the same on every machine; words may share one."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest) % buckets


def words_of(caption: str) -> list[str]:
    """Lower-case words without punctuation: "A red 3, moving." -> a, red, 3, moving."""
    return re.findall(r"\w+", caption.lower())
