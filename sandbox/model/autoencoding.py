"""The LightningModule that trains a first stage: reconstruct, compare, regularise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sandbox.config.root import Root
from sandbox.contracts import Batch, Draws, FirstStage, Terms
from sandbox.distributed.rank import Rank
from sandbox.model.trainable import Trainable


class Reconstructed(Protocol):
    """What a training pass gives; a loss may read more of it, such as the posterior."""

    target: Tensor  # (B, 3, T, H, W) in [-1, 1]; T may be less than the batch has
    video: Tensor  # what became of it


class TrainableFirstStage(FirstStage, Protocol):
    """A first stage that can be trained: samples its posterior with the draw "posterior"."""

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstructed: ...


# (Reconstructed, finished optimizer steps) -> the loss: a plugin of group `reconstruction`
Reconstruct = Callable[[Any, int], Terms]


@runtime_checkable
class Adversarial(Protocol):
    """A reconstruction loss that trains networks of its own, in turn with the first stage.

    Their parameters ask for no gradient outside of that turn, so that the first stage's optimizer,
    average and clipping pass over them.
    """

    discriminator: nn.Module

    def __call__(self, out: Any, step: int) -> Terms: ...
    def discriminate(self, out: Any, step: int) -> Terms: ...


class Opponent:
    """A discriminator with the optimizer that the engine builds for it; both are in checkpoints."""

    optimizer: torch.optim.Optimizer
    rank: Rank

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def build(self, plugin: Any, lr: float, rank: Rank) -> None:
        """Builds its optimizer: of the same plugin and learning rate as the first stage's.

        `rank` says with whom it trains: a first stage may be made by one process of several.
        """
        self.rank = rank
        self.module.requires_grad_(True)
        self.optimizer = plugin.build(self.module.named_parameters(), lr)
        self.module.requires_grad_(False)

    def turn(self, loss: Callable[[], Terms], share: float, rate: float, is_update: bool) -> Terms:
        """Gathers `share` of the gradient, and makes a step where one is due."""
        self.module.requires_grad_(True)
        terms = loss()
        (terms.total * share).backward()
        self.module.requires_grad_(False)
        if is_update:
            self._average()
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        return terms

    def _average(self) -> None:
        """The mean of the gradients over all processes."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad = self.rank.mean(parameter.grad)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"weights": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


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
        is_adversarial = isinstance(reconstruction, Adversarial)
        self.opponent = Opponent(reconstruction.discriminator) if is_adversarial else None
        self.hold_still()

    def training_step(self, batch: Batch, index: int = 0) -> Tensor:
        terms, decibels = self.reconstruct(batch, self.draws(batch))
        self.metrics = {"loss": terms.total.detach(), "psnr": decibels.mean(), **terms.log}
        self.logged = frozenset(terms.log)
        return terms.total

    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch; `draws` holds all randomness."""
        return self.reconstruct(batch, draws)[0]

    def reconstruct(self, batch: Batch, draws: Draws) -> tuple[Terms, Tensor]:
        """The loss, and the PSNR of each clip (B,) in dB."""
        out = self.first_stage.reconstruct(_pixels(batch), draws)
        return self.reconstruction(out, self.finished_steps), psnr(out.video.detach(), out.target)

    def opponent_turn(self, batch: Batch, share: float, rate: float, is_update: bool) -> None:
        """The discriminator's turn, as published on what the first stage makes after its step."""
        if self.opponent is None:
            return
        with torch.no_grad():
            out = self.first_stage.reconstruct(_pixels(batch), self.draws(batch))

        def loss() -> Terms:
            assert isinstance(self.reconstruction, Adversarial)
            return self.reconstruction.discriminate(out, self.finished_steps)

        self.metrics = self.metrics | self.opponent.turn(loss, share, rate, is_update).log


def _pixels(batch: Batch) -> Tensor:
    assert batch.video is not None  # data without pixels are refused before
    return batch.video
