"""The VQ autoencoder of latent diffusion (Rombach et al. 2022), frame by frame, published names.

Latents are the features *before* quantisation, as in the published VQModelInterface; `decode`
quantises. The first stage of CelebAHQ-LDM-VQ-4 is the preset `vq_f4`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.autoencoder2d import Decoder, Encoder, per_frame
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import Exact, Reconstruction
from sandbox.contracts import (
    Clip,
    Draws,
    FirstStageConfig,
    FirstStageRecipe,
    Misfit,
    above,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

ROWS = 1 << 14  # vectors compared at once: bounds the (rows, n_embed) table of distances


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
        """(B, C, T, H, W) -> codes (B, T, H, W) int64, in float32: bf16 picks other codes."""
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
        to_codes = (quantised.detach() - z).square().flatten(1).mean(1)  # commitment: moves z
        to_features = (quantised - z.detach()).square().flatten(1).mean(1)  # moves the codebook
        if self.legacy:  # as published: beta stands at the wrong term
            loss = to_codes + self.beta * to_features
        else:
            loss = self.beta * to_codes + to_features
        return z + (quantised - z).detach(), loss, codes


@register("vae", "vq")
class VQModel(FirstStage):
    """2-D autoencoder with a codebook (latent diffusion, CelebAHQ-LDM-VQ-4)."""

    @dataclass
    class Config(FirstStageConfig):
        embed_dim: int = 4  # latent channels
        n_embed: int = 256  # codes
        beta: float = 0.25  # weight of one half of the codebook loss
        legacy: bool = True  # as published: beta weighs the codebook, not the commitment
        force_not_quantize: bool = False  # decode the features as they are
        ch: int = 16
        ch_mult: tuple[int, ...] = (1, 2, 2)  # one level each; halves the size between levels
        num_res_blocks: int = 1
        attn_resolutions: tuple[int, ...] = ()  # the middle has attention in any case
        resolution: int = 16  # says at which level attn_resolutions are; pictures may have any size
        in_channels: int = 3
        out_ch: int = 3
        z_channels: int = 4
        double_z: bool = False
        dropout: float = 0.0
        num_groups: int = 8  # of the group norms; 32 as published
        scale_factor: float | None = None  # of the latents; None: measured, per channel
        shift: float | None = None  # taken off first; None: measured, per channel
        train_frames: int | None = 1  # of each clip in a training step, drawn; None: all
        frames_per_pass: int | None = None  # frames in the network at once; None: all

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in (
                "embed_dim",
                "n_embed",
                "ch",
                "num_res_blocks",
                "z_channels",
                "num_groups",
            ):
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("beta", self.beta, 0, 100)
            yield from one_of("in_channels", self.in_channels, [3])
            yield from one_of("out_ch", self.out_ch, [3])
            yield from one_of("double_z", self.double_z, [False])
            yield from in_range("dropout", self.dropout, 0, 0.99)
            yield from above("scale_factor", self.scale_factor, 0)
            yield from in_range("shift", self.shift, -100, 100)
            yield from in_range("train_frames", self.train_frames, 1)
            yield from in_range("frames_per_pass", self.frames_per_pass, 1)
            if not self.ch_mult or min(self.ch_mult) < 1:
                yield f"ch_mult={self.ch_mult}: want at least one level, each >= 1"
            elif self.num_groups > 0 and any(self.ch * m % self.num_groups for m in self.ch_mult):
                widths = [self.ch * m for m in self.ch_mult]
                yield f"num_groups={self.num_groups}: want a divisor of all widths {widths}"
            levels = [self.resolution // 2**i for i in range(len(self.ch_mult))]
            if unknown := set(self.attn_resolutions) - set(levels):
                yield f"attn_resolutions={sorted(unknown)}: want some of {levels}, by resolution"

        def latents(self, clip: Clip) -> Clip:
            if clip.channels != self.in_channels:
                raise Misfit("channels", clip.channels, str(self.in_channels))
            f = 2 ** (len(self.ch_mult) - 1)
            must_divide("height", clip.height, f)
            must_divide("width", clip.width, f)
            return Clip(self.embed_dim, clip.frames, clip.height // f, clip.width // f)

        def regularizer(self) -> str:
            return "codebook"

        def recipe(self) -> FirstStageRecipe:
            return FirstStageRecipe(lr=4e-3 * min(1.0, 16 / self.ch), steps=1200)

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg.embed_dim, cfg.scale_factor, cfg.shift)
        self.cfg, self.train_frames = cfg, cfg.train_frames
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = Codebook(cfg.n_embed, cfg.embed_dim, cfg.beta, cfg.legacy)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.embed_dim, cfg.z_channels, 1)

    def encode(self, x: Tensor) -> Exact:
        """Features before quantisation."""
        features = per_frame(
            lambda f: self.quant_conv(self.encoder(f)), x, self.cfg.frames_per_pass
        )
        return Exact(features)

    def posterior(self, stored: Tensor) -> Exact:
        return Exact(stored)

    def pixels(self, z: Tensor) -> Tensor:
        return self.draw(z if self.cfg.force_not_quantize else self.quantize(z)[0])

    def draw(self, quantised: Tensor) -> Tensor:
        """What the decoder makes of features or codebook entries (B, C, T, h, w) as they are."""
        return per_frame(
            lambda f: self.decoder(self.post_quant_conv(f)), quantised, self.cfg.frames_per_pass
        )

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstruction:
        x = self.part(x, draws)
        posterior = self.encode(x)
        quantised, loss, codes = self.quantize(posterior.mean)
        used = loss.new_zeros(self.cfg.n_embed).index_fill_(0, codes.flatten(), 1.0).mean()
        log = {"codes_used": used.detach()}
        return Reconstruction(
            x, self.draw(quantised), posterior, loss, log, last_layer=self.last_layer()
        )
