"""Inflates the weights of a 2-D autoencoder (KL-f8 of Stable Diffusion) to a 3-D one.

Levels and blocks correspond. A 2-D kernel becomes one frame of a 3-D kernel and the other frames
are zero, so the convolutions initially process each frame separately. Pure functions of state
dicts.
"""

import re

import torch
from torch import Tensor

from sandbox.contracts import State

RENAMES = (  # from names of CompVis and of diffusers
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.convs.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.convs."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsampler."),
    (r"\.block\.(\d+)\.", r".convs.\1."),
    (r"\.upsample\.", ".upsampler."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.resnets\.", ".convs."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.(down|up)samplers\.0\.", r".\1sampler."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
    (r"(attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
    (r"(attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
    (r"(attentions\.0)\.(?:proj_out|proj_attn|to_out\.0)\.", r"\1.to_out."),
)


def is_2d(state: State) -> bool:
    """Whether it is the state of a 2-D autoencoder."""
    first = state.get("encoder.conv_in.weight")
    return first is not None and first.ndim == 4


def inflate(state: State, frame: int) -> State:
    """The state of a 2-D autoencoder with our names; 2-D kernels go to index `frame`.

    The index of the current frame is -1 in a causal kernel, and 1 in a centred one.
    """
    ups = [int(m[1]) for k in state if (m := re.match(r"decoder\.up\.(\d+)\.", k))]
    top = max(ups, default=0)  # CompVis numbers levels from the highest resolution
    return {
        renamed_key(k, top): inflated_weight(renamed_key(k, top), v, frame)
        for k, v in state.items()
    }


def renamed_key(name: str, top: int) -> str:
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{top - int(m[1])}.", name)
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def inflated_weight(name: str, weight: Tensor, frame: int) -> Tensor:
    """A 2-D kernel as a 3-D kernel, or as the matrix of a linear layer in attention."""
    if weight.ndim != 4:
        return weight
    if ".attentions." in name:
        return weight[:, :, 0, 0]
    if weight.shape[-1] == 1:
        return weight[:, :, None]
    deep = torch.zeros(*weight.shape[:2], 3, *weight.shape[2:], dtype=weight.dtype)
    deep[:, :, frame] = weight
    return deep
