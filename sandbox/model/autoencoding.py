"""The LightningModule that trains a first stage with a reconstruction loss."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sandbox.config.root import Root
from sandbox.contracts import Batch, Draws, FirstStage, Terms
from sandbox.distributed.rank import Rank
from sandbox.model.trainable import Trainable


class Reconstructed(Protocol):
    """Output of a training pass; a loss may read more of it, such as the posterior."""

    target: Tensor  # (B, 3, T, H, W) in [-1, 1]; T may be less than the batch has
    video: Tensor  # the reconstruction of `target`, of the same shape


class TrainableFirstStage(FirstStage, Protocol):
    """A trainable first stage; it samples its posterior with the draw "posterior"."""

    def reconstruct(self, x: Tensor, draws: Draws) -> Reconstructed: ...


# (Reconstructed, finished optimizer steps) -> loss: a plugin of group `reconstruction`
Reconstruct = Callable[[Any, int], Terms]


@runtime_checkable
class Adversarial(Protocol):
    """A reconstruction loss with a discriminator, trained in turn with the first stage.

    Its parameters require gradients only during their own update, so that the first stage's
    optimizer, EMA and clipping skip them.
    """

    discriminator: nn.Module

    def __call__(self, out: Any, step: int) -> Terms: ...
    def discriminate(self, out: Any, step: int) -> Terms: ...


class DiscriminatorUpdate:
    """A discriminator and its optimizer; checkpoints contain the state of both."""

    optimizer: torch.optim.Optimizer
    rank: Rank

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def build(self, plugin: Any, lr: float, rank: Rank) -> None:
        """Builds its optimizer, of the same plugin and learning rate as the first stage's.

        Gradients are averaged over the ranks of `rank`.
        """
        self.rank = rank
        self.module.requires_grad_(True)
        self.optimizer = plugin.build(self.module.named_parameters(), lr)
        self.module.requires_grad_(False)

    def step(self, loss: Callable[[], Terms], share: float, rate: float, is_update: bool) -> Terms:
        """Accumulates `share` of the gradient; updates the weights if `is_update`."""
        self.module.requires_grad_(True)
        terms = loss()
        (terms.total * share).backward()
        self.module.requires_grad_(False)
        if is_update:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.rank.mean(parameter.grad)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        return terms

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
def reconstruct_clips(first_stage: FirstStage, x: Tensor) -> Tensor:
    """x (B, 3, T, H, W) encoded to the posterior mean and decoded."""
    return first_stage.decode(first_stage.scaled(first_stage.encode(x).mean))


class Autoencoding(Trainable):
    """Trains `first_stage` on video batches with a loss of group `reconstruction`."""

    def __init__(
        self, root: Root, first_stage: TrainableFirstStage, reconstruction: Reconstruct, group: int
    ) -> None:
        super().__init__(root, group)
        self.first_stage = first_stage
        self.reconstruction = reconstruction
        is_adversarial = isinstance(reconstruction, Adversarial)
        self.discriminator_update = (
            DiscriminatorUpdate(reconstruction.discriminator) if is_adversarial else None
        )
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
        out = self.first_stage.reconstruct(_pixels(batch), draws)
        return self.reconstruction(out, self.finished_steps), psnr(out.video.detach(), out.target)

    def update_discriminator(
        self, batch: Batch, share: float, rate: float, is_update: bool
    ) -> None:
        """As published, the discriminator sees what the first stage makes after its own update."""
        if self.discriminator_update is None:
            return
        with torch.no_grad():
            out = self.first_stage.reconstruct(_pixels(batch), self.draws(batch))

        def loss() -> Terms:
            assert isinstance(self.reconstruction, Adversarial)
            return self.reconstruction.discriminate(out, self.finished_steps)

        terms = self.discriminator_update.step(loss, share, rate, is_update)
        self.metrics = self.metrics | terms.log


def _pixels(batch: Batch) -> Tensor:
    assert batch.video is not None  # wiring refuses data without pixels
    return batch.video
