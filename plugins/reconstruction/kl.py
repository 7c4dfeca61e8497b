"""Pixel and KL loss of the KL autoencoder (Rombach et al. 2022, appendix G).

Without the perceptual and adversarial terms.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import FirstStageConfig, PluginConfig, Terms, in_range
from sandbox.registry import register


@register("reconstruction", "kl")
class L1KL:
    """Absolute and squared error, and the KL divergence of a Gaussian posterior."""

    @dataclass
    class Config(PluginConfig):
        kl_weight: float = 1e-6
        l1_weight: float = 0.1  # published: 1 without squared error, which learns far more slowly
        l2_weight: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("kl_weight", "l1_weight", "l2_weight"):
                yield from in_range(name, getattr(self, name), 0, 1e6)

        def accepts(self, first_stage: FirstStageConfig) -> Iterator[str]:
            """Problems with this first stage, one line each."""
            if first_stage.regularizer() != "kl":
                yield f"reconstruction=kl needs a Gaussian posterior, {first_stage.plugin} has none"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, out: Reconstruction, step: int = 0) -> Terms:
        """The published loss, a sum over the clip, divided by the size of the clip.

        `kl_weight` balances as published, and the learning rate is independent of the size.
        """
        error = (out.video - out.target).flatten(1)
        rec = self.cfg.l1_weight * error.abs().mean(1) + self.cfg.l2_weight * error.square().mean(1)
        kl = out.posterior.kl() / error.shape[1]
        total = rec + self.cfg.kl_weight * kl
        log = {"rec_loss": rec.mean().detach(), "kl_loss": kl.mean().detach()}
        return Terms(total.mean(), total, log | out.log)
