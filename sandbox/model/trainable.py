"""The base class of both trainable systems: keyed randomness, metrics, frozen parts, state."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from sandbox.config.param_groups import lr_factors
from sandbox.config.root import Root
from sandbox.contracts import Batch, Draws, StorageError, Terms
from sandbox.data.randomness import Keyed
from sandbox.model.ema import EMA
from sandbox.model.roles import NetworkUpdate
from sandbox.model.sharding import detached, load_tensors


class Trainable(LightningModule, ABC):
    """A system that `sandbox.training.loop.fit` trains.

    `group`: clips in one optimizer step over all processes; stratified draws spread over them.
    `metrics`: detached tensors of the last micro-batch by name; `per_sample`: its losses (B,).
    `logged`: names of the metrics that the loss logs, which validation measures, too.
    `lr_factors`: learning rate factor of each weight, where `trainable` is set; 0 freezes it.
    The engine sets `optimizer`, `ema` and `finished_steps`, the number of optimizer steps so far.
    """

    def __init__(self, root: Root, group: int) -> None:
        super().__init__()
        self.root, self.group = root, group
        self.metrics: dict[str, Tensor] = {}
        self.logged: frozenset[str] = frozenset()
        self.per_sample: Tensor | None = None
        self.optimizer: Any = None
        self.updates: dict[str, NetworkUpdate] = {}  # of networks that train in turn with it
        self.ema: EMA | None = None
        self.networks = nn.ModuleDict()  # the further ones of the training method
        self.finished_steps = 0
        self.lr_factors: dict[str, float] = {}
        self._frozen_hashes: dict[str, str] | None = None

    def freeze_untrained(self) -> None:
        """Freezes the weights that `trainable` leaves out; call it once all parts are set.

        Raises ConfigError with every entry that matches nothing.
        """
        if self.root.trainable is None:
            return
        trained = {
            name: p
            for name, p in self.named_parameters()
            if p.requires_grad and not name.startswith(OF_METHOD)
        }
        self.lr_factors = lr_factors(trained, self.root.trainable)
        for name, parameter in trained.items():
            parameter.requires_grad_(self.lr_factors[name] > 0)
        untrained = {id(p) for name, p in trained.items() if not self.lr_factors[name]}
        for module in self.modules():
            own = [*module.parameters()]
            module._is_untrained = bool(own) and all(id(p) in untrained for p in own)  # type: ignore[assignment]

    def draws(self, batch: Batch) -> Keyed:
        """All randomness of a batch, keyed by the position of each clip."""
        assert batch.position is not None  # the loader sets it
        return Keyed(self.root.seed, batch.epoch, batch.position, self.group, self.device)

    @abstractmethod
    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch. All randomness is in `draws`: a recorded step replays."""

    def update_networks(
        self, batch: Batch, share: float, rate: float, is_update: bool
    ) -> list[str]:
        """Trains the networks of `updates` on a micro-batch, after the update of the others.

        share: weight of the micro-batch in an optimizer step; rate: learning rate factor. Returns
        the names of those whose update was skipped.
        """
        return []

    def record(self, terms: Terms, **others: Tensor) -> None:
        """Stores the metrics of a training step for the engine, without a device sync."""
        metrics = {"loss": terms.total, **terms.log, **others}
        self.metrics = {name: value.detach() for name, value in metrics.items()}
        self.logged, self.per_sample = frozenset(terms.log), terms.per_sample.detach()

    def configure_optimizers(self) -> Any:
        return self.optimizer

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int = 0
    ) -> Batch:
        """As in Lightning, but positions stay on the CPU, where they key the randomness."""
        moved = super().transfer_batch_to_device(replace(batch, position=None), device, 0)
        return replace(moved, position=batch.position)

    def on_device(self, part: Any) -> AbstractContextManager[Any]:
        """Has the frozen modules of `part` on the device inside the block."""
        return nullcontext()

    def train(self, mode: bool = True) -> Any:
        """As in torch, but frozen and untrained modules stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if getattr(module, "_frozen", False) or getattr(module, "_is_untrained", False):
                module.eval()
        return self

    def trainable_state(self) -> dict[str, Tensor]:
        """All tensors outside frozen parts: trained weights, untrained ones, buffers."""
        frozen = {id(m) for part in self._frozen_parts().values() for m in part.modules()}
        frozen |= {id(m) for m in self.networks.modules()}
        return {
            name: detached(tensor)
            for prefix, module in self.named_modules()
            if id(module) not in frozen
            for key, tensor in (*module._parameters.items(), *_persistent(module))
            if tensor is not None
            for name in [f"{prefix}.{key}" if prefix else key]
            if tensor.requires_grad
            or not isinstance(tensor, nn.Parameter)
            or name in self.lr_factors
        }

    def _frozen_parts(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.named_modules() if getattr(m, "_frozen", False)}

    def frozen_hashes(self) -> dict[str, str]:
        """SHA-256 of the state of each frozen part, by name."""
        if self._frozen_hashes is None:
            self._frozen_hashes = {
                name: fingerprint(part)
                for name, part in self._frozen_parts().items()
                if not name.startswith(f"{GUIDES}.")  # of sampling, not of training
            }
        return self._frozen_hashes

    def first_stage_hash(self) -> dict[str, str]:
        """Metadata of exported weights: the hash of the first stage that they were trained on."""
        return {k: v for k, v in self.frozen_hashes().items() if k == "first_stage"}

    def forget_hashes(self) -> None:
        """Call this after the weights of frozen parts have changed."""
        self._frozen_hashes = None

    def check_frozen(self, recorded: dict[str, str], but: str | None = None) -> None:
        """Raises StorageError where the hash of a frozen part differs from `recorded`.

        The part `but` and parts inside it are skipped.
        """
        for name, digest in self.frozen_hashes().items():
            if but and f"{name}.".startswith(f"{but}."):
                continue
            if recorded.get(name) != digest:
                setting = FILE_SETTINGS.get(name.partition(".")[0], "its weights")
                raise StorageError(
                    f"{name}: its weights (SHA-256 {digest[:12]}) are not those that this run was "
                    f"trained with ({recorded.get(name, 'none')[:12]}); set {setting} to those of "
                    "the run"
                )

    def load_trainable(self, state: dict[str, Tensor]) -> None:
        """Loads a `trainable_state`. Raises StorageError for other names or shapes."""
        load_tensors(self.trainable_state(), state)


GUIDES = "guides"  # the networks of the guidance
OF_METHOD = ("method.", "features.")  # weights of training that sampling does not use
FILE_SETTINGS = {
    "first_stage": "vae.weights",
    "conditioner": "conditioning.weights",
    "networks": "the networks of the method",
    "features": "features.weights",
}


def without_method(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `trainable_state` without the weights that only the training method uses."""
    return {name: x for name, x in state.items() if not name.startswith(OF_METHOD)}


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's state: names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _persistent(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    derived = module._non_persistent_buffers_set
    return [(name, b) for name, b in module._buffers.items() if name not in derived]
