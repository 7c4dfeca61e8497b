"""The KL autoencoder of latent diffusion (Rombach et al. 2022), frame by frame, published names.

Stable Diffusion and DynamiCrafter use it; their size is the preset `kl_f8`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from plugins._blocks.autoencoder2d import Decoder, Encoder, per_frame
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import Gaussian
from plugins._configs.autoencoder2d import Autoencoder2DConfig
from sandbox.contracts import one_of
from sandbox.registry import register


@register("vae", "kl")
class AutoencoderKL(FirstStage):
    """2-D autoencoder with Gaussian latents (Stable Diffusion, DynamiCrafter)."""

    @dataclass
    class Config(Autoencoder2DConfig):
        """double_z: the encoder outputs mean and log-variance; always true."""

        double_z: bool = True

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("double_z", self.double_z, [True])

        def regularizer(self) -> str:
            return "kl"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg.embed_dim, cfg.scale_factor, cfg.shift)
        self.cfg, self.train_frames = cfg, cfg.train_frames
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.embed_dim, cfg.z_channels, 1)

    def encode(self, x: Tensor) -> Gaussian:
        moments = per_frame(lambda f: self.quant_conv(self.encoder(f)), x, self.cfg.frames_per_pass)
        return Gaussian(moments)

    def posterior(self, stored: Tensor) -> Gaussian:
        return Gaussian(stored)

    def pixels(self, z: Tensor) -> Tensor:
        return per_frame(
            lambda f: self.decoder(self.post_quant_conv(f)), z, self.cfg.frames_per_pass
        )
