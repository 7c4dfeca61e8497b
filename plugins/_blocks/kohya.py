"""LoRA files in the layout of kohya-ss/sd-scripts, which EasyAnimate publishes and reads.

A layer `a.b.c` is `lora_unet__a_b_c`, with `lora_down.weight` (A), `lora_up.weight` (B) and a
number `alpha`; its strength is alpha / rank. Our names are peft's, `a.b.c.lora_A.weight`. Pure
functions of state dicts.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

PREFIX = "lora_unet_"  # EasyAnimate adds another underscore: its root module has an empty name
EASYANIMATE = PREFIX + "_"
NAMES = {"lora_A": "lora_down", "lora_B": "lora_up"}
LEGACY = slice(0x100000, 0x110000)  # the bytes of a file that its older hash looks at

State = dict[str, Tensor]


def is_kohya(state: Iterable[str]) -> bool:
    return any(name.startswith(PREFIX) for name in state)


def from_kohya(state: State, layers: Iterable[str]) -> tuple[State, dict[str, float]]:
    """Weights under our names, and the alphas that the file says, by layer.

    `layers`: names of the network's own layers, which cannot be told from the file's (an underscore
    is part of a name or a dot). What belongs to none of them keeps its name.
    """
    ours = {layer.replace(".", "_"): layer for layer in layers}
    weights, alphas = {}, {}
    for name, tensor in state.items():
        flat, _, kind = name.removeprefix(PREFIX).removeprefix("_").partition(".")
        layer = ours.get(flat)
        names = {f"{theirs}.weight": own for own, theirs in NAMES.items()}
        if layer is not None and kind == "alpha":
            alphas[layer] = float(tensor)
        elif layer is not None and kind in names:
            weights[f"{layer}.{names[kind]}.weight"] = tensor
        else:
            weights[name] = tensor
    return weights, alphas


def to_kohya(state: State, alpha: float, prefix: str = EASYANIMATE) -> State:
    """Weights under our names as a published state, each layer with its `alpha`."""
    out: State = {}
    said = int(alpha) if float(alpha).is_integer() else float(alpha)  # as published: 64, not 64.0
    for name, tensor in state.items():
        layer, kind, _ = name.rsplit(".", 2)
        flat = prefix + layer.replace(".", "_")
        out[f"{flat}.{NAMES[kind]}.weight"] = tensor
        out[f"{flat}.alpha"] = torch.tensor(said)
    return out


def hashes(state: State) -> dict[str, str]:
    """What programs know a file by: SHA-256 of its tensors, and of a piece of the whole file."""
    from safetensors.torch import save

    content = save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, {})
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(tensors).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[LEGACY]).hexdigest()[:8],
    }
