"""Training on stored latents: what takes the place of the first stage, and whose latents they are.

task=encode leaves an index.json with the settings of the first stage and the file of its weights,
the only ones that the latents of that folder mean anything with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.config import registry
from sandbox.config.root import Root, to_container
from sandbox.contracts import ConfigError, Draws, Posterior, StorageError
from sandbox.model.trainable import fingerprint, freeze
from sandbox.storage.first_stage_files import load_weights

LARGE = ("encoder.", "decoder.")  # what only pixels need


def settings_of(root: Root) -> dict[str, Any]:
    """What of a first stage decides what its latents are, besides the weights."""
    return to_container(root.vae) | {"weights": None}


def needs_no_pixels(root: Root) -> bool:
    """Whether a training step reads stored latents alone, of the first stage that comes along."""
    comes_along = root.vae.weights in (None, "auto")
    return root.data.stored() is not None and comes_along and not root.conditioning.encodes()


def source(root: Root) -> tuple[Path, str]:
    """File and SHA-256 of the first stage that made the stored latents.

    Raises ConfigError where `vae` has other settings, StorageError where there is no index.
    """
    folder = Path(root.data.stored()).expanduser()
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        made_with, weights = index["vae"], index["first_stage"]
    except (OSError, ValueError, KeyError) as e:
        raise StorageError(
            f"data.root={folder}: it has no index.json that can be read ({e!r}); task=encode "
            "task.to=FOLDER writes it when all clips are stored"
        ) from e
    own = settings_of(root)
    if made_with != own:
        names = [k for k in (*own, *made_with) if own.get(k) != made_with.get(k)]
        raise ConfigError(
            *(
                f"vae.{name}={own.get(name)}: the latents in {folder} were made with "
                f"{made_with.get(name)}; use that, or task=encode with this one"
                for name in dict.fromkeys(names)
            )
        )
    if index["precision"] != root.precision:
        raise ConfigError(
            f"precision={root.precision}: the latents in {folder} were made with precision="
            f"{index['precision']}, and others are made with this one; use that, or encode again"
        )
    return folder / weights["file"], weights["sha256"]


def prepare_stored(root: Root, first_stage: Any) -> None:
    """Gives a whole first stage, which conditioning asks for, the weights that made the latents.

    Raises StorageError where `vae.weights` names others.
    """
    if isinstance(first_stage, StoredLatents):
        return
    path, digest = source(root)
    load_weights(
        first_stage, path if root.vae.weights in (None, "auto") else Path(root.vae.weights)
    )
    if fingerprint(first_stage) != digest:
        raise StorageError(
            f"vae.weights={root.vae.weights}: not the weights that made the latents in "
            f"{path.parent}; use vae.weights=auto, or task=encode with these"
        )


class StoredLatents(nn.Module):
    """In place of a first stage: reads latents with a few of its numbers, and no network.

    The first stage is loaded when pixels are asked for (samples, scores). Its state is the SHA-256
    of the whole one, so that a run is not continued on latents of another.
    """

    digest: Tensor  # (32,) uint8

    def __init__(self, root: Root) -> None:
        super().__init__()
        self.root = root
        self.path, digest = source(root)
        self.register_buffer("digest", torch.tensor([*bytes.fromhex(digest)], dtype=torch.uint8))
        self._held: list[Any] = []  # hidden: it is no part of the state
        self._is_whole = True
        self.release()

    def release(self) -> None:
        """Gives back the memory of the network, until pixels are asked for again."""
        if self._is_whole:
            with torch.device("meta"):
                self._held = [freeze(registry.create(self.root.vae))]
            self._is_whole = False
            self._put(self._read())

    def posterior(self, stored: Tensor) -> Posterior:
        return self._on(stored.device).posterior(stored)

    def scaled(self, z: Tensor) -> Tensor:
        return self._on(z.device).scaled(z)

    def encode(self, x: Tensor) -> Posterior:
        self.whole()
        return self._on(x.device).encode(x)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        self.whole()
        return self._on(z.device).decode(z, draws)

    def whole(self) -> Any:
        """The first stage with all its weights. Raises StorageError where they are others."""
        if not self._is_whole:
            whole = registry.create(self.root.vae)
            load_weights(whole, self.path)
            if fingerprint(whole) != bytes(self.digest.tolist()).hex():
                raise StorageError(f"{self.path}: not what task=encode has written; encode again")
            self._held, self._is_whole = [freeze(whole)], True
        return self._held[0]

    def _on(self, device: torch.device) -> Any:
        """The first stage with all that is loaded of it on `device`."""
        (held,) = self._held
        for module in held.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor.device != device and not tensor.is_meta:
                        own[name] = _moved(tensor, device)
        return held

    def _put(self, state: dict[str, Tensor]) -> None:
        """Puts some weights in their places."""
        for name, tensor in state.items():
            place, _, last = name.rpartition(".")
            module = self._held[0].get_submodule(place)
            own = module._parameters if last in module._parameters else module._buffers
            own[last] = _like(own[last], tensor)

    def _read(self) -> dict[str, Tensor]:
        """Tensors of the file but the large ones, which are not read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                names = [name for name in file.keys() if not name.startswith(LARGE)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as e:
            raise StorageError(f"{self.path}: not a file of weights that can be read ({e})") from e


def _like(own: Tensor | None, tensor: Tensor) -> Tensor:
    is_parameter = isinstance(own, nn.Parameter)
    return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return _like(tensor, tensor.detach().to(device))
