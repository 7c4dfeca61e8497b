"""Low-rank adapters (Hu et al. 2021, 2106.09685) through peft, in files of many dialects."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plugins._blocks.kohya import hashes, to_kohya
from plugins._blocks.lora_files import METADATA, Update, read_lora
from plugins._blocks.state_dicts import differences, log_once
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


@register("adapter", "lora")
class LoRA:
    """LoRA: low-rank updates of linear layers, trained in float32 on a frozen backbone."""

    @dataclass
    class Config(AdapterConfig):
        """A layer becomes W + alpha / rank * B A.

        alpha: null uses rank, a scale of 1. targets: suffixes of layer names; null uses those of
        the backbone. weights: a LoRA file or folder to start from, of peft, diffusers (without an
        alpha its strength is 1), kohya-ss (EasyAnimate) or ComfyUI. layout: format of the exported
        file. prefix: of the names in a diffusers file, the folder of the network in the pipeline.
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
        """Loads the LoRA file `path` at the strength of the file, whatever alpha is set here.

        A layer of a smaller rank than others in the file is padded with zeros. Raises StorageError
        for other layers, shapes and ranks.
        """
        state = backbone.state_dict()
        own = {k.replace(f".{NAME}.", "."): v for k, v in state.items() if ".lora_" in k}
        layers = {k.rsplit(".", 2)[0] for k in own}
        updates, said = read_lora(path, layers, self.cfg.prefix)
        ranks = sorted({update.rank for update in updates.values()})
        if ranks[-1] != self.cfg.rank:
            raise StorageError(
                f"adapter.rank={self.cfg.rank}: want {ranks[-1]}, the rank of the file "
                f"adapter.weights={path}"
            )
        if len(ranks) > 1:
            said.append(f"ranks {ranks[0]} to {ranks[-1]}, padded with zeros")
        given = {
            f"{k}.lora_{s}.weight": x
            for k, u in updates.items()
            for s, x in _pad_rank(u, ranks[-1])
        }
        if found := differences(own, given, "this adapter"):
            targets = ",".join(sorted({_target(layer) for layer in updates}))
            raise StorageError(
                f"adapter.weights={path}: {found.count} names or shapes differ from this adapter; "
                f"set adapter.targets=[{targets}] and the backbone of the file{found.lines}"
            )
        for name, tensor in own.items():
            layer, kind, _ = name.rsplit(".", 2)
            factor = updates[layer].strength / self.scale() if kind == "lora_B" else 1.0
            tensor.copy_(given[name] * factor)
        if not any(x.is_meta for x in own.values()):
            log_once(f"adapter.weights={path}: {', '.join(said)}")

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


def _pad_rank(update: Update, rank: int) -> Iterator[tuple[str, Tensor]]:
    """The factors with zeros up to `rank`."""
    a, b = update.factors["A"], update.factors["B"]
    more = rank - update.rank
    yield "A", nn.functional.pad(a, (0, 0, 0, more))
    yield "B", nn.functional.pad(b, (0, more))


def _target(layer: str) -> str:
    """The end of a layer's name: its last component, with the one before a number."""
    *front, last = layer.split(".")
    return f"{front[-1]}.{last}" if last.isdigit() and front else last
