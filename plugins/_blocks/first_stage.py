"""What all first stages share: scale and shift of the latents, and the pass that trains them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import Draws, Posterior


class FirstStage(nn.Module, ABC):
    """Scaled latents are (z - shift) * scale.

    A number comes from the Config, as published. None leaves it to the data: then `shift` or
    `scale` is a buffer (C, 1, 1, 1) of the state dict, 0 or 1 until `calibrate` measures it,
    channel by channel.

    A subclass gives `encode`, `pixels` and `posterior(stored)`.
    """

    shift: float | Tensor
    scale: float | Tensor
    train_frames: int | None = None  # frames of a clip that a training pass takes; None: all

    def __init__(self, channels: int, scale: float | None = 1.0, shift: float | None = 0.0) -> None:
        super().__init__()
        for name, value, start in (("shift", shift, 0.0), ("scale", scale, 1.0)):
            if value is None:
                self.register_buffer(name, torch.full((channels, 1, 1, 1), start))
            else:
                setattr(self, name, value)

    @abstractmethod
    def encode(self, x: Tensor) -> Posterior:
        """Video (B, 3, T, H, W) -> the distribution of its unscaled latents."""

    @abstractmethod
    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents -> video."""

    def scaled(self, z: Tensor) -> Tensor:
        return (z - self.shift) * self.scale

    def unscaled(self, z: Tensor) -> Tensor:
        return z / self.scale + self.shift

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled latents (B, C, T', H', W') -> (B, 3, T, H, W), about [-1, 1], not clamped."""
        return self.pixels(self.unscaled(z))

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstruction:
        """The training pass: x (B, 3, T, H, W) through a sample of its posterior.

        Draws "posterior", and "frames" where it takes only some of them.
        """
        x = self.part(x, draws)
        posterior = self.encode(x)
        z = posterior.sample(draws.normal("posterior", posterior.mean))
        return Reconstruction(x, self.pixels(z), posterior, last_layer=self.last_layer())

    def last_layer(self) -> Tensor | None:
        """The weight that draws the pixels, where adversarial losses compare gradients; None where
        there is no `decoder.conv_out`.
        """
        drawing = getattr(getattr(self, "decoder", None), "conv_out", None)
        return None if drawing is None else next(p for p in drawing.parameters() if p.ndim > 1)

    def part(self, x: Tensor, draws: Draws) -> Tensor:
        """`train_frames` frames in a row of each clip, from a place of its own."""
        number = self.train_frames
        if number is None or number >= x.shape[2]:
            return x
        first = draws.integers("frames", 0, x.shape[2] - number + 1)
        frames = first[:, None] + torch.arange(number, device=x.device)
        clips = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[clips, :, frames].transpose(1, 2)  # (B, N, C, H, W) -> (B, C, N, H, W)

    @torch.no_grad()
    def calibrate(self, videos: Iterable[Tensor]) -> None:
        """Measures what the Config leaves to the data: mean 0 and deviation 1 of scaled latents.

        `videos` are (B, 3, T, H, W); their posterior means count. Does nothing where the Config has
        numbers. ValueError where there is no video.
        """
        measured = [name for name in ("shift", "scale") if isinstance(getattr(self, name), Tensor)]
        if not measured:
            return
        count, total, squares = 0, 0.0, 0.0
        for x in videos:
            z = self.encode(x).mean.transpose(0, 1).flatten(1).double()  # (C, B*T*H*W)
            count += z.shape[1]
            total, squares = total + z.sum(1), squares + z.square().sum(1)
        if not count:
            raise ValueError("calibrate needs at least one batch of videos")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        found = {"shift": mean, "scale": 1 / std}
        for name in measured:
            getattr(self, name).copy_(found[name].view(-1, 1, 1, 1))
