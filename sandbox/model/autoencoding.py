"""The LightningModule that trains a first stage with a reconstruction loss."""

from typing import Any

import torch
from torch import Tensor

from sandbox.config.root import Root
from sandbox.contracts import Batch, Draws, FirstStage, Terms
from sandbox.model.roles import DISCRIMINATOR, NetworkUpdate
from sandbox.model.trainable import Trainable


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (dB) of each clip (B, ...) in [-1, 1]; equal clips give 106."""
    error = (x - y).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


@torch.no_grad()
def reconstruct_clips(first_stage: FirstStage, x: Tensor) -> Tensor:
    """x (B, 3, T, H, W) encoded to the posterior mean and decoded."""
    return first_stage.decode(first_stage.scaled(first_stage.encode(x).mean))


class Autoencoding(Trainable):
    """Trains `first_stage` on video batches with a loss of group `reconstruction`.

    first_stage.reconstruct(x, draws) has `target` (B, 3, T, H, W) in [-1, 1], whose T may be less
    than that of x, and its reconstruction `video`. reconstruction(that, finished_steps) -> Terms;
    one with `discriminate` has a `discriminator`, which it trains in turn with the first stage.
    """

    def __init__(self, root: Root, first_stage: Any, reconstruction: Any, group: int) -> None:
        super().__init__(root, group)
        self.first_stage = first_stage
        self.reconstruction = reconstruction
        if hasattr(reconstruction, "discriminate"):
            network = reconstruction.discriminator
            self.updates = {DISCRIMINATOR: NetworkUpdate(network, clips=False)}  # as published
        self.freeze_untrained()

    def training_step(self, batch: Batch, index: int = 0) -> Tensor:
        terms, decibels = self.reconstruct(batch, self.draws(batch))
        self.record(terms, psnr=decibels.mean())
        return terms.total

    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch; `draws` holds all randomness."""
        return self.reconstruct(batch, draws)[0]

    def reconstruct(self, batch: Batch, draws: Draws) -> tuple[Terms, Tensor]:
        """The loss, and the PSNR of each clip (B,) in dB."""
        out = self.first_stage.reconstruct(batch.video, draws)
        return self.reconstruction(out, self.finished_steps), psnr(out.video.detach(), out.target)

    def update_networks(
        self, batch: Batch, share: float, rate: float, is_update: bool
    ) -> list[str]:
        """As in Trainable. As published, the discriminator sees what the first stage makes after
        its own update.
        """
        with torch.no_grad():
            out = self.first_stage.reconstruct(batch.video, self.draws(batch))

        terms, skipped = self.updates[DISCRIMINATOR].step(
            lambda: self.reconstruction.discriminate(out, self.finished_steps),
            share, rate, is_update,
        )  # fmt: skip
        self.metrics = self.metrics | terms.log
        return [DISCRIMINATOR] if skipped else []
