"""Base class of all first stages: scale and shift of the latents, and the training pass."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from plugins._blocks.posterior import Reconstruction
from sandbox.contracts import Draws, Posterior

Numbers = float | Sequence[float]


def per_channel(value: Numbers | Tensor, z: Tensor) -> float | Tensor:
    """`value`, shaped for latents z (B, C, T, H, W) where it has a number per channel."""
    if isinstance(value, Tensor | float | int):
        return value
    return z.new_tensor(value).view(-1, 1, 1, 1)


class FirstStage(nn.Module, ABC):
    """Scaled latents are (z - shift) * scale.

    A number for `shift` or `scale`, or one per channel, is used as it is. None makes it a buffer
    (C, 1, 1, 1) in the state dict, 0 or 1 until `calibrate` measures it per channel.

    Subclasses define `encode`, `pixels` and `posterior(stored)`.
    """

    shift: Numbers | Tensor
    scale: Numbers | Tensor
    train_frames: int | None = None  # frames per clip in a training pass; None: all

    def __init__(
        self, channels: int, scale: Numbers | None = 1.0, shift: Numbers | None = 0.0
    ) -> None:
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
        return (z - per_channel(self.shift, z)) * per_channel(self.scale, z)

    def unscaled(self, z: Tensor) -> Tensor:
        return z / per_channel(self.scale, z) + per_channel(self.shift, z)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled latents (B, C, T', H', W') -> (B, 3, T, H, W), about [-1, 1], not clamped."""
        return self.pixels(self.unscaled(z))

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstruction:
        """The training pass: reconstructs x (B, 3, T, H, W) from a sample of its posterior.

        Uses the draw "posterior", and "frames" if it takes a part of each clip.
        """
        x = self.training_frames(x, draws)
        posterior = self.encode(x)
        z = posterior.sample(draws.normal("posterior", posterior.mean))
        return Reconstruction(x, self.pixels(z), posterior, last_layer=self.last_layer())

    def last_layer(self) -> Tensor | None:
        """Weight of the decoder's output layer, for adaptive adversarial loss weights.

        None without `decoder.conv_out`.
        """
        layer = getattr(getattr(self, "decoder", None), "conv_out", None)
        return None if layer is None else next(p for p in layer.parameters() if p.ndim > 1)

    def training_frames(self, x: Tensor, draws: Draws) -> Tensor:
        """`train_frames` consecutive frames of each clip, from a random start."""
        number = self.train_frames
        if number is None or number >= x.shape[2]:
            return x
        first = draws.integers("frames", 0, x.shape[2] - number + 1)
        frames = first[:, None] + torch.arange(number, device=x.device)
        clips = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[clips, :, frames].transpose(1, 2)  # (B, N, C, H, W) -> (B, C, N, H, W)

    @torch.no_grad()
    def calibrate(self, videos: Iterable[Tensor]) -> None:
        """Sets unset shift and scale so that scaled latents have mean 0 and standard deviation 1.

        Measures the posterior means of `videos` (B, 3, T, H, W) per channel. Does nothing if the
        Config has both numbers. Raises ValueError without videos.
        """
        measured = [name for name in ("shift", "scale") if isinstance(getattr(self, name), Tensor)]
        if not measured:
            return
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in videos:
            z = self.encode(x).mean.transpose(0, 1).flatten(1).double()  # (C, B*T*H*W)
            count += z.shape[1]
            total, squares = total + z.sum(1), squares + z.square().sum(1)
        if not count:
            raise ValueError("calibrate needs at least one batch of videos")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        values = {"shift": mean, "scale": 1 / std}
        for name in measured:
            getattr(self, name).copy_(values[name].view(-1, 1, 1, 1))
