"""The video transformer of CogVideoX (Yang et al. 2024, 2408.06072) in its five released forms.

Text and video tokens attend to one another in every layer; each is shifted, scaled and gated by the
diffusion time on its own. Parameter names are those of the released weights (diffusers layout,
folder transformer/), and the settings those of its config.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.checkpointing import checkpointed
from plugins._blocks.embeddings import sinusoids
from plugins._blocks.grid_tables import (
    cached_sinusoidal_table,
    rotary_table,
    rotated,
    sinusoidal_table,
)
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    SizeError,
    Slots,
    State,
    above,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

ROPE_GRIDS = ("counted", "fitted")
FROM_OTHERS = ("in_channels", "out_channels", "text_embed_dim", "max_text_seq_length", "vector_dim")
CLASS = "CogVideoXTransformer3DModel"  # in diffusers
OURS = ("plugin", "vector_dim", "rope_grid", "gradient_checkpointing")  # settings that it has not
FIXED = {  # its settings that are the same in all five releases
    "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0,
    "flip_sin_to_cos": True, "freq_shift": 0, "norm_elementwise_affine": True,
    "timestep_activation_fn": "silu",
}  # fmt: skip
QK_EPS = 1e-6  # of the norms of queries and keys, as published


@register("backbone", "cogvideox")
class CogVideoX(nn.Module):
    """CogVideoX transformer: joint attention of text and video, expert adaLN for each."""

    @dataclass
    class Config(BackboneConfig):
        """Settings of a released config.json under their names, and a few of ours.

        The width is num_attention_heads * attention_head_dim. patch_size, patch_size_t: latent
        cells of a token in space and in time (null: a frame, by convolution, as in 1.0);
        in_channels: those of the latents and of what is joined to them.
        use_rotary_positional_embeddings: RoPE in every layer, else sinusoids are added to the
        tokens; use_learned_positional_embeddings: a stored table of the sample size is added, too.
        rope_grid: rows and columns of RoPE are counted (1.5, and official fine-tuning of all), or
        the picture is fitted into the sample size (1.0 in inference; the same at that size).
        ofs_embed_dim: the network is told the number ofs. vector_dim: width of a vector that joins
        the time embedding through a layer of its own; 0 as released.
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            "gradient_checkpointing",
            "sample_height",
            "sample_width",
            "sample_frames",
            "rope_grid",
            "spatial_interpolation_scale",
            "temporal_interpolation_scale",
        )

        num_attention_heads: int = 2
        attention_head_dim: int = 32
        num_layers: int = 4
        patch_size: int = 1
        patch_size_t: int | None = None
        in_channels: int | None = None
        out_channels: int | None = None
        text_embed_dim: int | None = None  # 0: no text tokens
        max_text_seq_length: int | None = None  # 0: no text tokens
        vector_dim: int | None = None
        time_embed_dim: int = 64
        ofs_embed_dim: int | None = None
        sample_height: int = 4  # in latent cells
        sample_width: int = 4
        sample_frames: int = 9  # in pixels
        temporal_compression_ratio: int = 4  # frames to a latent frame, of sample_frames
        use_rotary_positional_embeddings: bool = True
        use_learned_positional_embeddings: bool = False
        rope_grid: str = "counted"
        spatial_interpolation_scale: float = 1.875
        temporal_interpolation_scale: float = 1.0
        norm_eps: float = 1e-5
        gradient_checkpointing: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in (
                "num_attention_heads", "attention_head_dim", "num_layers", "patch_size",
                "patch_size_t", "in_channels", "out_channels", "sample_height", "sample_width",
                "sample_frames", "temporal_compression_ratio",
            ):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("text_embed_dim", "max_text_seq_length", "vector_dim"):
                yield from in_range(name, getattr(self, name), 0)
            for name in ("spatial_interpolation_scale", "temporal_interpolation_scale", "norm_eps"):
                yield from above(name, getattr(self, name), 0)
            yield from one_of("rope_grid", self.rope_grid, ROPE_GRIDS)
            if self.attention_head_dim % 16:
                yield (
                    f"attention_head_dim={self.attention_head_dim}: want a multiple of 16 "
                    "(positions take 2/8 and twice 3/8 of the channels, in pairs)"
                )
            if self.time_embed_dim < 1:
                yield f"time_embed_dim={self.time_embed_dim}: want >= 1"
            if self.ofs_embed_dim is not None:
                if self.ofs_embed_dim != self.time_embed_dim:
                    want = f"time_embed_dim={self.time_embed_dim}, which it is added to"
                    yield f"ofs_embed_dim={self.ofs_embed_dim}: want {want}"
                elif self.ofs_embed_dim % 2:
                    yield f"ofs_embed_dim={self.ofs_embed_dim}: want an even number"
            learned = self.use_learned_positional_embeddings
            if learned and (self.patch_size_t or 1) > 1:
                yield "use_learned_positional_embeddings=True: want patch_size_t=null"
            if learned and self.patch_size > 0:
                if self.sample_height % self.patch_size or self.sample_width % self.patch_size:
                    yield f"sample_height and sample_width: want multiples of {self.patch_size}"
                elif self.max_text_seq_length == 0:
                    yield "use_learned_positional_embeddings=True: want text tokens, or false"

        def width(self) -> int:
            return self.num_attention_heads * self.attention_head_dim

        def sample_grid(self) -> tuple[int, int]:
            """Rows and columns of patches of the sample size."""
            return self.sample_height // self.patch_size, self.sample_width // self.patch_size

        def sample_latents(self) -> int:
            """Latent frames of the sample size."""
            return (self.sample_frames - 1) // self.temporal_compression_ratio + 1

        def layers(self) -> tuple[str | None, int]:
            return "num_layers", 1

        def takes(self) -> frozenset[str]:
            told = {
                "context": self.text_embed_dim != 0,
                "vector": self.vector_dim != 0,
                "concat": True,
                "ofs": self.ofs_embed_dim is not None,
            }
            return frozenset(name for name, is_told in told.items() if is_told)

        def needs(self) -> frozenset[str]:
            text = {"context"} if self.text_embed_dim or self.max_text_seq_length else set()
            return frozenset(text | ({"ofs"} if self.ofs_embed_dim is not None else set()))

        def grid(self, z: Clip) -> Clip:
            """`z`, with as many frames in front as fill the last patch in time."""
            must_divide("height", z.height, self.patch_size)
            must_divide("width", z.width, self.patch_size)
            if self.use_learned_positional_embeddings:
                for name in ("height", "width"):
                    if getattr(z, name) != getattr(self, f"sample_{name}"):
                        size = getattr(self, f"sample_{name}")
                        raise SizeError(name, getattr(z, name), f"{size}, that of the stored table")
            patch = self.patch_size_t or 1
            return replace(z, frames=-(-z.frames // patch) * patch)

        def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
            self.grid(z)
            return self.agree(
                in_channels=z.channels + slots.concat,
                out_channels=outputs * z.channels,
                text_embed_dim=slots.context.width if slots.context else 0,
                max_text_seq_length=slots.context.length if slots.context else 0,
                vector_dim=slots.vector,
            )

        def diffusers_config(self) -> dict[str, Any]:
            if self.vector_dim:
                raise ConfigError(f"vector_dim={self.vector_dim}: diffusers' network is told none")
            own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OURS}
            patch_bias = self.patch_size_t is None  # as released; 1.5 has one all the same
            return {"_class_name": CLASS, **own, **FIXED, "patch_bias": patch_bias}

        def adapter_targets(self) -> tuple[str, ...]:
            return ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        for name in FROM_OTHERS:
            if getattr(cfg, name) is None:
                raise ValueError(f"backbone.{name} is null: wiring fills it, or set it to a number")
        self.cfg = cfg
        width, time = cfg.width(), cfg.time_embed_dim
        self.patch_embed = PatchEmbed(cfg)
        self.time_embedding = NumberEmbedding(width, time)
        if cfg.ofs_embed_dim is not None:
            self.ofs_embedding = NumberEmbedding(cfg.ofs_embed_dim, time)
        if cfg.vector_dim:
            self.vector_in = nn.Linear(cfg.vector_dim, time)
        self.transformer_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm_final = nn.LayerNorm(width, cfg.norm_eps)
        self.norm_out = Modulation(time, width, 2, cfg.norm_eps)
        cells = (cfg.patch_size_t or 1) * cfg.patch_size**2
        self.proj_out = nn.Linear(width, cells * cfg.out_channels)
        self.initialise()

    def from_published(self, state: State) -> State:
        """Released weights, without the stored table where the settings leave it out."""
        if self.cfg.use_learned_positional_embeddings:
            return state
        return {k: v for k, v in state.items() if k != "patch_embed.pos_embedding"}

    def initialise(self) -> None:
        """For training from nothing: Xavier, and zero where layers join what they change."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.modules():
            if isinstance(layer, Modulation):
                nn.init.zeros_(layer.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) in [0, 1000) -> (B, out_channels, T, H, W).

        Raises ValueError for what these settings cannot take, SizeError for sizes.
        """
        cfg = self.cfg
        z = self.joined(z_t, cond)  # (B, in_channels, T, H, W)
        emb = F.silu(self.embedding(t, cond))  # (B, E)
        x = self.patch_embed.video(z)  # (B, T', H', W', D)
        frames, *grid = x.shape[1:4]
        text, x = self.patch_embed.placed(self.patch_embed.text(cond.context, x), x)
        mask = None if cond.context_mask is None else seen(cond.context_mask, x.shape[1])
        rope = self.rotary(frames, (grid[0], grid[1]), x.device)
        for block in self.transformer_blocks:
            told = (emb, rope, mask)
            text, x = checkpointed(cfg.gradient_checkpointing, block, text, x, *told)
        shift, scale = self.norm_out(emb)
        x = self.proj_out(modulated(self.norm_out.norm(self.norm_final(x)), shift, scale))
        return rearrange(
            x, "b (t h w) (c r p q) -> b c (t r) (h p) (w q)",
            t=frames, h=grid[0], r=cfg.patch_size_t or 1, p=cfg.patch_size, q=cfg.patch_size,
        )  # fmt: skip

    def joined(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """Latents with the channels of `cond.concat` after them, checked."""
        cfg = self.cfg
        z = z_t if cond.concat is None else torch.cat((z_t, cond.concat), 1)
        if z.ndim != 5 or z.shape[1] != cfg.in_channels:
            want = f"(B, {cfg.in_channels}, T, H, W)"
            raise ValueError(f"backbone: z_t and concat have shape {tuple(z.shape)}: want {want}")
        size = Clip(*z.shape[1:])
        if cfg.grid(size) != size:
            raise SizeError("frames", size.frames, f"a multiple of patch_size_t={cfg.patch_size_t}")
        if cond.image_context is not None:
            raise ValueError("backbone=cogvideox takes no image_context")
        vector = 0 if cond.vector is None else cond.vector.shape[-1]
        if vector != cfg.vector_dim:
            raise ValueError(f"backbone.vector_dim={cfg.vector_dim}, but conditions bring {vector}")
        if set(cond.scalars) != ({"ofs"} if cfg.ofs_embed_dim is not None else set()):
            stated = f"backbone.ofs_embed_dim={cfg.ofs_embed_dim}"
            raise ValueError(f"{stated}, but conditions bring {sorted(cond.scalars) or 'no ofs'}")
        return z

    def embedding(self, t: Tensor, cond: Conditions) -> Tensor:
        """What the network is told besides text: (B, time_embed_dim)."""
        emb = self.time_embedding(t)
        if self.cfg.ofs_embed_dim is not None:
            emb = emb + self.ofs_embedding(cond.scalars["ofs"])
        if self.cfg.vector_dim:
            emb = emb + self.vector_in(cond.vector)
        return emb

    def rotary(
        self, frames: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the video tokens, each (N, attention_head_dim)."""
        cfg = self.cfg
        if not cfg.use_rotary_positional_embeddings:
            return None
        base = cfg.sample_grid() if cfg.rope_grid == "fitted" else None
        return rotary_table(frames, grid, base, cfg.attention_head_dim, device)


def seen(context_mask: Tensor, num_video: int) -> Tensor:
    """(B, 1, 1, L + N) True where a key is seen: real text tokens (B, L), and all video tokens."""
    video = context_mask.new_ones(context_mask.shape[0], num_video)
    return torch.cat((context_mask, video), 1)[:, None, None]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class NumberEmbedding(nn.Module):
    """A number such as the diffusion time: (B,) -> (B, width), by way of `num_features` waves."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(num_features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        waves = sinusoids(x, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class PatchEmbed(nn.Module):
    """Latents and text to tokens of one width, and the table of positions that is added to them."""

    def __init__(self, cfg: CogVideoX.Config) -> None:
        super().__init__()
        self.cfg = cfg
        width, patch = cfg.width(), cfg.patch_size
        if cfg.patch_size_t is None:
            self.proj: nn.Module = nn.Conv2d(cfg.in_channels, width, patch, patch)
        else:
            cells = cfg.patch_size_t * patch**2
            self.proj = nn.Linear(cfg.in_channels * cells, width)  # with bias whatever patch_bias
        if cfg.text_embed_dim:
            self.text_proj = nn.Linear(cfg.text_embed_dim, width)
        if cfg.use_learned_positional_embeddings:
            table = sinusoidal_table(cfg.sample_latents(), cfg.sample_grid(), width, self.scales())
            text = table.new_zeros(cfg.max_text_seq_length, width)
            # as published: a buffer, which no training changes
            table = torch.cat((text, table.flatten(0, 1)))[None]
            self.register_buffer("pos_embedding", table.to(torch.get_default_dtype()))

    def scales(self) -> tuple[float, float]:
        return self.cfg.temporal_interpolation_scale, self.cfg.spatial_interpolation_scale

    def video(self, z: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T', H', W', D)."""
        cfg = self.cfg
        if cfg.patch_size_t is None:
            x = self.proj(rearrange(z, "b c t h w -> (b t) c h w"))
            return rearrange(x, "(b t) d h w -> b t h w d", b=z.shape[0])
        return self.proj(
            rearrange(
                z, "b c (t r) (h p) (w q) -> b t h w (c r p q)",
                r=cfg.patch_size_t, p=cfg.patch_size, q=cfg.patch_size,
            )
        )  # fmt: skip

    def text(self, context: Tensor | None, x: Tensor) -> Tensor:
        """(B, L, text_embed_dim) -> (B, L, D); L is 0 where the network has no text."""
        cfg = self.cfg
        shape = (0, 0) if context is None else tuple(context.shape[1:])
        if shape != (cfg.max_text_seq_length, cfg.text_embed_dim):
            stated = f"max_text_seq_length={cfg.max_text_seq_length}"
            raise ValueError(
                f"backbone.{stated} and text_embed_dim={cfg.text_embed_dim}, but conditions bring "
                f"{shape[0]} tokens of {shape[1]}"
            )
        if context is None or not cfg.text_embed_dim:
            return x.new_zeros(x.shape[0], 0, x.shape[-1])
        return self.text_proj(context.to(self.text_proj.weight.dtype))

    def placed(self, text: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, L, D) and video (B, T', H', W', D) -> (B, N, D), with positions added."""
        cfg, (frames, height, width) = self.cfg, x.shape[1:4]
        x = x.flatten(1, 3)
        if cfg.use_learned_positional_embeddings and frames == cfg.sample_latents():
            table = self.pos_embedding.to(x.dtype)
            return text + table[:, : text.shape[1]], x + table[:, text.shape[1] :]
        if cfg.use_rotary_positional_embeddings and not cfg.use_learned_positional_embeddings:
            return text, x
        # as published: other lengths than the stored table's get sinusoids in its place
        table = cached_sinusoidal_table(
            frames, (height, width), x.shape[-1], self.scales(), x.dtype, x.device
        )
        return text, x + table.flatten(0, 1)


class Modulation(nn.Module):
    """A norm, and the diffusion time's `number` shifts, scales and gates, each (B, 1, D)."""

    def __init__(self, time_embed_dim: int, width: int, number: int, eps: float) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(time_embed_dim, number * width)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(emb)[:, None].chunk(self.number, -1)


class Attention(nn.Module):
    """Self-attention of text and video together; only video turns with its place."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(head_dim, QK_EPS) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self,
        text: Tensor,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        tokens = torch.cat((text, x), 1)  # (B, L + N, D)
        q, k, v = (
            to(tokens).unflatten(-1, (self.num_heads, -1))
            for to in (self.to_q, self.to_k, self.to_v)
        )  # (B, L + N, H, d)
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = (
                torch.cat((part[:, :length], rotated(part[:, length:], *rope)), 1)
                for part in (q, k)
            )
        q, k, v = (part.transpose(1, 2).to(v.dtype) for part in (q, k, v))  # (B, H, L + N, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.to_out[0](out.transpose(1, 2).flatten(2))
        return out[:, :length], out[:, length:]


class GELUProjection(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """MLP of width 4 D; the published list has a dropout of 0 in its middle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = GELUProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Attention and MLP over text (B, L, D) and video (B, N, D), with adaLN of each."""

    def __init__(self, cfg: CogVideoX.Config) -> None:
        super().__init__()
        width, time = cfg.width(), cfg.time_embed_dim
        self.norm1 = Modulation(time, width, 6, cfg.norm_eps)
        self.attn1 = Attention(cfg.num_attention_heads, cfg.attention_head_dim)
        self.norm2 = Modulation(time, width, 6, cfg.norm_eps)
        self.ff = FeedForward(width)

    def forward(
        self,
        text: Tensor,
        x: Tensor,
        emb: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm1(emb)
        text_out, out = self.attn1(
            modulated(self.norm1.norm(text), text_shift, text_scale),
            modulated(self.norm1.norm(x), shift, scale), rope, mask,
        )  # fmt: skip
        text, x = torch.addcmul(text, text_gate, text_out), torch.addcmul(x, gate, out)

        shift, scale, gate, text_shift, text_scale, text_gate = self.norm2(emb)
        tokens = torch.cat(
            (
                modulated(self.norm2.norm(text), text_shift, text_scale),
                modulated(self.norm2.norm(x), shift, scale),
            ),
            1,
        )
        out = self.ff(tokens)
        text = torch.addcmul(text, text_gate, out[:, :length])
        return text, torch.addcmul(x, gate, out[:, length:])
