"""Denoising with hidden features that are aligned with those of a frozen encoder (REPA).

Yu et al. 2024, 2410.06940.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks.backbone import wired_number
from plugins._configs.backbone import block_at, check_blocks
from sandbox.contracts import (
    BackboneConfig,
    ConfigError,
    Draws,
    Example,
    FeaturesConfig,
    MethodConfig,
    Model,
    Terms,
    in_range,
)
from sandbox.registry import register


@register("method", "repa")
class REPA(nn.Module):
    """Denoising, and a projection of hidden features agrees with features=... of the clean frames.

    The projection, an MLP of three layers, trains with the network (section 3.2).
    """

    @dataclass
    class Config(MethodConfig):
        """module: block whose output is aligned; null: the block at a quarter of the depth.

        weight: factor of the alignment (lambda); projector_width: hidden width of the projection,
        2048 in the paper. channels, feature_channels: of the block and of the encoder, filled in.
        """

        module: str | None = None
        weight: float = 0.5
        projector_width: int = 256
        channels: int | None = None
        feature_channels: int | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.module == "":
                yield "module='': want the name of a block of the backbone, or null"
            yield from in_range("weight", self.weight, 0, 1e6)
            for name in ("projector_width", "channels", "feature_channels"):
                yield from in_range(name, getattr(self, name), 1)

        def features(self) -> tuple[str, ...]:
            return (self.module,) if self.module else ()

        def encodes_video(self) -> bool:
            return True

        def has_weights(self) -> bool:
            return True

        def wired(self, backbone: BackboneConfig, features: FeaturesConfig | None) -> Self:
            check_blocks(self.features(), backbone, "module")
            module = self.module or block_at(backbone, 0.25, "module")
            if (hidden := backbone.hidden(module)) is None:
                raise ConfigError(f"module={module}: want a block: {', '.join(backbone.blocks())}")
            if features is None:
                return self  # reported as features=null
            return replace(self, module=module).agree(
                channels=hidden.channels, feature_channels=features.channels()
            )

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.projector_width
        self.projector = nn.Sequential(
            nn.Linear(wired_number(cfg, "channels"), width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, wired_number(cfg, "feature_channels")),
        )  # fmt: skip

    def forward(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0 = example.z0
        t, eps = model.schedule.draw_t(draws), draws.normal("noise", z0)
        z_t = model.schedule.noised(z0, eps, t)
        out = model(z_t, t, example.conditions(), self.cfg.features())
        terms = model.loss(model.schedule, out.raw, z0, eps, t)
        (hidden,) = out.features.values()
        aligned = self.alignment(hidden, example.features)
        total = terms.total + self.cfg.weight * aligned
        return Terms(total, terms.per_sample, terms.log | {"alignment": aligned.detach()})

    def alignment(self, hidden: Tensor, features: Tensor) -> Tensor:
        """() mean over positions of 1 - cosine: equation 8 plus 1.

        hidden (B, d, t, h, w); features (B, D, T, h', w'), averaged or interpolated to its grid.
        """
        projected = self.projector(hidden.movedim(1, -1))
        target = F.interpolate(features, hidden.shape[2:], mode="area")
        return 1 - F.cosine_similarity(projected, target.movedim(1, -1), dim=-1).mean()
