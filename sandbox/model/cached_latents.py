"""Training on cached latents: the module that takes the place of the first stage.

task=encode writes an index.json with the first stage's settings, and its weights. Cached latents
are valid with those alone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.config import registry
from sandbox.config.added_settings import without_added
from sandbox.config.root import Root, to_container
from sandbox.contracts import ConfigError, Draws, Posterior, StorageError
from sandbox.model.offload import freeze
from sandbox.model.trainable import fingerprint
from sandbox.storage.atomic import HASH_KEY, has_right_hash
from sandbox.storage.first_stage_files import load_weights
from sandbox.storage.weight_files import safetensors_errors, verify

LARGE = ("encoder.", "decoder.")  # only pixels need these


def settings_of(root: Root) -> dict[str, Any]:
    """The first stage settings that determine its latents, apart from the weights."""
    return without_added(to_container(root.vae)) | {"weights": None}


def has_own_first_stage(root: Root) -> bool:
    """Whether the cached latents' first stage is used, not one that `vae.weights` names."""
    return root.vae.weights in (None, "auto")


def reads_only_cached_latents(root: Root) -> bool:
    """Whether a training step needs neither pixels nor another first stage."""
    is_cached = root.data.stored() is not None
    return is_cached and has_own_first_stage(root) and not root.conditioning.encodes()


def source(root: Root) -> tuple[Path, str]:
    """File and SHA-256 of the first stage that made the cached latents.

    Raises ConfigError where `vae` has other settings, StorageError where there is no index.
    """
    folder, own = Path(root.data.stored()).expanduser(), settings_of(root)
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        made_with, weights, precision = index["vae"], index["first_stage"], index["precision"]
        file, digest = folder / weights["file"], bytes.fromhex(weights["sha256"]).hex()
        if HASH_KEY in index and not has_right_hash(index):
            raise ValueError("damaged")
        names = [k for k in {**own, **made_with} if own.get(k) != made_with.get(k)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise StorageError(
            f"data.root={folder}: it has no readable index.json ({e!r}); task=encode "
            "task.to=FOLDER writes it when all clips are encoded"
        ) from e
    if names:
        raise ConfigError(
            *(
                f"vae.{name}={own.get(name)}: the latents in {folder} were made with "
                f"{made_with.get(name)}; use that value, or encode again with task=encode"
                for name in names
            )
        )
    if precision != root.precision:
        raise ConfigError(
            f"precision={root.precision}: the latents in {folder} were made with precision="
            f"{precision}; use that value, or encode again with task=encode"
        )
    return file, digest


def load_matching_weights(root: Root, first_stage: Any) -> None:
    """Loads the weights that made the cached latents into a first stage with all its parts.

    Raises StorageError where `vae.weights` names others.
    """
    if isinstance(first_stage, CachedLatents):
        return
    path, digest = source(root)
    load_weights(first_stage, path if has_own_first_stage(root) else Path(root.vae.weights))
    if fingerprint(first_stage) != digest:
        raise StorageError(
            f"vae.weights={root.vae.weights}: not the weights that made the latents in "
            f"{path.parent}; use vae.weights=auto, or task=encode with these"
        )


class CachedLatents(nn.Module):
    """Replaces a first stage: scales cached latents without loading encoder and decoder.

    Those are loaded when pixels are needed (samples, scores). Its state is the SHA-256 of the full
    first stage, so that a run cannot continue on latents of another.
    """

    digest: Tensor  # (32,) uint8

    def __init__(self, root: Root) -> None:
        super().__init__()
        self.root = root
        self.path, digest = source(root)
        verify(self.path)
        self.register_buffer("digest", torch.tensor([*bytes.fromhex(digest)], dtype=torch.uint8))
        self._network: list[Any] = []  # in a list, so that it is no submodule
        self._is_loaded = True
        self.release()

    def release(self) -> None:
        """Frees the memory of encoder and decoder until pixels are needed again."""
        if not self._is_loaded:
            return
        with torch.device("meta"):
            self._network = [freeze(registry.create(self.root.vae))]
        self._is_loaded = False
        with safetensors_errors(self.path):
            from safetensors import safe_open

            with safe_open(self.path, "pt") as file:
                names = [name for name in file.keys() if not name.startswith(LARGE)]  # noqa: SIM118
                state = {name: file.get_tensor(name) for name in names}
        self._network[0].load_state_dict(state, strict=False, assign=True)

    def posterior(self, stored: Tensor) -> Posterior:
        return self._on(stored.device).posterior(stored)

    def scaled(self, z: Tensor) -> Tensor:
        return self._on(z.device).scaled(z)

    def encode(self, x: Tensor) -> Posterior:
        return self.full(x.device).encode(x)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        return self.full(z.device).decode(z, draws)

    def full(self, device: torch.device) -> Any:
        """The first stage with all its weights. Raises StorageError where the file has changed."""
        if not self._is_loaded:
            full = registry.create(self.root.vae)
            load_weights(full, self.path)
            if fingerprint(full) != bytes(self.digest.tolist()).hex():
                raise StorageError(
                    f"{self.path}: not the file that task=encode wrote; encode again"
                )
            self._network, self._is_loaded = [freeze(full)], True
        return self._on(device)

    def _on(self, device: torch.device) -> Any:
        """The first stage, with its loaded tensors on `device`."""
        (network,) = self._network
        return network._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
