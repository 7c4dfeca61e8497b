"""Captions as bags of words: one learned vector per hashed word, no encoder, no vocabulary."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plugins._blocks.text import captions_of, row, words_of
from sandbox.contracts import (
    Batch,
    Clip,
    ConditioningConfig,
    Conditions,
    Draws,
    Encode,
    Slots,
    Tokens,
    in_range,
    one_of,
)
from sandbox.registry import register

NO_WORD = 0  # row of the table that pads short captions

log = logging.getLogger(__name__)


@register("conditioning", "words")
class Words(nn.Module):
    """Learned embeddings of hashed caption words: their sum, one token per word, or both."""

    @dataclass
    class Config(ConditioningConfig):
        """Settings of the word embeddings.

        offer: vector (sum of the word embeddings), tokens (one per word, without positions) or
        both; width: embedding size; buckets: number of table rows that words are hashed into;
        max_words: captions are truncated or padded to this length with a learned "no word"
        embedding, and empty or dropped captions consist of it only; drop_text: probability that
        training drops a caption.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("drop_text",)

        offer: str = "vector"
        width: int = 64
        buckets: int = 1024
        max_words: int = 5
        drop_text: float = 0.1

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("offer", self.offer, ("vector", "tokens", "both"))
            for name in ("width", "buckets", "max_words"):
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("drop_text", self.drop_text, 0, 1)

        def needs(self) -> frozenset[str]:
            return frozenset({"captions"})

        def signals(self) -> tuple[str, ...]:
            return ("text",)

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            return Slots(
                context=Tokens(self.width, self.max_words) if self.offer != "vector" else None,
                vector=self.width if self.offer != "tokens" else 0,
            )

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.table = nn.Embedding(cfg.buckets + 1, cfg.width)  # N(0, 1)
        self.has_warned = False

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"text": draws.uniform("drop_text") < self.cfg.drop_text}

    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        """Replaces dropped captions by the batch's negative prompts, or by empty ones."""
        captions = captions_of(batch, drop.get("text"), "words")
        tokens = self.table(self.rows(captions))  # (B, L, D)
        return Conditions(
            context=tokens if self.cfg.offer != "vector" else None,
            vector=tokens.sum(1) if self.cfg.offer != "tokens" else None,
        )

    def rows(self, captions: list[str]) -> Tensor:
        """(B, max_words) int64 rows of the table; warns once if a caption is truncated."""
        length = self.cfg.max_words
        rows = torch.full((len(captions), length), NO_WORD)
        for target, words in zip(rows, map(words_of, captions), strict=True):
            if len(words) > length and not self.has_warned:
                self.has_warned = True
                log.warning(
                    "captions are cut after conditioning.max_words=%d words, such as %r (%d words)",
                    length,
                    " ".join(words)[:200],
                    len(words),
                )
            words = words[:length]
            target[: len(words)] = torch.tensor([row(w, self.cfg.buckets) for w in words])
        return rows.to(self.table.weight.device)
