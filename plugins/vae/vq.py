"""The VQ autoencoder of latent diffusion (Rombach et al. 2022), frame by frame, published names.

Latents are the features *before* quantisation, as in the published VQModelInterface; `decode`
quantises. The first stage of CelebAHQ-LDM-VQ-4 is the preset `vq_f4`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.autoencoder2d import Decoder, Encoder, per_frame
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import PointPosterior, Reconstruction
from plugins._configs.autoencoder2d import Autoencoder2DConfig
from sandbox.contracts import Draws, in_range, one_of
from sandbox.registry import register

ROWS = 1 << 14  # vectors per chunk, which bounds the (ROWS, n_embed) table of distances


def distances(rows: Tensor, codes: Tensor) -> Tensor:
    """Squared distances (N, K) of rows (N, C) and codes (K, C), summed in the published order."""
    return rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.mT


class Codebook(nn.Module):
    """Nearest-neighbour quantiser of VQGAN (Esser et al. 2021; van den Oord et al. 2017, eq. 3)."""

    def __init__(self, n_embed: int, embed_dim: int, beta: float, legacy: bool) -> None:
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(B, C, T, H, W) -> codes (B, T, H, W) int64; in float32, since bf16 changes codes."""
        b, _, t, h, w = z.shape
        rows = rearrange(z, "b c t h w -> (b t h w) c").float()
        codes = self.embedding.weight.float()
        with torch.autocast(z.device.type, enabled=False):
            found = [distances(part, codes).argmin(1) for part in rows.split(ROWS)]
        return torch.cat(found).view(b, t, h, w)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, T, H, W) int64 in [0, n_embed) -> (B, C, T, H, W)."""
        return rearrange(self.embedding(codes), "b t h w c -> b c t h w")

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, C, T, H, W) -> quantised, straight-through; loss (B,); codes (B, T, H, W)."""
        codes = self.nearest(z)
        quantised = self.lookup(codes)
        commitment = (quantised.detach() - z).square().flatten(1).mean(1)  # trains z
        codebook = (quantised - z.detach()).square().flatten(1).mean(1)  # trains the codes
        if self.legacy:  # as published: beta weights the codebook term instead of the commitment
            loss = commitment + self.beta * codebook
        else:
            loss = self.beta * commitment + codebook
        return z + (quantised - z).detach(), loss, codes


@register("vae", "vq")
class VQModel(FirstStage):
    """2-D autoencoder with a codebook (latent diffusion, CelebAHQ-LDM-VQ-4)."""

    @dataclass
    class Config(Autoencoder2DConfig):
        may_differ: ClassVar[tuple[str, ...]] = (
            *Autoencoder2DConfig.may_differ,
            "beta",
            "legacy",
            "force_not_quantize",
        )

        n_embed: int = 256  # number of codes
        beta: float = 0.25  # weight of one term of the codebook loss
        legacy: bool = True  # as published: beta weights the codebook term, not the commitment
        force_not_quantize: bool = False  # decode features without quantisation
        double_z: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("n_embed", self.n_embed, 1)
            yield from in_range("beta", self.beta, 0, 100)
            yield from one_of("double_z", self.double_z, [False])

        def regularizer(self) -> str:
            return "codebook"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg.embed_dim, cfg.scale_factor, cfg.shift)
        self.cfg, self.train_frames = cfg, cfg.train_frames
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = Codebook(cfg.n_embed, cfg.embed_dim, cfg.beta, cfg.legacy)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.embed_dim, cfg.z_channels, 1)

    def encode(self, x: Tensor) -> PointPosterior:
        """Features before quantisation."""
        features = per_frame(
            lambda f: self.quant_conv(self.encoder(f)), x, self.cfg.frames_per_pass
        )
        return PointPosterior(features)

    def posterior(self, stored: Tensor) -> PointPosterior:
        return PointPosterior(stored)

    def pixels(self, z: Tensor) -> Tensor:
        return self.decode_entries(z if self.cfg.force_not_quantize else self.quantize(z)[0])

    def decode_entries(self, entries: Tensor) -> Tensor:
        """Features or codebook entries (B, C, T, h, w) -> (B, 3, T, H, W), without quantisation."""
        return per_frame(
            lambda f: self.decoder(self.post_quant_conv(f)), entries, self.cfg.frames_per_pass
        )

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstruction:
        x = self.training_frames(x, draws)
        posterior = self.encode(x)
        quantised, loss, codes = self.quantize(posterior.mean)
        used = loss.new_zeros(self.cfg.n_embed).index_fill_(0, codes.flatten(), 1.0).mean()
        log = {"codes_used": used.detach()}
        return Reconstruction(
            x, self.decode_entries(quantised), posterior, loss, log, last_layer=self.last_layer()
        )
