"""Class labels as one learned vector each, and a learned vector for no class.

As in DiT (Peebles & Xie 2023, 2212.09748, section 3.2) and ADM (Dhariwal & Nichol 2021,
2105.05233): the backbone adds the vector to its time embedding, and training drops labels for
classifier-free guidance (Ho & Salimans 2022, 2207.12598).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from sandbox.contracts import (
    Batch,
    Clip,
    ConditioningConfig,
    Conditions,
    Draws,
    Encode,
    Slots,
    in_range,
)
from sandbox.registry import register


@register("conditioning", "classes")
class Classes(nn.Module):
    """Class labels: a learned embedding of each class, dropped to one of no class."""

    @dataclass
    class Config(ConditioningConfig):
        """num_classes: null is that of the data; width: embedding size; drop_label: probability
        that training replaces a label by "no class". Prompts are names or numbers of classes.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("drop_label",)

        num_classes: int | None = None
        width: int = 64
        drop_label: float = 0.1

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("num_classes", self.num_classes, 1)
            yield from in_range("width", self.width, 1)
            yield from in_range("drop_label", self.drop_label, 0, 1)

        def needs(self) -> frozenset[str]:
            return frozenset({"label"})

        def labelled(self, count: int) -> Self:
            return self.agree(num_classes=count)

        def signals(self) -> tuple[str, ...]:
            return ("label",)

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            return Slots(vector=self.width)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.num_classes is None:
            raise ValueError("conditioning.num_classes=null: want a number, or let wiring fill it")
        self.table = nn.Embedding(cfg.num_classes + 1, cfg.width)  # N(0, 1); the last: no class

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"label": draws.uniform("drop_label") < self.cfg.drop_label}

    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        """The embeddings of the batch's labels (B,); `num_classes` itself is no class.

        Raises ValueError if the batch has no labels, or has negative prompts.
        """
        if "label" not in batch.scalars:
            raise ValueError("conditioning=classes needs labels, and the batch has none")
        if batch.negative is not None:
            raise ValueError("conditioning=classes has no negative prompts, and the batch has some")
        labels = batch.scalars["label"].to(self.table.weight.device).long()
        if (dropped := drop.get("label")) is not None:
            labels = torch.where(dropped.to(labels.device), self.table.num_embeddings - 1, labels)
        return Conditions(vector=self.table(labels))  # (B, width)
