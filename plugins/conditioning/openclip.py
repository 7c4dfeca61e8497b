"""Captions encoded by OpenCLIP's frozen text tower, as in Stable Diffusion 2 and DynamiCrafter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plugins._blocks import openclip
from plugins._blocks.text import captions_of
from plugins._configs.weights import local_weights
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

LAYERS = ("penultimate", "last")
TOKENS = 77  # per caption, as published


@register("conditioning", "openclip")
class OpenCLIP(nn.Module):
    """OpenCLIP text tokens (77 per caption) from a frozen text tower."""

    @dataclass
    class Config(ConditioningConfig):
        """Sizes of the text tower use the names of open_clip's text_cfg.

        weights: a file (a CLIP checkpoint, or a published system that contains one), a name on the
        hub, or "random" (for tests and dry runs). layer: whether features come from the last or
        the penultimate block. drop_text: probability that training drops a caption.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("weights", "drop_text")

        weights: str = "random"
        layer: str = "penultimate"
        width: int = 32
        heads: int = 2
        layers: int = 2
        embed_dim: int = 16
        drop_text: float = 0.1

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("layer", self.layer, LAYERS)
            for name in ("width", "heads", "embed_dim"):
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("layers", self.layers, 2)
            if self.heads > 0 and self.width % self.heads:
                yield f"heads={self.heads}: want a divisor of width={self.width}"
            yield from in_range("drop_text", self.drop_text, 0, 1)

        def needs(self) -> frozenset[str]:
            return frozenset({"captions"})

        def files(self) -> dict[str, str | None]:
            return local_weights(self.weights, "random")

        def signals(self) -> tuple[str, ...]:
            return ("text",)

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            return Slots(context=Tokens(self.width, TOKENS))

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        openclip.check_weights(cfg.weights)
        model = openclip.TextModel(cfg.width, cfg.layers, cfg.heads, cfg.embed_dim)
        openclip.load(model, cfg.weights, "cond_stage_model.model.")
        skip = 1 if cfg.layer == "penultimate" else 0
        self.cond_stage_model = openclip.freeze(openclip.TextEncoder(model, skip))

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"text": draws.uniform("drop_text") < self.cfg.drop_text}

    @torch.no_grad()
    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        """Replaces dropped captions by the batch's negative prompts, or by empty ones."""
        captions = captions_of(batch, drop.get("text"), "openclip")
        device = self.cond_stage_model.get_parameter("model.logit_scale").device
        return Conditions(context=self.cond_stage_model(openclip.tokenizer()(captions).to(device)))
