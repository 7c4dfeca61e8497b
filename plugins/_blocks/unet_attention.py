"""Spatial and temporal transformers of the LDM and DynamiCrafter UNets, with published names.

Rombach et al. 2022 (2112.10752), appendix E.2; Xing et al. 2023 (2310.12190), section 3. Frames are
(N, C, H, W) with N = B * T, frame-major; S = H * W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import einsum
from torch import Tensor, nn

import kernels
from plugins._blocks.attention import attend
from plugins._blocks.checkpointing import run_checkpointed
from plugins._blocks.layers import GEGLU, FeedForward, zero_module
from plugins._blocks.unet import ConditionedLayer, LayerInputs, Norm

PROJECTIONS = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d}


class MultiHead(nn.Module):
    """Projections of multi-head attention, and attention itself; `bias` is of q, k and v."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        context_dim: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or width, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or width, inner, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def heads(self, x: Tensor) -> Tensor:
        """(..., H*d) -> (..., H, d)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (N, S, H*d); k, v (n, L, H*d) and mask (n, L) for N / n frames each -> (N, S, H*d)."""
        joint = q.reshape(len(k), -1, q.shape[-1])  # (n, N/n * S, H*d)
        return attend(self.heads(joint), self.heads(k), self.heads(v), mask).view_as(q)


class Attention(MultiHead):
    """Self-attention, or cross-attention to a context."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (N, S, D), context (n, L, D') with mask (n, L) -> (N, S, D)."""
        source = x if context is None else context
        return self.to_out(self.attend(self.to_q(x), self.to_k(source), self.to_v(source), mask))


