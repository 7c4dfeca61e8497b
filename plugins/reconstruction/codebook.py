"""Pixel and codebook loss of the VQ autoencoder (Esser et al. 2021; Rombach et al. 2022).

Without the perceptual and adversarial terms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import FirstStageConfig, PluginConfig, Terms, in_range
from sandbox.registry import register


@register("reconstruction", "codebook")
class L1Codebook:
    """Absolute and squared error, and the codebook loss of a VQ autoencoder."""

    @dataclass
    class Config(PluginConfig):
        codebook_weight: float = 1.0
        l1_weight: float = 0.1  # published: 1 without squared error, which learns far more slowly
        l2_weight: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("codebook_weight", "l1_weight", "l2_weight"):
                yield from in_range(name, getattr(self, name), 0, 1e6)

        def accepts(self, first_stage: FirstStageConfig) -> Iterator[str]:
            """Problems with this first stage, one line each."""
            if first_stage.regularizer() != "codebook":
                yield f"reconstruction=codebook needs a codebook, {first_stage.plugin} has none"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, out: Reconstruction, step: int = 0) -> Terms:
        """As published, all terms are means."""
        error = (out.video - out.target).flatten(1)
        rec = self.cfg.l1_weight * error.abs().mean(1) + self.cfg.l2_weight * error.square().mean(1)
        codebook_loss = cast(Tensor, out.codebook_loss)  # checked by `accepts`
        total = rec + self.cfg.codebook_weight * codebook_loss
        log = {"rec_loss": rec.mean().detach(), "quant_loss": codebook_loss.mean().detach()}
        return Terms(total.mean(), total, log | out.log)
