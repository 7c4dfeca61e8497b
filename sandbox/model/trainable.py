"""What both trainable systems share: keyed randomness, metrics of the last step, frozen parts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from sandbox.config.param_groups import lr_factors
from sandbox.config.root import Root
from sandbox.contracts import Batch, Draws, StorageError, Terms
from sandbox.data.randomness import Keyed
from sandbox.model.sharding import detached, like


class Trainable(LightningModule, ABC):
    """A system that `sandbox.training.loop.fit` trains.

    `group`: clips in one optimizer step over all processes, over which stratified draws spread.
    `metrics` holds the detached tensors of the last micro-batch by name, `per_sample` its losses
    (B,) where they are told; the engine gathers them. `logged`: names of those that are the loss's,
    which validation measures, too. `optimizer` and `finished_steps`, the number
    of optimizer steps so far, are set by the engine. `opponent` is what trains in turn with it.
    `rates`: factor of the learning rate by weight, where `trainable` chooses some; 0 is held still.
    """

    def __init__(self, root: Root, group: int) -> None:
        super().__init__()
        self.root, self.group = root, group
        self.metrics: dict[str, Tensor] = {}
        self.logged: frozenset[str] = frozenset()
        self.per_sample: Tensor | None = None
        self.optimizer: Any = None
        self.opponent: Any = None  # a sandbox.model.autoencoding.Opponent
        self.finished_steps = 0
        self.rates: dict[str, float] = {}
        self._fingerprints: dict[str, str] | None = None

    def hold_still(self) -> None:
        """Once all parts are there: no gradient for what `trainable` leaves out.

        Raises ConfigError with every entry that matches nothing.
        """
        if self.root.trainable is None:
            return
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self.rates = lr_factors(trained, self.root.trainable)
        for name, parameter in trained.items():
            parameter.requires_grad_(self.rates[name] > 0)
        held = {id(p) for name, p in trained.items() if not self.rates[name]}
        for module in self.modules():
            own = [*module.parameters()]
            module._is_still = bool(own) and all(id(p) in held for p in own)  # type: ignore[assignment]

    def draws(self, batch: Batch) -> Keyed:
        """All randomness of a batch, keyed by the position of each of its clips."""
        assert batch.position is not None  # the loader writes it
        return Keyed(self.root.seed, batch.epoch, batch.position, self.group, self.device)

    @abstractmethod
    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch; `draws` holds all randomness, so a recorded step replays."""

    def opponent_turn(self, batch: Batch, share: float, rate: float, is_update: bool) -> None:
        """What else trains on a micro-batch, once its own gradients are used; nothing here.

        `share`: part of an optimizer step; `rate`: factor of the learning rate.
        """

    def note(self, terms: Terms, **others: Tensor) -> None:
        """Keeps what the engine asks for after a training step; nothing is copied or waited for."""
        numbers = {"loss": terms.total, **terms.log, **others}
        self.metrics = {name: value.detach() for name, value in numbers.items()}
        self.logged, self.per_sample = frozenset(terms.log), terms.per_sample.detach()

    def configure_optimizers(self) -> Any:
        return self.optimizer

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int = 0
    ) -> Batch:
        """Moves the tensors of a batch in place; positions stay, which are keys of randomness."""
        if device.type == "cpu":
            return batch
        for f in fields(batch):
            value = getattr(batch, f.name)
            if isinstance(value, Tensor) and f.name != "position":
                setattr(batch, f.name, value.to(device, non_blocking=True))
        batch.scalars = {k: v.to(device, non_blocking=True) for k, v in batch.scalars.items()}
        return batch

    def train(self, mode: bool = True) -> Any:
        """As usual, but parts that are frozen or wholly held still stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if getattr(module, "_frozen", False) or getattr(module, "_is_still", False):
                module.eval()
        return self

    def trainable_state(self) -> dict[str, Tensor]:
        """By name what is no frozen part's: what training changes, and what it holds still."""
        parts = [m for m in self.modules() if getattr(m, "_frozen", False)]
        frozen = {id(m) for part in parts for m in part.modules()}
        return {
            f"{prefix}.{name}" if prefix else name: detached(tensor)
            for prefix, module in self.named_modules()
            if id(module) not in frozen
            for name, tensor in (*module._parameters.items(), *_persistent(module))
            if tensor is not None
            and (
                tensor.requires_grad
                or not isinstance(tensor, nn.Parameter)
                or (f"{prefix}.{name}" if prefix else name) in self.rates
            )
        }

    def frozen_parts(self) -> dict[str, str]:
        """SHA-256 of each frozen part's state, by its name."""
        if self._fingerprints is None:
            named = [(n, m) for n, m in self.named_modules() if getattr(m, "_frozen", False)]
            self._fingerprints = {name: fingerprint(module) for name, module in named}
        return self._fingerprints

    def made_with(self) -> dict[str, str]:
        """Header of exported weights: the first stage whose latents they are of."""
        return {k: v for k, v in self.frozen_parts().items() if k == "first_stage"}

    def forget_fingerprints(self) -> None:
        """After frozen parts were given other weights."""
        self._fingerprints = None

    def check_frozen(self, recorded: dict[str, str], but: str | None = None) -> None:
        """Raises StorageError where a frozen part is not the one that `recorded` says.

        The part named `but` and those inside it are passed over.
        """
        for name, digest in self.frozen_parts().items():
            if but and f"{name}.".startswith(f"{but}."):
                continue
            if recorded.get(name) != digest:
                raise StorageError(
                    f"{name}: its weights are not those that this run was trained with (SHA-256 "
                    f"{digest[:12]}, the checkpoint says {recorded.get(name, 'nothing')[:12]}); "
                    "bring back the file that was used"
                )

    def load_trainable(self, state: dict[str, Tensor]) -> None:
        """The opposite of `trainable_state`; strict. Raises StorageError with names that differ."""
        own = self.trainable_state()
        strange = sorted(set(own) ^ set(state))
        strange += [k for k in own if k in state and own[k].shape != state[k].shape]
        if strange:
            raise StorageError(
                f"the weights do not fit this model; {len(strange)} names or shapes differ: "
                f"{', '.join(strange[:10])}"
            )
        for name, tensor in own.items():
            tensor.copy_(like(state[name], tensor))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's state: names, shapes, types and numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def freeze(module: Any) -> Any:
    """Marks a part as frozen: no gradients, always in eval mode, not in training checkpoints."""
    module._frozen = True
    return module.requires_grad_(False).eval()


def _persistent(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    derived = module._non_persistent_buffers_set
    return [(name, b) for name, b in module._buffers.items() if name not in derived]