class TextImageAttention(MultiHead):
    """Sum of cross-attention to text and to image tokens, with one query for both.

    learnable_scale: multiplies the image part by tanh(alpha) + 1.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, context_dim: int, learnable_scale: bool
    ) -> None:
        super().__init__(width, num_heads, head_dim, context_dim)
        inner = num_heads * head_dim
        self.to_k_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_v_ip = nn.Linear(context_dim, inner, bias=False)
        self.alpha = nn.Parameter(torch.zeros(())) if learnable_scale else None

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, image: Tensor) -> Tensor:
        """x (N, S, D), context (n, L, D') with mask (n, L), image (n', L', D') -> (N, S, D)."""
        q = self.to_q(x)
        from_text = self.attend(q, self.to_k(context), self.to_v(context), mask)
        from_image = self.attend(q, self.to_k_ip(image), self.to_v_ip(image))
        if self.alpha is not None:
            from_image = from_image * (self.alpha.tanh() + 1)
        return self.to_out(from_text + from_image)


class RelativePosition(nn.Module):
    """One vector per signed distance between two frames, which is clamped to +-`limit`."""

    def __init__(self, width: int, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.embeddings_table = nn.Parameter(torch.empty(2 * limit + 1, width))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, frames: int) -> Tensor:
        """(T, T, d): entry (i, j) encodes the distance j - i."""
        index = torch.arange(frames, device=self.embeddings_table.device)
        distances = (index[None] - index[:, None]).clamp(-self.limit, self.limit)
        return self.embeddings_table[distances + self.limit]


class TemporalAttention(MultiHead):
    """Attention over the frames at each position: (B, T, S, D) -> (B, T, S, D).

    causal: over the current and earlier frames only. max_distance: limit of the relative positions
    (Shaw et al. 2018, 1803.02155, equations 3 and 4); 0 for none, which makes attention
    permutation-equivariant in the frames unless causal.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, causal: bool = False, max_distance: int = 0
    ) -> None:
        super().__init__(width, num_heads, head_dim)
        self.causal, self.has_positions = causal, max_distance > 0
        if self.has_positions:
            self.relative_position_k = RelativePosition(head_dim, max_distance)
            self.relative_position_v = RelativePosition(head_dim, max_distance)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.has_positions:
            return self.to_out(self.attend_relative(*map(self.heads, (q, k, v))))
        out = kernels.temporal_attention(q, k, v, heads=self.num_heads, causal=self.causal)
        return self.to_out(out)

    def attend_relative(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, T, S, H, d) -> (B, T, S, H*d); relative positions are added to k and v."""
        frames = q.shape[1]
        position_k, position_v = self.relative_position_k(frames), self.relative_position_v(frames)
        q = q * q.shape[-1] ** -0.5
        scores = einsum(q, k, "b i s h d, b j s h d -> b s h i j")
        scores = scores + einsum(q, position_k, "b i s h d, i j d -> b s h i j")
        if self.causal:
            future = torch.ones(frames, frames, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        p = scores.softmax(-1)
        out = einsum(p, v, "b s h i j, b j s h d -> b i s h d")
        return (out + einsum(p, position_v, "b s h i j, i j d -> b i s h d")).flatten(3)


class TransformerBlock(nn.Module):
    """Attention, a second attention that may take a context, and an MLP, each with a residual."""

    def __init__(
        self, width: int, attn1: nn.Module, attn2: nn.Module, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.attn1 = attn1
        self.ff = FeedForward(width, GEGLU)
        self.attn2 = attn2
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        return run_checkpointed(self.use_checkpoint, self, x, *context, run=self.run)

    def run(self, x: Tensor, *context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), *context)
        return x + self.ff(self.norm3(x))


class Transformer(ConditionedLayer):
    """Norm, projection to tokens, blocks, projection back; subclasses define the sequences.

    projection: "linear", or the published convolution with kernel 1, which is the same function.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        projection: str,
        depth: int,
        block: Callable[[], TransformerBlock],
    ) -> None:
        super().__init__()
        self.projection, make = projection, PROJECTIONS[projection]
        ones = () if projection == "linear" else (1,)
        self.norm = Norm(channels, eps=1e-6)
        self.proj_in = make(channels, inner, *ones)
        self.transformer_blocks = nn.ModuleList(block() for _ in range(depth))
        self.proj_out = zero_module(make(inner, channels, *ones))

    def project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, S, D')."""
        if self.projection == "linear":
            return layer(x)
        x = x.transpose(1, 2)  # (N, D, S)
        x = layer(x[..., None]).squeeze(-1) if self.projection == "conv2d" else layer(x)
        return x.transpose(1, 2)

    def tokens(self, x: Tensor, frames: int = 1) -> Tensor:
        """(N, C, H, W) -> (N, S, D)."""
        return self.project(self.proj_in, self.norm(x, frames=frames).flatten(2).transpose(1, 2))

    def residual(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (N, C, H, W) plus the projected tokens (N, S, D)."""
        return x + self.project(self.proj_out, tokens).transpose(1, 2).reshape(x.shape)


class SpatialTransformer(Transformer):
    """Self-attention over the pixels of each frame, then cross-attention to a context.

    Without a context the second attention is also self-attention. image_cross_attention: the
    context is text and image tokens.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        context_dim: int = 0,
        use_linear: bool = False,
        image_cross_attention: bool = False,
        image_scale_learnable: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        inner = num_heads * head_dim

        def block() -> TransformerBlock:
            heads = (inner, num_heads, head_dim)
            attn2 = (
                TextImageAttention(*heads, context_dim, image_scale_learnable)
                if image_cross_attention
                else Attention(*heads, context_dim)
            )
            return TransformerBlock(inner, Attention(*heads), attn2, use_checkpoint)

        super().__init__(channels, inner, "linear" if use_linear else "conv2d", depth, block)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (N, C, H, W), context (n, L, D) with mask (n, L), image (n', L', D) -> (N, C, H, W)."""
        contexts = (context, mask) if image is None else (context, mask, image)
        h = self.tokens(x)
        for block in self.transformer_blocks:
            h = block(h, *contexts)
        return self.residual(x, h)

    def conditioned(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self(x, inputs.context, inputs.mask, inputs.image)


class TemporalTransformer(Transformer):
    """Attention over the frames of a clip at each position, twice, and an MLP."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        use_linear: bool = False,
        causal: bool = False,
        max_distance: int = 0,
        use_checkpoint: bool = False,
    ) -> None:
        inner = num_heads * head_dim
        attention = partial(TemporalAttention, inner, num_heads, head_dim, causal, max_distance)

        def block() -> TransformerBlock:
            return TransformerBlock(inner, attention(), attention(), use_checkpoint)

        super().__init__(channels, inner, "linear" if use_linear else "conv1d", depth, block)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(B*T, C, H, W) with T = `frames` -> the same shape."""
        h = self.tokens(x, frames).unflatten(0, (-1, frames))  # (B, T, S, D)
        for block in self.transformer_blocks:
            h = block(h)
        return self.residual(x, h.flatten(0, 1))

    def conditioned(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self(x, inputs.frames)
