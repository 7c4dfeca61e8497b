"""Denoising with the dispersive loss on hidden features (Wang & He 2025, 2506.09027)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from plugins._configs.backbone import block_at, check_blocks
from sandbox.contracts import (
    BackboneConfig,
    Draws,
    Example,
    FeaturesConfig,
    MethodConfig,
    Model,
    Terms,
    above,
    in_range,
)
from sandbox.registry import register


@register("method", "dispersive")
class Dispersive:
    """Denoising, and hidden features of the clips of a micro-batch repel each other.

    Needs no encoder and no second view. The InfoNCE variant with squared distances (equation 6).
    """

    @dataclass
    class Config(MethodConfig):
        """module: backbone module whose output is dispersed; null: the block at a quarter of the
        depth, as in the paper.

        weight: factor of the dispersive loss; temperature: of its distances.
        """

        module: str | None = None
        weight: float = 0.5
        temperature: float = 0.5

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.module == "":
                yield "module='': want the name of a module of the backbone, or null"
            yield from in_range("weight", self.weight, 0, 1e6)
            yield from above("temperature", self.temperature, 0, 1e6)

        def features(self) -> tuple[str, ...]:
            return (self.module,) if self.module else ()

        def wired(self, backbone: BackboneConfig, features: FeaturesConfig | None) -> Self:
            check_blocks(self.features(), backbone, "module")
            return self if self.module else replace(self, module=block_at(backbone, 0.25, "module"))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0 = example.z0
        t, eps = model.schedule.draw_t(draws), draws.normal("noise", z0)
        z_t = model.schedule.noised(z0, eps, t)
        out = model(z_t, t, example.conditions(), self.cfg.features())
        terms = model.loss(model.schedule, out.raw, z0, eps, t)
        spread = dispersion(out.features[self.cfg.features()[0]], self.cfg.temperature)
        total = terms.total + self.cfg.weight * spread
        return Terms(total, terms.per_sample, terms.log | {"dispersive": spread.detach()})


def dispersion(features: Tensor, temperature: float) -> Tensor:
    """log of the mean of exp(-D / temperature) over all pairs of features (B, ...).

    D is the squared distance divided by the number of elements. 0 for equal features.
    """
    x = features.flatten(1).float()
    norms = x.square().sum(1)
    distance = (norms[:, None] + norms - 2 * x @ x.T).clamp_min(0) / x.shape[1]
    return torch.logsumexp(-distance.flatten() / temperature, 0) - 2 * math.log(len(x))
