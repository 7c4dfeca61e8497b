"""L1 + KL: the loss of the KL autoencoder (Rombach et al. 2022, appendix G) without its perceptual and adversarial terms."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import FirstStageConfig, PluginConfig, Terms, in_range
from sandbox.registry import register


@register("reconstruction", "kl")
class L1KL:
    """Absolute error and the KL divergence of a Gaussian posterior."""

    @dataclass
    class Config(PluginConfig):
        kl_weight: float = 1e-6

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("kl_weight", self.kl_weight, 0, 1e6)

        def accepts(self, first_stage: FirstStageConfig) -> Iterator[str]:
            """Problems with this first stage, one line each."""
            if first_stage.regularizer() != "kl":
                yield f"reconstruction=kl needs a Gaussian posterior, {first_stage.plugin} has none"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, out: Reconstruction) -> Terms:
        """x (B, 3, T, H, W). The published loss sums over a clip; here both terms are divided by its size.

        So `kl_weight` balances as published, and neither loss nor learning rate depends on the size of a clip.
        """
        rec = (out.video - x).abs().flatten(1).mean(1)
        kl = out.posterior.kl() / x[0].numel()
        total = rec + self.cfg.kl_weight * kl
        log = {"rec_loss": rec.mean().detach(), "kl_loss": kl.mean().detach()}
        return Terms(total.mean(), total, log | out.log)
