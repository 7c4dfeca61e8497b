"""Pixel, LPIPS and adversarial loss of VQGAN and of latent diffusion's first stages.

Esser et al. 2021 (2012.09841), eq. 4 to 7; Rombach et al. 2022, appendix G. Names of parameters and
logged values are those of the published VQLPIPSWithDiscriminator (codebook) and
LPIPSWithDiscriminator (KL).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.discriminator3d import FramesAndClips
from plugins._blocks.lpips import LPIPS
from plugins._blocks.patchgan import NLayerDiscriminator
from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import ConfigError, FirstStageConfig, PluginConfig, Terms, in_range, one_of
from sandbox.registry import register

GROUPS = 32  # norm groups of the 3-D discriminator, as published


@register("reconstruction", "lpips_gan")
class LPIPSWithDiscriminator(nn.Module):
    """Absolute error, LPIPS, KL or codebook loss, and an adaptively weighted PatchGAN."""

    @dataclass
    class Config(PluginConfig):
        """disc_start: optimizer steps before the adversarial terms; disc_loss: hinge or vanilla.

        lpips: "hub", "random" (for tests) or a folder or file of weights; unused if
        perceptual_weight is 0. logvar_init: log-variance of the KL form, which is never trained.
        disc3d_channels: channels of a second discriminator, on clips (EasyAnimate); empty: none.
        """

        l1_weight: float = 1.0
        l2_weight: float = 0.0
        perceptual_weight: float = 0.0  # as published 1, which needs LPIPS weights
        lpips: str = "hub"
        kl_weight: float = 1e-6
        logvar_init: float = 0.0
        codebook_weight: float = 1.0
        disc_start: int = 0
        disc_factor: float = 1.0
        disc_weight: float = 0.5
        disc_loss: str = "hinge"
        disc_num_layers: int = 2
        disc_ndf: int = 16
        disc3d_channels: tuple[int, ...] = ()

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("l1_weight", "l2_weight", "perceptual_weight", "kl_weight",
                         "codebook_weight", "disc_factor", "disc_weight"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 0, 1e6)
            yield from in_range("logvar_init", self.logvar_init, -30, 30)
            yield from in_range("disc_start", self.disc_start, 0)
            yield from one_of("disc_loss", self.disc_loss, ("hinge", "vanilla"))
            yield from in_range("disc_num_layers", self.disc_num_layers, 1, 8)
            yield from in_range("disc_ndf", self.disc_ndf, 1)
            if any(c < 1 or c % GROUPS for c in self.disc3d_channels):
                yield f"disc3d_channels={list(self.disc3d_channels)}: want multiples of {GROUPS}"
            if not self.lpips:
                yield "lpips='': want hub, random, or a folder or file of weights"

        def files(self) -> dict[str, str | None]:
            is_read = self.perceptual_weight > 0 and self.lpips not in ("hub", "random")
            return {"lpips": self.lpips} if is_read else {}

        def accepts(self, first_stage: FirstStageConfig) -> Iterator[str]:
            """Problems with this first stage, one line each."""
            if first_stage.fitted() != "trained":
                yield f"reconstruction=lpips_gan: {first_stage.plugin} is not trained"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.perceptual_loss = LPIPS(cfg.lpips) if cfg.perceptual_weight else None
        if cfg.disc3d_channels:
            self.discriminator = FramesAndClips(
                cfg.disc_ndf, cfg.disc_num_layers, tuple(cfg.disc3d_channels)
            )
        else:
            self.discriminator = NLayerDiscriminator(cfg.disc_ndf, cfg.disc_num_layers)
        self.discriminator.requires_grad_(False)  # enabled for the discriminator's update
        # As published: a parameter that is in no optimizer.
        self.logvar = nn.Parameter(torch.tensor(cfg.logvar_init), requires_grad=False)

    def forward(self, out: Reconstruction, step: int = 0) -> Terms:
        """The autoencoder's loss after `step` optimizer steps."""
        cfg, x, y = self.cfg, frames(out.target), frames(out.video)
        error = cfg.l1_weight * (x - y).abs() + cfg.l2_weight * (x - y).square()
        log = dict(out.log)
        if self.perceptual_loss is not None:
            distance = self.perceptual_loss(x, y)
            error = error + cfg.perceptual_weight * distance[:, None, None, None]
            log["p_loss"] = distance.mean()
        log["rec_loss"] = error.mean()
        per_frame, log["nll_loss"], regularizer = self._form(error, out, log)
        first, *rest = (logits.mean() for logits in self.logits(out.video))
        g_loss = -sum(rest, first)
        d_weight = self.adaptive_weight(log["nll_loss"], g_loss, out.last_layer)
        total = log["nll_loss"] + regularizer.mean() + d_weight * self.factor(step) * g_loss
        log |= {"g_loss": g_loss, "d_weight": d_weight, "total_loss": total}
        log["disc_factor"] = total.new_tensor(self.factor(step))
        per_sample = per_frame.view(out.target.shape[0], -1).mean(1) + regularizer
        return Terms(total, per_sample, {name: value.detach() for name, value in log.items()})

    def _form(
        self, error: Tensor, out: Reconstruction, log: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each frame (B*T,), its mean (), and the weighted regulariser (B,).

        As published: the codebook form averages over a frame and the KL form sums.
        """
        if out.codebook_loss is not None:
            log["quant_loss"] = out.codebook_loss.mean()
            per_frame = error.flatten(1).mean(1)
            return per_frame, per_frame.mean(), self.cfg.codebook_weight * out.codebook_loss
        kl = out.posterior.kl()
        log |= {"kl_loss": kl.mean(), "logvar": self.logvar}
        per_frame = (error / self.logvar.exp() + self.logvar).flatten(1).sum(1)
        return per_frame, per_frame.mean(), self.cfg.kl_weight * kl

    def discriminate(self, out: Reconstruction, step: int = 0) -> Terms:
        """The discriminator's loss, without gradients for the autoencoder."""
        per_sample, log = out.target.new_zeros(len(out.target)), {}
        real_logits, fake_logits = (self.logits(v.detach()) for v in (out.target, out.video))
        for real, fake, kind in zip(real_logits, fake_logits, ("", "_3d"), strict=False):
            if self.cfg.disc_loss == "hinge":
                losses = F.relu(1 - real), F.relu(1 + fake)
            else:
                losses = F.softplus(-real), F.softplus(fake)
            per_sample = per_sample + 0.5 * sum(x.view(len(per_sample), -1).mean(1) for x in losses)
            log |= {f"logits_real{kind}": real.mean(), f"logits_fake{kind}": fake.mean()}
        per_sample = self.factor(step) * per_sample
        log["disc_loss"] = per_sample.mean()
        return Terms(per_sample.mean(), per_sample, {k: v.detach() for k, v in log.items()})

    def logits(self, video: Tensor) -> list[Tensor]:
        """Logits of the frames of a video, and of the clips with a 3-D discriminator."""
        logits = [self.discriminator(frames(video))]
        if isinstance(self.discriminator, FramesAndClips):
            logits.append(self.discriminator.discriminator3d(video))
        return logits

    def factor(self, step: int) -> float:
        return self.cfg.disc_factor if step >= self.cfg.disc_start else 0.0

    def adaptive_weight(self, nll: Tensor, g_loss: Tensor, last_layer: Tensor | None) -> Tensor:
        """Weight that balances both gradient norms at the last layer (Esser et al. 2021, eq. 7)."""
        if not torch.is_grad_enabled():
            return nll.new_zeros(())  # as published, in validation
        if last_layer is None:
            raise ConfigError(
                "reconstruction=lpips_gan balances gradients at decoder.conv_out, which this first "
                "stage does not have; use reconstruction=kl or codebook"
            )
        if not last_layer.requires_grad:
            raise ConfigError(
                "reconstruction=lpips_gan balances gradients at decoder.conv_out, which trainable= "
                "freezes; use reconstruction=kl or codebook, or train it"
            )
        nll_grad, g_grad = (
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll, g_loss)
        )
        ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return ratio.clamp(0, 1e4).detach() * self.cfg.disc_weight


def frames(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")
