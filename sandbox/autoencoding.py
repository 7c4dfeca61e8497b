"""The LightningModule that trains a first stage: reconstruct, compare, regularise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from lightning import LightningModule
from torch import Tensor, nn

from sandbox.contracts import Batch, Draws, FirstStage, Terms
from sandbox.randomness import Keyed


class Reconstructed(Protocol):
    """What a training pass gives; a loss may read more of it, such as the posterior."""

    video: Tensor  # (B, 3, T, H, W)


class TrainableFirstStage(FirstStage, Protocol):
    """A first stage that can be trained: samples its posterior with the draw "posterior"."""

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstructed: ...


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip (B, ...), data in [-1, 1] (peak 2); equal clips give 106."""
    error = (x - y).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


@torch.no_grad()
def through(first_stage: FirstStage, x: Tensor) -> Tensor:
    """What is left of x (B, 3, T, H, W) after encoding to the posterior mean and decoding: the ceiling of samples."""
    return first_stage.decode(first_stage.scaled(first_stage.encode(x).mean))


class Autoencoding(LightningModule):
    """Trains `first_stage` on batches of video with a loss of group `reconstruction`.

    `make_optimizer` turns a module into what Lightning's configure_optimizers returns. `seed` and `group` (clips in
    one optimizer step over all processes) are the key of randomness. `metrics` holds detached tensors of the last
    step by name; the frame writes them out now and then.
    """

    def __init__(
        self,
        first_stage: TrainableFirstStage,
        reconstruction: Callable[[Tensor, Any], Terms],
        make_optimizer: Callable[[nn.Module], Any],
        seed: int,
        group: int,
    ) -> None:
        super().__init__()
        self.first_stage = first_stage
        self.reconstruction = reconstruction
        self.make_optimizer = make_optimizer
        self.seed, self.group = seed, group
        self.metrics: dict[str, Tensor] = {}

    def draws(self, batch: Batch) -> Keyed:
        return Keyed(self.seed, batch.epoch, batch.position, self.group)

    def training_step(self, batch: Batch, index: int = 0) -> Tensor:
        out = self.first_stage.reconstruct(batch.video, self.draws(batch))
        terms = self.reconstruction(batch.video, out)
        scores = {"loss": terms.total, "psnr": psnr(out.video.detach(), batch.video).mean()}
        self.metrics = {f"train/{k}": v.detach() for k, v in (scores | terms.log).items()}
        return terms.total

    def on_validation_epoch_start(self) -> None:
        self.scores: list[Tensor] = []

    def validation_step(self, batch: Batch, index: int = 0) -> None:
        self.scores.append(psnr(through(self.first_stage, batch.video), batch.video))

    def on_validation_epoch_end(self) -> None:
        if self.scores:
            self.metrics["val/psnr"] = torch.cat(self.scores).mean()  # over this process's clips

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.first_stage)
