"""Low-rank adapters (Hu et al. 2021, 2106.09685) through peft, in files of diffusers or kohya."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plugins._blocks.kohya import from_kohya, hashes, is_kohya, to_kohya
from plugins._blocks.state_dicts import mismatches
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

NAME = "default"  # peft's adapter name, a part of the names of its weights
FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora_kohya.safetensors"
LAYOUTS = ("diffusers", "kohya")
METADATA = "lora_adapter_metadata"  # header entry in which diffusers expects the scale


@register("adapter", "lora")
class LoRA:
    """LoRA: low-rank updates of linear layers, trained in float32 on a frozen backbone."""

    @dataclass
    class Config(AdapterConfig):
        """A layer becomes W + alpha / rank * B A.

        alpha: null uses rank, a scale of 1. targets: suffixes of layer names; null uses those of
        the backbone. weights: a LoRA file to start from, of diffusers (without an alpha its scale
        is 1) or of kohya-ss, as EasyAnimate. layout: format of the exported file. prefix: of the
        names in a diffusers file, the folder of the network in the pipeline.
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
                yield "targets=null: this backbone has no defaults; want names of linear layers"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.targets: tuple[str, ...] = cfg.targets or ()

    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.cfg.alpha is None else self.cfg.alpha / self.cfg.rank

    def apply(self, backbone: nn.Module, targets: tuple[str, ...], dtype: torch.dtype) -> None:
        """Freezes `backbone` in `dtype` and adds adapters to the Config's targets or to `targets`.

        A is random (global generator) and B is zero, so the output is initially unchanged. Raises
        ValueError if no layer matches, RuntimeError without peft.
        """
        peft = import_peft()
        self.targets = self.cfg.targets or targets
        backbone.to(dtype).requires_grad_(False)
        for module in backbone.modules():
            is_leaf = not any(True for _ in module.children())  # other modules will hold adapters
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
        """Name of a weight in the plain backbone; None for weights of the adapter."""
        return None if ".lora_" in name else name.replace(".base_layer.", ".")

    def exported(self, backbone: nn.Module) -> tuple[str, State, dict[str, str]]:
        """File name, tensors and header for diffusers' load_lora_weights or for EasyAnimate.

        The header keeps the scale: without it, diffusers assumes alpha = rank.
        """
        names = {k: k.replace(f".{NAME}.", ".") for k in backbone.state_dict() if ".lora_" in k}
        state = backbone.state_dict()
        if self.cfg.layout == "kohya":
            own = {new: state[old] for old, new in names.items()}
            tensors = to_kohya(own, self.scale() * self.cfg.rank)
            return KOHYA_FILE, tensors, hashes(tensors)
        tensors = {f"{self.cfg.prefix}.{new}": state[old] for old, new in names.items()}
        metadata = {
            f"{self.cfg.prefix}.r": self.cfg.rank,
            f"{self.cfg.prefix}.lora_alpha": self.scale() * self.cfg.rank,
            f"{self.cfg.prefix}.target_modules": list(self.targets),
        }
        return FILE, tensors, {METADATA: json.dumps(metadata)}

    @torch.no_grad()
    def load(self, backbone: nn.Module, path: Path) -> None:
        """Loads the LoRA file `path` at the scale of the file, whatever alpha is set here.

        Raises StorageError for names, shapes and ranks that differ.
        """
        tensors, metadata = read(path)
        state = backbone.state_dict()
        own = {k.replace(f".{NAME}.", "."): v for k, v in state.items() if ".lora_" in k}
        prefix = self.cfg.prefix + "."
        alphas: dict[str, float] = {}
        if is_kohya(tensors):
            tensors, alphas = from_kohya(tensors, {k.rsplit(".", 2)[0] for k in own})
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        if wrong := mismatches(own, tensors):
            raise StorageError(
                f"adapter.weights={path}: {len(wrong)} names or shapes differ from this adapter: "
                f"{', '.join(wrong[:10])}; set rank, targets and prefix of the file"
            )
        alpha = float(metadata.get(f"{prefix}lora_alpha", self.cfg.rank))
        for name, tensor in own.items():
            factor = 1.0
            if ".lora_B." in name:
                factor = alphas.get(name.rsplit(".", 2)[0], alpha) / self.cfg.rank / self.scale()
            tensor.copy_(tensors[name] * factor)

    @torch.no_grad()
    def merge(self, backbone: nn.Module) -> None:
        """Adds the updates to the backbone's weights; the adapter then adds nothing more."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in backbone.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()


def import_peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise RuntimeError(
            "adapter=lora needs peft: install the extra `lora` (uv sync --extra lora, or pip "
            "install -e '.[lora]')"
        ) from e
    return peft


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a LoRA file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = json.loads(header.get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as e:
        raise StorageError(f"adapter.weights={path}: not a LoRA file that can be read ({e})") from e
    return tensors, metadata if isinstance(metadata, dict) else {}
