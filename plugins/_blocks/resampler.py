"""The query transformer that resamples image features to a few tokens, with published names.

DynamiCrafter (Xing et al. 2023, 2310.12190, section 3.1) after the Perceiver resampler of Flamingo
(Alayrac et al. 2022, 2204.14198, section 3.1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Latent queries attend to the features and to themselves."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, dim_head * heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (B, L, D), latents (B, N, D) -> (B, N, D)."""
        latents = self.norm2(latents)
        source = torch.cat([self.norm1(x), latents], 1)
        q, k, v = (
            h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, n, d)
            for h in (self.to_q(latents), *self.to_kv(source).chunk(2, -1))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Features (B, L, embedding_dim) -> tokens (B, N, output_dim), N = num_queries * video_length.

    video_length: number of frames with separate `num_queries` tokens each, frame-major; None for
    one set.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_head: int,
        heads: int,
        num_queries: int,
        embedding_dim: int,
        output_dim: int,
        ff_mult: int,
        video_length: int | None = None,
    ) -> None:
        super().__init__()
        number = num_queries * (video_length or 1)
        self.latents = nn.Parameter(torch.randn(1, number, dim) * dim**-0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(dim, dim_head, heads), feed_forward(dim, ff_mult * dim)]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        latents, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(x, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, hidden, bias=False),
        nn.GELU(),
        nn.Linear(hidden, dim, bias=False),
    )
