"""Motion modules: temporal attention that turns an image network into a video network.

Guo et al. 2023 (2307.04725), section 4.2, in the form and with the parameter names of EasyAnimate
(2405.18991, section 3.1). The last layer starts at zero: the image network is initially unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import kernels
from plugins._blocks.layers import GEGLU, FeedForward, GroupNorm, zero_module
from plugins._blocks.unet import ConditionedLayer, LayerInputs


class FramePositions(nn.Module):
    """Sinusoids of the frame index, computed on the fly.

    The published module stores a table of 4096 frames in its state dict, `pe`. Loading accepts the
    entry and ignores it.
    """

    def __init__(self, width: int, max_frames: int) -> None:
        super().__init__()
        self.width, self.max_frames = width, max_frames

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x (B, T * n, S, D), n consecutive entries per frame -> x plus (T * n, 1, D)."""
        if frames > self.max_frames:
            raise ValueError(f"motion module: {frames} frames: want at most {self.max_frames}")
        pe = frame_sinusoids(frames, self.width, x.device).to(x.dtype)
        return x + pe.repeat_interleave(x.shape[1] // frames, 0)[:, None]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict.pop(prefix + "pe", None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def frame_sinusoids(frames: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(T, D) float32: sines in even channels, cosines in odd ones."""
    index = torch.arange(frames, dtype=torch.float32, device=device)[:, None]
    even = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angles = index * torch.exp(even * (-math.log(10_000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


class MotionAttention(nn.Module):
    """Attention along the second axis: (B, T * n, S, D) -> the same shape; q, k, v have no bias."""

    def __init__(self, width: int, num_heads: int, max_frames: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.pos_encoder = FramePositions(width, max_frames) if max_frames else None

    def forward(self, x: Tensor, frames: int) -> Tensor:
        if self.pos_encoder is not None:
            x = self.pos_encoder(x, frames)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out(kernels.temporal_attention(q, k, v, heads=self.num_heads))


class MotionBlock(nn.Module):
    """Attentions and an MLP, each with a norm before it and a residual."""

    def __init__(self, width: int, num_heads: int, attentions: int, max_frames: int | None) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(
            MotionAttention(width, num_heads, max_frames) for _ in range(attentions)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(attentions))
        self.ff = FeedForward(width, GEGLU)
        self.ff_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x), frames)
        return x + self.ff(self.ff_norm(x))


class MotionTransformer(nn.Module):
    """The residual branch of a motion module: (B, T, H, W, D) -> the same shape."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        attentions: int,
        dim_div: int,
        block_size: int,
        max_frames: int | None,
        num_groups: int,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        width = channels // num_heads // dim_div * num_heads
        self.norm = GroupNorm(num_groups, channels)
        self.proj_in = nn.Linear(channels, width)
        self.transformer_blocks = nn.ModuleList(
            MotionBlock(width, num_heads, attentions, max_frames) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, _ = x.shape
        n = self.block_size
        if h % n or w % n:
            raise ValueError(f"motion module: size {h} x {w}: want multiples of block_size={n}")
        images = rearrange(x, "b t h w c -> (b t) c h w")
        x = rearrange(self.norm(images), "(b t) c h w -> b t h w c", b=b)  # per frame
        x = self.proj_in(x)
        x = rearrange(x, "b t (h n) (w m) c -> b (t n m) (h w) c", n=n, m=n)
        for block in self.transformer_blocks:
            x = block(x, t)
        x = rearrange(x, "b (t n m) (h w) c -> b t (h n) (w m) c", n=n, m=n, h=h // n)
        return self.proj_out(x)


class MotionModule(ConditionedLayer):
    """Temporal attention with a residual, per position or per block of positions.

    block_size: 1 is the vanilla module; n > 1 is the grid, where each position attends to a block
    of n x n positions in all frames. max_frames: None for no frame positions. dim_div: divides the
    inner width. Images pass through as clips of one frame.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        depth: int = 1,
        attentions: int = 2,
        dim_div: int = 1,
        block_size: int = 1,
        max_frames: int | None = 4096,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.temporal_transformer = MotionTransformer(
            channels, num_heads, depth, attentions, dim_div, block_size, max_frames, num_groups
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, D) -> the same shape."""
        return x + self.temporal_transformer(x)

    def conditioned(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        clips = rearrange(x, "(b t) c h w -> b t h w c", t=inputs.frames)
        return rearrange(self(clips), "b t h w c -> (b t) c h w")
