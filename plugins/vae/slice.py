"""Slice VAE of EasyAnimate (aigc-apps/EasyAnimate, July 2024): MagViT's network on slices of time.

Parameter names and shapes are those of `vae=magvit`. Convolutions read one frame on either side,
and a slice is decoded together with its neighbours, so there are no seams to smooth. Layers keep no
state between slices.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.easyanimate_vae import EasyAnimateVAE
from plugins._blocks.posterior import Gaussian
from plugins._configs.autoencoder3d import Autoencoder3DConfig
from sandbox.contracts import Clip, Draws, SizeError, added, one_of
from sandbox.registry import register

FIRST_FRAMES = ("separate", "parity")


@register("vae", "slice")
class SliceVAE(EasyAnimateVAE):
    """Slice VAE of EasyAnimate: slices of 8 frames, after an optional separate first frame."""

    @dataclass
    class Config(Autoencoder3DConfig):
        """Slices in time.

        first_frame: "separate" encodes and decodes it alone where frames are not a multiple of the
        slice, and always with slices of one latent frame. "parity", as published, does so where
        frames (to encode) or latent frames (to decode) are odd in number: with slices of one latent
        frame, 16 frames have 2 latents.
        """

        mini_batch_encoder: int = 8  # pixel frames per slice; slices are encoded independently
        mini_batch_decoder: int = 2  # latent frames per slice; decoded with both neighbours
        tile_sample_min_size: int = 384
        first_frame: str = added("separate")

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("first_frame", self.first_frame, FIRST_FRAMES)

        def window_problems(self, time: int) -> Iterator[str]:
            frames, latents = self.mini_batch_encoder, self.mini_batch_decoder
            if frames > 0 and frames % time:
                yield f"mini_batch_encoder={frames}: want a multiple of {time}"
            elif frames == 1:
                yield "mini_batch_encoder=1: want >= 2; a single frame is never a slice"
            elif frames > 0 and latents != frames // time:
                yield (
                    f"mini_batch_decoder={latents}: want {frames // time}, the latent frames of "
                    f"mini_batch_encoder={frames}"
                )

        def latent_frames(self, frames: int) -> int:
            """`mini_batch_decoder` latent frames per slice, and one for a separate first frame."""
            if self.first_frame == "parity":
                return self._by_parity(frames)
            slices, rest = divmod(frames, self.mini_batch_encoder)
            if self.mini_batch_decoder == 1:  # otherwise one latent frame is ambiguous
                allowed, also = (1,), ""
            else:
                allowed, also = (0, 1), f", or {self.mini_batch_encoder} k"
            if frames < 1 or rest not in allowed:
                rule = f"{self.mini_batch_encoder} k + 1{also} (k slices)"
                raise SizeError("frames", frames, rule)
            return slices * self.mini_batch_decoder + rest

        def _by_parity(self, frames: int) -> int:
            """As `latent_frames`; the parity must stay, or decoding gives other frames."""
            slices, rest = divmod(frames - frames % 2, self.mini_batch_encoder)
            latents = slices * self.mini_batch_decoder + frames % 2
            if frames < 1 or rest or latents % 2 != frames % 2:
                size = self.mini_batch_encoder * (1 + self.mini_batch_decoder % 2)
                raise SizeError("frames", frames, f"{size} k + 1, or {size} k (first_frame=parity)")
            return latents

    cfg: Config  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower than in the base

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg, causal=False)

    def tiled_side(self, height: int, width: int) -> int:
        return min(height, width)

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, T, H, W) in [-1, 1]; raises SizeError unless `Config.latent_frames` has T."""
        self.cfg.latents(Clip(*x.shape[1:]))
        return Gaussian(self.per_tile(self.moments, x, to_latents=True))

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, t, h, w) -> (B, 3, T, H, W), not clamped.

        t is a multiple of the slice, or one more; raises ValueError for other numbers.
        """
        slices = self.cfg.mini_batch_decoder
        if (z.shape[2] - self._separate(z, slices)) % slices:
            raise ValueError(f"latents have {z.shape[2]} frames: want {slices} k or {slices} k + 1")
        return self.per_tile(self.decode_slices, z, to_latents=False)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled latents -> (B, 3, T, H, W) in [-1, 1]."""
        return self.pixels(self.unscaled(z)).clamp(-1, 1)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, t, h, w) of (B, 3, T, H, W), slice by slice."""
        first, slices = self._split(x, self.cfg.mini_batch_encoder)
        features = [self.encoder(part) for part in (*first, *slices)]
        return self.quant_conv(torch.cat(features, 2))

    def decode_slices(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of unscaled latents (B, C, t, h, w), slice by slice."""
        decoder = self.decoder
        first, slices = self._split(self.post_quant_conv(z), self.cfg.mini_batch_decoder)
        video = [decoder.upsample(decoder.features(part), single_frame=True) for part in first]
        for i, part in enumerate(slices):
            before = slices[i - 1 : i] if i else []  # as published: without the separate frame
            neighbourhood = torch.cat([*before, part, *slices[i + 1 : i + 2]], 2)
            start = part.shape[2] * len(before)
            features = decoder.features(neighbourhood)[:, :, start : start + part.shape[2]]
            video.append(decoder.upsample(features))
        return torch.cat(video, 2)

    def _split(self, x: Tensor, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """A separate first frame of x (B, C, T, H, W), if any, and slices of `size` frames."""
        separate = self._separate(x, size)
        first, rest = [x[:, :, :1]] if separate else [], x[:, :, separate:]
        return first, list(rest.split(size, 2)) if rest.shape[2] else []

    def _separate(self, x: Tensor, size: int) -> int:
        """1 if the first frame is separate from slices of `size` frames, else 0."""
        if self.cfg.first_frame == "parity":
            return x.shape[2] % 2
        return 1 if size == 1 else min(x.shape[2] % size, 1)
