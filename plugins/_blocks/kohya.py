"""LoRA files in the layout of kohya-ss/sd-scripts, which EasyAnimate publishes and reads.

A layer `a.b.c` is `lora_unet__a_b_c` with `lora_down.weight` (A), `lora_up.weight` (B) and a number
`alpha`; its scale is alpha / rank. Our names are those of peft, `a.b.c.lora_A.weight`.
plugins/_blocks/lora_files.py reads them.
"""

import hashlib

import torch

from sandbox.contracts import State

PREFIX = "lora_unet_"  # EasyAnimate adds an underscore, because its root module has no name
EASYANIMATE = PREFIX + "_"
NAMES = {"lora_A": "lora_down", "lora_B": "lora_up"}
LEGACY = slice(0x100000, 0x110000)  # bytes of a file that the legacy hash covers


def to_kohya(state: State, alpha: float, prefix: str = EASYANIMATE) -> State:
    """Converts weights with our names to the published layout, with an `alpha` per layer."""
    out: State = {}
    number = int(alpha) if float(alpha).is_integer() else float(alpha)  # as published: 64, not 64.0
    for name, tensor in state.items():
        layer, kind, _ = name.rsplit(".", 2)
        flat = prefix + layer.replace(".", "_")
        out[f"{flat}.{NAMES[kind]}.weight"] = tensor
        out[f"{flat}.alpha"] = torch.tensor(number)
    return out


def hashes(state: State) -> dict[str, str]:
    """The hashes of sd-scripts: SHA-256 of the tensors, and of a part of the file; {} on meta."""
    from safetensors.torch import save

    if any(tensor.is_meta for tensor in state.values()):
        return {}
    content = save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, {})
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(tensors).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[LEGACY]).hexdigest()[:8],
    }
