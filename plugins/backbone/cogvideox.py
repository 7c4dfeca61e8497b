"""The video transformer of CogVideoX (Yang et al. 2024, 2408.06072) in its five released forms.

Every layer attends jointly over text and video tokens, and modulates each with its own shift, scale
and gate. Parameter names are those of the released weights (diffusers layout, folder transformer/),
and the settings those of its config.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.backbone import (
    by_frame,
    by_time,
    check_sizes,
    latent_size,
    refuse_image_context,
    vector_width,
    wired_number,
    with_concat,
)
from plugins._blocks.checkpointing import run_checkpointed
from plugins._blocks.cogvideox_transformer import (
    Block,
    Modulation,
    NumberEmbedding,
    PatchEmbed,
    Rope,
    modulate,
)
from plugins._blocks.grid_tables import rotary_table
from plugins._configs.backbone import slots_taken
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    Hidden,
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
FROM_WIRING = ("in_channels", "out_channels", "text_embed_dim", "max_text_seq_length", "vector_dim")
CLASS = "CogVideoXTransformer3DModel"  # in diffusers
OURS = ("plugin", "vector_dim", "rope_grid", "gradient_checkpointing")  # not settings of diffusers
FIXED = {  # settings of diffusers that are equal in all five releases
    "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0,
    "flip_sin_to_cos": True, "freq_shift": 0, "norm_elementwise_affine": True,
    "timestep_activation_fn": "silu",
}  # fmt: skip


@register("backbone", "cogvideox")
class CogVideoX(nn.Module):
    """CogVideoX transformer: joint attention over text and video, with separate adaLN for each."""

    @dataclass
    class Config(BackboneConfig):
        """Settings of a released config.json under their names, and three of ours.

        The width is num_attention_heads * attention_head_dim. patch_size, patch_size_t: latent
        cells per token in space and time; patch_size_t=null projects single frames by convolution,
        as in 1.0. in_channels: channels of the latents and of `concat`.
        use_rotary_positional_embeddings: RoPE in every layer; false adds sinusoids to the tokens.
        use_learned_positional_embeddings: also adds a stored table of the sample size.
        rope_grid: "counted" numbers the rows and columns for RoPE (1.5, and official fine-tuning of
        all versions); "fitted" stretches them to the sample size (1.0 at inference; equal at that
        size). ofs_embed_dim: width of the embedding of the condition ofs; null without it.
        vector_dim: width of a vector condition, which a linear layer adds to the time embedding; 0
        as released.
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
        temporal_compression_ratio: int = 4  # pixel frames per latent frame
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
                    "(RoPE splits the channels into 2/8, 3/8 and 3/8, in pairs)"
                )
            if self.time_embed_dim < 1:
                yield f"time_embed_dim={self.time_embed_dim}: want >= 1"
            if self.ofs_embed_dim not in (None, self.time_embed_dim):
                want = f"time_embed_dim={self.time_embed_dim} (the embeddings are added)"
                yield f"ofs_embed_dim={self.ofs_embed_dim}: want {want}"
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
            """Rows and columns of patches at the sample size."""
            return self.sample_height // self.patch_size, self.sample_width // self.patch_size

        def sample_latents(self) -> int:
            """Latent frames at the sample size."""
            return (self.sample_frames - 1) // self.temporal_compression_ratio + 1

        def takes_frame_times(self) -> bool:
            return self.patch_size_t is None

        def blocks(self) -> tuple[str, ...]:
            return tuple(f"transformer_blocks.{i}" for i in range(self.num_layers))

        def hidden(self, block: str) -> Hidden | None:
            cells = self.patch_size_t or 1, self.patch_size, self.patch_size
            return Hidden("b (t h w) d", self.width(), cells) if block in self.blocks() else None

        def layers(self) -> tuple[str | None, int]:
            return "num_layers", 1

        def takes(self) -> frozenset[str]:
            return slots_taken(
                context=self.text_embed_dim != 0,
                vector=self.vector_dim != 0,
                concat=True,
                ofs=self.ofs_embed_dim is not None,
            )

        def needs(self) -> frozenset[str]:
            return slots_taken(
                context=bool(self.text_embed_dim or self.max_text_seq_length),
                ofs=self.ofs_embed_dim is not None,
            )

        def grid(self, z: Clip) -> Clip:
            """`z`, with frames padded to a multiple of patch_size_t."""
            must_divide("height", z.height, self.patch_size)
            must_divide("width", z.width, self.patch_size)
            if self.use_learned_positional_embeddings:
                for name in ("height", "width"):
                    if getattr(z, name) != getattr(self, f"sample_{name}"):
                        rule = f"{getattr(self, f'sample_{name}')}, the size of the stored table"
                        raise SizeError(name, getattr(z, name), rule)
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
                raise ConfigError(f"vector_dim={self.vector_dim}: want 0; diffusers has no vector")
            own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OURS}
            patch_bias = self.patch_size_t is None  # as released, although 1.5 has a bias
            return {"_class_name": CLASS, **own, **FIXED, "patch_bias": patch_bias}

        def adapter_targets(self) -> tuple[str, ...]:
            return ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        filled = {name: wired_number(cfg, name) for name in FROM_WIRING}
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
        self.proj_out = nn.Linear(width, cells * filled["out_channels"])
        self.initialise()

    def from_published(self, state: State) -> State:
        """Drops the stored position table from released weights where the settings have none."""
        if self.cfg.use_learned_positional_embeddings:
            return state
        return {k: v for k, v in state.items() if k != "patch_embed.pos_embedding"}

    def initialise(self) -> None:
        """Xavier for linear layers; zero for modulations and for the output layer."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.modules():
            if isinstance(layer, Modulation):
                nn.init.zeros_(layer.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) or (B, T) -> (B, out_channels, T, H, W).

        Raises ValueError for inputs that do not match the settings, SizeError for sizes.
        """
        cfg = self.cfg
        z = self.checked(z_t, cond)  # (B, in_channels, T, H, W)
        emb = F.silu(self.embedding(t, cond))  # (B, E) or (B, 1 + T, E)
        x = self.patch_embed.video(z)  # (B, T', H', W', D)
        frames, *grid = x.shape[1:4]
        text, x = self.patch_embed.with_positions(self.patch_embed.text(cond.context, x), x)
        mask = None if cond.context_mask is None else key_mask(cond.context_mask, x.shape[1])
        rope = self.rotary(frames, (grid[0], grid[1]), x.device)
        for block in self.transformer_blocks:
            text, x = run_checkpointed(cfg.gradient_checkpointing, block, text, x, emb, rope, mask)
        shift, scale = self.norm_out(emb, x.shape[1])
        x = self.proj_out(modulate(self.norm_out.norm(self.norm_final(x)), shift, scale))
        return rearrange(
            x, "b (t h w) (c r p q) -> b c (t r) (h p) (w q)",
            t=frames, h=grid[0], r=cfg.patch_size_t or 1, p=cfg.patch_size, q=cfg.patch_size,
        )  # fmt: skip

    def checked(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """Latents and concat channels (B, in_channels, T, H, W), after all checks."""
        cfg = self.cfg
        z = with_concat(z_t, cond)
        size = latent_size(z, cfg.in_channels)
        if cfg.grid(size) != size:
            raise SizeError("frames", size.frames, f"a multiple of patch_size_t={cfg.patch_size_t}")
        refuse_image_context("cogvideox", cond)
        check_sizes(cfg, {"vector_dim": vector_width(cond)})
        if set(cond.scalars) != ({"ofs"} if cfg.ofs_embed_dim is not None else set()):
            stated = f"backbone.ofs_embed_dim={cfg.ofs_embed_dim}"
            raise ValueError(f"{stated}, but the inputs have {sorted(cond.scalars) or 'no ofs'}")
        return z

    def embedding(self, t: Tensor, cond: Conditions) -> Tensor:
        """Sum of the embeddings of time, ofs and vector: (B, E), or (B, 1 + T, E) for t (B, T).

        The first row is that of the text tokens, at the largest time of the clip.
        """
        if t.ndim == 2:
            t = torch.cat((t.amax(1, keepdim=True), t), 1)
        emb = by_time(self.time_embedding, t)
        if self.cfg.ofs_embed_dim is not None:
            emb = emb + by_frame(self.ofs_embedding(cond.scalars["ofs"]), emb)
        if self.cfg.vector_dim:
            emb = emb + by_frame(self.vector_in(cond.vector), emb)
        return emb

    def rotary(self, frames: int, grid: tuple[int, int], device: torch.device) -> Rope | None:
        """Cosines and sines of the video tokens, each (N, attention_head_dim)."""
        cfg = self.cfg
        if not cfg.use_rotary_positional_embeddings:
            return None
        base = cfg.sample_grid() if cfg.rope_grid == "fitted" else None
        return rotary_table(frames, grid, base, cfg.attention_head_dim, device)


def key_mask(context_mask: Tensor, num_video: int) -> Tensor:
    """(B, 1, 1, L + N) bool mask of keys: real text tokens of (B, L), and all video tokens."""
    video = context_mask.new_ones(context_mask.shape[0], num_video)
    return torch.cat((context_mask, video), 1)[:, None, None]
