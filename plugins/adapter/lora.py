"""Low-rank adapters (Hu et al. 2021, 2106.09685) through peft, in files of diffusers or kohya."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plugins._blocks.kohya import from_kohya, hashes, is_kohya, to_kohya
from sandbox.contracts import (
    AdapterConfig,
    BackboneConfig,
    State,
    StorageError,
    above,
    in_range,
    one_of,
)
from sandbox.registry import register

NAME = "default"  # of the adapter in peft, which stands in the names of its weights
FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora_kohya.safetensors"
LAYOUTS = ("diffusers", "kohya")
METADATA = "lora_adapter_metadata"  # where diffusers looks for the strength


@register("adapter", "lora")
class LoRA:
    """Low-rank changes of linear layers, trained in float32 beside a frozen backbone."""

    @dataclass
    class Config(AdapterConfig):
        """Size and strength: a layer becomes W + alpha / rank * B A.

        alpha: null is rank, a strength of 1; targets: suffixes of the layers' names, null those of
        the backbone; weights: a LoRA file to start from, as diffusers writes it (one that says no
        alpha has a strength of 1) or as kohya-ss, and so EasyAnimate, does; layout: of the file
        that a run leaves; prefix: of the names in one of diffusers, which is the folder of the
        network in its pipeline.
        """

        rank: int = 8
        alpha: float | None = None
        dropout: float = 0.0
        targets: tuple[str, ...] | None = None
        weights: str | None = None
        layout: str = "diffusers"
        prefix: str = "transformer"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("rank", self.rank, 1)
            yield from above("alpha", self.alpha, 0)
            yield from in_range("dropout", self.dropout, 0, 0.99)
            if self.targets is not None and not self.targets:
                yield "targets=[]: want names of layers, or null for those of the backbone"
            yield from one_of("layout", self.layout, LAYOUTS)
            if not self.prefix.isidentifier():
                yield f"prefix={self.prefix!r}: want a name such as transformer or unet"

        def files(self) -> dict[str, str | None]:
            return {} if self.weights is None else {"weights": self.weights}

        def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
            if self.targets is None and not backbone.adapter_targets():
                yield "targets=null: this backbone names none; want names of its linear layers"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.targets: tuple[str, ...] = cfg.targets or ()

    def scale(self) -> float:
        """Strength: alpha / rank."""
        return 1.0 if self.cfg.alpha is None else self.cfg.alpha / self.cfg.rank

    def apply(self, backbone: nn.Module, targets: tuple[str, ...], dtype: torch.dtype) -> None:
        """Freezes `backbone` in `dtype` and puts adapters beside its `targets`, or the Config's.

        A is random from the global generator, B zero: nothing changes at first. Raises ValueError
        where no layer has such a name, RuntimeError without peft.
        """
        peft = imported()
        self.targets = self.cfg.targets or targets
        backbone.to(dtype).requires_grad_(False)
        for module in backbone.modules():
            is_leaf = not any(True for _ in module.children())  # others will hold adapters
            if is_leaf and any(True for _ in module.parameters(recurse=False)):
                module._frozen = True  # type: ignore[assignment]  # not in training checkpoints
                module.eval()
        settings = peft.LoraConfig(
            r=self.cfg.rank,
            lora_alpha=self.scale() * self.cfg.rank,
            lora_dropout=self.cfg.dropout,
            target_modules=list(self.targets),
        )
        peft.inject_adapter_in_model(settings, backbone, NAME)
        for name, weight in backbone.named_parameters():
            if ".lora_" in name:
                weight.data = weight.data.float()
        if self.cfg.weights is not None:
            self.load(backbone, Path(self.cfg.weights))

    def published_name(self, name: str) -> str | None:
        """The backbone's own name of a weight; None for those of the adapter."""
        return None if ".lora_" in name else name.replace(".base_layer.", ".")

    def exported(self, backbone: nn.Module) -> tuple[str, State, dict[str, str]]:
        """The file that diffusers' load_lora_weights or EasyAnimate reads, at training's strength.

        Without its metadata a loader of diffusers takes alpha for the rank.
        """
        names = {k: k.replace(f".{NAME}.", ".") for k in backbone.state_dict() if ".lora_" in k}
        state = backbone.state_dict()
        if self.cfg.layout == "kohya":
            own = {new: state[old] for old, new in names.items()}
            tensors = to_kohya(own, self.scale() * self.cfg.rank)
            return KOHYA_FILE, tensors, hashes(tensors)
        tensors = {f"{self.cfg.prefix}.{new}": state[old] for old, new in names.items()}
        said = {
            f"{self.cfg.prefix}.r": self.cfg.rank,
            f"{self.cfg.prefix}.lora_alpha": self.scale() * self.cfg.rank,
            f"{self.cfg.prefix}.target_modules": list(self.targets),
        }
        return FILE, tensors, {METADATA: json.dumps(said)}

    @torch.no_grad()
    def load(self, backbone: nn.Module, path: Path) -> None:
        """Puts the LoRA of `path` in place, at its own strength whatever alpha is here.

        Raises StorageError for names, shapes and ranks that differ.
        """
        found, said = read(path)
        state = backbone.state_dict()
        own = {k.replace(f".{NAME}.", "."): v for k, v in state.items() if ".lora_" in k}
        prefix, alphas = self.cfg.prefix + ".", {}
        if is_kohya(found):
            found, alphas = from_kohya(found, {k.rsplit(".", 2)[0] for k in own})
        found = {k.removeprefix(prefix): v for k, v in found.items()}
        wrong = sorted(set(own) ^ set(found))
        wrong += [k for k in own if k in found and own[k].shape != found[k].shape]
        if wrong:
            raise StorageError(
                f"adapter.weights={path}: {len(wrong)} names or shapes differ from this adapter: "
                f"{', '.join(wrong[:10])}; choose its rank, targets and prefix"
            )
        alpha = said.get(f"{prefix}lora_alpha", self.cfg.rank)
        for name, tensor in own.items():
            factor = 1.0
            if ".lora_B." in name:
                factor = alphas.get(name.rsplit(".", 2)[0], alpha) / self.cfg.rank / self.scale()
            tensor.copy_(found[name] * factor)

    @torch.no_grad()
    def merge(self, backbone: nn.Module) -> None:
        """Adds the change to the weights themselves; the adapter stays, and adds nothing more."""
        for module in backbone.modules():
            if hasattr(module, "merge") and hasattr(module, "base_layer"):
                module.merge()


def imported() -> Any:
    try:
        import peft
    except ImportError as e:
        raise RuntimeError(
            "adapter=lora needs peft: install the extra `lora` (uv sync --extra lora, or pip "
            "install -e '.[lora]')"
        ) from e
    return peft


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a LoRA file, and what its header says of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        said = json.loads(header.get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as e:
        raise StorageError(f"adapter.weights={path}: not a LoRA file that can be read ({e})") from e
    return tensors, said if isinstance(said, dict) else {}
