"""Return types of first stages: Gaussian or Exact of `encode`, Reconstruction of `reconstruct`."""

from dataclasses import dataclass, field
from math import log, pi

from torch import Tensor

from sandbox.contracts import Posterior

LOG_VARIANCE = (-30.0, 20.0)  # as published in every LDM-style autoencoder


class Gaussian:
    """Diagonal Gaussian over latents.

    `stored` (B, 2C, T, H, W) is the raw output of the encoder, mean | log-variance, which caches
    keep. `mean`, `log_variance` (clamped to [-30, 20]) and `std` are (B, C, T, H, W).
    """

    is_random = True

    def __init__(self, stored: Tensor) -> None:
        if stored.shape[1] % 2:
            raise ValueError(
                f"mean and log-variance need an even channel count, not shape {tuple(stored.shape)}"
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


class PointPosterior:
    """Deterministic latents (VQ, PCA, identity): sampling returns them."""

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
    """Result of a training pass of a first stage, for the losses of group `reconstruction`."""

    target: Tensor  # (B, 3, T, H, W) in [-1, 1]; T may be smaller than in the batch
    video: Tensor  # reconstruction of `target`: the same shape, about [-1, 1], not clamped
    posterior: Posterior  # kl() is the regulariser of a Gaussian
    codebook_loss: Tensor | None = None  # (B,), with a codebook
    log: dict[str, Tensor] = field(default_factory=dict)  # each (), detached
    last_layer: Tensor | None = None  # weight of the output layer, for adaptive loss weights
