"""Transformers in space and in time of the LDM and DynamiCrafter UNets, with published names.

Rombach et al. 2022 (2112.10752), appendix E.2; Xing et al. 2023 (2310.12190), section 3. Frames of
a clip are consecutive pictures of a batch, N = B * T; S = H * W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

import kernels
from plugins._blocks.attention import attend
from plugins._blocks.checkpointing import checkpointed
from plugins._blocks.unet import Norm, Told, zeroed

PROJECTIONS = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d}


class Attention(nn.Module):
    """Attention of tokens to one another or to a context; `bias` is of q, k and v."""

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

    def look(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (N, S, H*d); k and v (n, L, H*d) and mask (n, L) serve N / n pictures each -> as q."""
        joint = q.reshape(len(k), -1, q.shape[-1])  # (n, N/n * S, H*d)
        return attend(self.heads(joint), self.heads(k), self.heads(v), mask).view_as(q)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (N, S, D), context (n, L, D') with mask (n, L) -> (N, S, D)."""
        seen = x if context is None else context
        return self.to_out(self.look(self.to_q(x), self.to_k(seen), self.to_v(seen), mask))


class TextImageAttention(Attention):
    """Attention to text and to the tokens of an image, one query for both, summed.

    `learnable_scale`: the image's part is multiplied by tanh(alpha) + 1.
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
        text = self.look(q, self.to_k(context), self.to_v(context), mask)
        picture = self.look(q, self.to_k_ip(image), self.to_v_ip(image))
        if self.alpha is not None:
            picture = picture * (self.alpha.tanh() + 1)
        return self.to_out(text + picture)


class RelativePosition(nn.Module):
    """A vector for each distance between two frames; distances beyond `limit` share the last."""

    def __init__(self, width: int, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.embeddings_table = nn.Parameter(torch.empty(2 * limit + 1, width))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, frames: int) -> Tensor:
        """(T, T, d): row i, column j is of frame j as seen from frame i."""
        places = torch.arange(frames, device=self.embeddings_table.device)
        distances = (places[None] - places[:, None]).clamp(-self.limit, self.limit)
        return self.embeddings_table[distances + self.limit]


class TemporalAttention(Attention):
    """Every place sees itself in all frames, or in earlier ones: (B, T, S, D) -> (B, T, S, D).

    `max_distance`: with relative positions up to so many frames (Shaw et al. 2018, 1803.02155,
    equations 3 and 4), 0 for none: then frames have no order.
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
            return self.to_out(self.look_around(*map(self.heads, (q, k, v))))
        seen = kernels.temporal_attention(q, k, v, heads=self.num_heads, causal=self.causal)
        return self.to_out(seen)

    def look_around(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, T, S, H, d) -> (B, T, S, H*d); k and v have a vector of distance added."""
        frames = q.shape[1]
        near_k, near_v = self.relative_position_k(frames), self.relative_position_v(frames)
        q = q * q.shape[-1] ** -0.5
        scores = einsum(q, k, "b i s h d, b j s h d -> b s h i j")
        scores = scores + einsum(q, near_k, "b i s h d, i j d -> b s h i j")
        if self.causal:
            future = torch.ones(frames, frames, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        p = scores.softmax(-1)
        out = einsum(p, v, "b s h i j, b j s h d -> b i s h d")
        return (out + einsum(p, near_v, "b s h i j, i j d -> b i s h d")).flatten(3)


class GEGLU(nn.Module):
    """(..., D) -> (..., hidden): a value times the gelu of a gate (Shazeer 2020, 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Identity keeps the place of the published dropout, which is never on
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention, a second one that may be told something, and an MLP, each with a residual."""

    def __init__(
        self, width: int, attn1: nn.Module, attn2: nn.Module, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.attn1 = attn1
        self.ff = FeedForward(width)
        self.attn2 = attn2
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, *told: Tensor | None) -> Tensor:
        return checkpointed(self.use_checkpoint, self, x, *told, run=self.run)

    def run(self, x: Tensor, *told: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), *told)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Norm, projection to tokens, blocks, projection back; a subclass says what a sequence is.

    projection: "linear", or the published 1x1 convolution of which it is the same function.
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
        self.proj_out = zeroed(make(inner, channels, *ones))

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

    def added(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (N, C, H, W) plus what tokens (N, S, D) say."""
        return x + self.project(self.proj_out, tokens).transpose(1, 2).reshape(x.shape)


class SpatialTransformer(Transformer):
    """Attention over the pixels of each picture, then to a context; without one, to pixels again.

    image_cross_attention: the context has an image's tokens beside the text.
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
        told = (context, mask) if image is None else (context, mask, image)
        h = self.tokens(x)
        for block in self.transformer_blocks:
            h = block(h, *told)
        return self.added(x, h)

    def tell(self, x: Tensor, told: Told) -> Tensor:
        return self(x, told.context, told.mask, told.image)


class TemporalTransformer(Transformer):
    """Attention over the frames of a clip at each place, twice, and an MLP."""

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
        """(B*T, C, H, W) with T = `frames` -> the same."""
        h = self.tokens(x, frames).unflatten(0, (-1, frames))  # (B, T, S, D)
        for block in self.transformer_blocks:
            h = block(h)
        return self.added(x, h.flatten(0, 1))

    def tell(self, x: Tensor, told: Told) -> Tensor:
        return self(x, told.frames)
