"""The LightningModule that trains a first stage: reconstruct, compare, regularise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sandbox.config import Root
from sandbox.contracts import Batch, Draws, FirstStage, Terms
from sandbox.module import Trainable


class Reconstructed(Protocol):
    """What a training pass gives; a loss may read more of it, such as the posterior."""

    target: Tensor  # (B, 3, T, H, W) in [-1, 1]; T may be less than the batch has
    video: Tensor  # what became of it


class TrainableFirstStage(FirstStage, Protocol):
    """A first stage that can be trained: samples its posterior with the draw "posterior"."""

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstructed: ...


# Reconstructed -> the loss: a plugin of group `reconstruction`
Reconstruct = Callable[[Any], Terms]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (dB) of each clip (B, ...) in [-1, 1]; equal clips give 106."""
    error = (x - y).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


@torch.no_grad()
def through(first_stage: FirstStage, x: Tensor) -> Tensor:
    """x (B, 3, T, H, W) encoded to the posterior mean and decoded: the ceiling of samples."""
    return first_stage.decode(first_stage.scaled(first_stage.encode(x).mean))


class Autoencoding(Trainable):
    """Trains `first_stage` on batches of video with a loss of group `reconstruction`."""

    def __init__(
        self, root: Root, first_stage: TrainableFirstStage, reconstruction: Reconstruct, group: int
    ) -> None:
        super().__init__(root, group)
        self.first_stage = first_stage
        self.reconstruction = reconstruction

    def training_step(self, batch: Batch, index: int = 0) -> Tensor:
        terms, decibels = self.reconstruct(batch, self.draws(batch))
        self.metrics = {"loss": terms.total.detach(), "psnr": decibels.mean(), **terms.log}
        return terms.total

    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch; `draws` holds all randomness."""
        return self.reconstruct(batch, draws)[0]

    def reconstruct(self, batch: Batch, draws: Draws) -> tuple[Terms, Tensor]:
        """The loss, and the PSNR of each clip (B,) in dB."""
        out = self.first_stage.reconstruct(batch.video, draws)
        return self.reconstruction(out), psnr(out.video.detach(), out.target)
