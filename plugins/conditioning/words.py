"""Captions as bags of words: a learned vector for each word, without encoder or vocabulary."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plugins._blocks.text import row, words_of
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

NONE = 0  # row of the table: no word

log = logging.getLogger(__name__)


@register("conditioning", "words")
class Words(nn.Module):
    """Learned embeddings of caption words, hashed into buckets; summed, as tokens, or both."""

    @dataclass
    class Config(ConditioningConfig):
        """What a caption becomes.

        offer: vector (the sum of the word embeddings), tokens (one for each word; their order is
        not told) or both; buckets: rows that words are hashed into; max_words: every caption is
        made this long: cut, or filled with the embedding of "no word", of which an empty or
        dropped one consists entirely; drop_text: probability that training drops a caption.
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
        self.has_cut = False

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"text": draws.uniform("drop_text") < self.cfg.drop_text}

    def forward(
        self,
        batch: Batch,
        grid: Clip,
        drop: dict[str, Tensor],
        draws: Draws,
        encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:
        """Dropped captions are replaced by the batch's negative ones, or else by no words."""
        if batch.captions is None:
            raise ValueError("conditioning=words needs captions, and the batch has none")
        rows = self.rows(batch.captions)
        if "text" in drop:
            instead = self.rows(batch.negative or [""] * len(batch.captions))
            rows = torch.where(drop["text"].to(rows.device)[:, None], instead, rows)
        tokens = self.table(rows)  # (B, L, D)
        return Conditions(
            context=tokens if self.cfg.offer != "vector" else None,
            vector=tokens.sum(1) if self.cfg.offer != "tokens" else None,
        )

    def rows(self, captions: list[str]) -> Tensor:
        """(B, max_words) int64 rows of the table."""
        length = self.cfg.max_words
        rows = torch.full((len(captions), length), NONE)
        for place, words in zip(rows, map(words_of, captions), strict=True):
            if len(words) > length and not self.has_cut:
                self.has_cut = True
                log.warning(
                    "captions are cut after conditioning.max_words=%d words, such as %r (%d words)",
                    length,
                    " ".join(words),
                    len(words),
                )
            words = words[:length]
            place[: len(words)] = torch.tensor([row(w, self.cfg.buckets) for w in words])
        return rows.to(self.table.weight.device)
