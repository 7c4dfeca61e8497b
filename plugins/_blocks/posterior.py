"""What first stages return: Gaussian or Exact from `encode`, a Reconstruction from `reconstruct`.

`plugins/_blocks/first_stage.py` holds the base class with scale, shift and the training pass.
"""

from dataclasses import dataclass, field
from math import log, pi

from torch import Tensor

from sandbox.contracts import Posterior

LOG_VARIANCE = (-30.0, 20.0)  # as published in every LDM-style autoencoder


class Gaussian:
    """Diagonal Gaussian over latents.

    `stored` (B, 2C, T, H, W) is the encoder's raw mean | log-variance, what a cache keeps. The
    rest is derived: `mean`, `log_variance` (clamped to [-30, 20]) and `std` are (B, C, T, H, W).
    """

    is_random = True

    def __init__(self, stored: Tensor) -> None:
        if stored.shape[1] % 2:
            raise ValueError(
                f"mean and log-variance need an even channel count, got {tuple(stored.shape)}"
            )
        self.stored = stored
        self.mean, log_variance = stored.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(*LOG_VARIANCE)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.log_variance).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, (B, C, T, H, W), unscaled; `noise` is standard normal."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """(B,) KL divergence to the standard normal in nats, summed over all other axes."""
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, z: Tensor) -> Tensor:
        """(B,) -log density of unscaled z (B, C, T, H, W) in nats, summed over all other axes."""
        deviation = (z - self.mean).square() / self.log_variance.exp()
        return 0.5 * (log(2 * pi) + self.log_variance + deviation).flatten(1).sum(1)


class Exact:
    """Latents without a distribution (VQ, PCA, identity): sampling returns them."""

    is_random = False

    def __init__(self, z: Tensor) -> None:
        self.stored = self.mean = z

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """(B,) zeros."""
        return self.mean.new_zeros(self.mean.shape[0])


@dataclass
class Reconstruction:
    """One training pass of a first stage: what the losses of group `reconstruction` compare."""

    target: Tensor  # (B, 3, T, H, W) in [-1, 1]; T may be less than the batch has
    video: Tensor  # what became of it: the same size, about [-1, 1], not clamped
    posterior: Posterior  # kl() is the regulariser of a Gaussian
    codebook_loss: Tensor | None = None  # (B,) where there is a codebook
    log: dict[str, Tensor] = field(default_factory=dict)  # each (), detached
    last_layer: Tensor | None = None  # the weight that draws the pixels, for adaptive weights
