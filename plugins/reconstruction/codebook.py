"""L1 + codebook loss: that of the VQ autoencoder (Esser et al. 2021) without its perceptual and adversarial terms."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import FirstStageConfig, PluginConfig, Terms, in_range
from sandbox.registry import register


@register("reconstruction", "codebook")
class L1Codebook:
    """Absolute error and the codebook loss of a VQ autoencoder."""

    @dataclass
    class Config(PluginConfig):
        codebook_weight: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("codebook_weight", self.codebook_weight, 0, 1e6)

        def accepts(self, first_stage: FirstStageConfig) -> Iterator[str]:
            """Problems with this first stage, one line each."""
            if first_stage.regularizer() != "codebook":
                yield f"reconstruction=codebook needs a codebook, {first_stage.plugin} has none"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, out: Reconstruction) -> Terms:
        """x (B, 3, T, H, W); both terms are means, as published."""
        rec = (out.video - x).abs().flatten(1).mean(1)
        total = rec + self.cfg.codebook_weight * out.codebook_loss
        log = {"rec_loss": rec.mean().detach(), "quant_loss": out.codebook_loss.mean().detach()}
        return Terms(total.mean(), total, log | out.log)
