"""Latent video transformer: space-time patches and adaLN-zero (Peebles & Xie 2023, 2212.09748)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.attention import (
    CausalAttention,
    CrossAttention,
    SelfAttention,
    TemporalAttention,
)
from plugins._blocks.backbone import (
    by_frame,
    by_time,
    check_sizes,
    context_width,
    latent_size,
    refuse_image_context,
    vector_width,
    wired_number,
    with_concat,
)
from plugins._blocks.checkpointing import run_checkpointed
from plugins._blocks.embeddings import GridPositions, NumberEmbedding
from plugins._blocks.motion import MotionModule
from plugins._blocks.skips import apply_blocks, long_skips
from plugins._configs.backbone import (
    GROUPS,
    MOTION_MODULES,
    motion_setting_problems,
    motion_width_problems,
)
from sandbox.contracts import (
    SCALARS,
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    Hidden,
    SizeError,
    Slots,
    above,
    added,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

ATTENTIONS = ("joint", "factorised", "spatial", "causal")
SKIPS = ("none", "uvit")
FROM_WIRING = ("in_channels", "out_channels", "context_dim", "vector_dim", "concat_channels")


def norm(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """LayerNorm without parameters, then x * (1 + scale) + shift."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)


def over_tokens(x: Tensor) -> Tensor:
    """(B, D) -> (B, 1, 1, D), and (B, T, D) -> (B, T, 1, D): broadcasts over (B, T, S, D)."""
    return x[:, None, None] if x.ndim == 2 else x[:, :, None]


@register("backbone", "dit")
class DiT(nn.Module):
    """Video transformer with adaLN-zero and joint or factorised space-time attention."""

    @dataclass
    class Config(BackboneConfig):
        """Width, depth, attention and conditions.

        patch, patch_t: latent cells per token in space and time. max_*: size of the position tables
        in patches. attention: "joint" (all tokens), "factorised" (the tokens of a frame, then those
        at the same position in all frames), "spatial" (the tokens of a frame; every frame has the
        temporal position of an image, so that weights trained on images apply to clips) or "causal"
        (factorised, but a frame sees only itself and the max_frames - 1 frames before it, and their
        number is not limited: for sampler=rollout).
        scalars: scalar conditions such as fps. The time embedding adds a vector condition of the
        network's width directly, and any other through a linear layer. time_scalars: numbers that
        the method tells the network, in the unit of the time; filled from the method. Their
        embeddings start at zero. time_scale: factor of time and time_scalars before they are
        embedded. null: 1, and 0.001 with time_scalars: embeddings of times in [0, 1] vary slowly,
        which derivatives by time need (Lu & Song 2024, 2410.11081, section 4.1).

        motion_module, for attention=spatial: temporal attention with motion_heads heads, "vanilla"
        (per position) or "grid" (over blocks of motion_block_size x motion_block_size tokens).
        skips: "uvit" adds long skips from early to late blocks. Both start at zero, so weights
        trained without them initially compute the same function.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("gradient_checkpointing",)

        width: int = 64
        num_blocks: int = 4
        num_heads: int = 2
        mlp_ratio: float = 4.0
        patch: int = 1
        patch_t: int = 1
        attention: str = "joint"
        motion_module: str = "none"
        motion_block_size: int = 2
        motion_heads: int = 8
        skips: str = "none"
        time_features: int = 64
        max_frames: int = 32
        max_height: int = 32
        max_width: int = 32
        scalars: tuple[str, ...] = ()
        gradient_checkpointing: bool = False
        in_channels: int | None = None
        out_channels: int | None = None
        context_dim: int | None = None  # 0: no cross-attention
        vector_dim: int | None = None  # 0: no vector
        concat_channels: int | None = None
        time_scalars: tuple[str, ...] = added(())
        time_scale: float | None = added(None)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("attention", self.attention, ATTENTIONS)
            yield from one_of("skips", self.skips, SKIPS)
            yield from self.motion_problems()
            if self.attention == "causal" and self.patch_t != 1:
                yield f"patch_t={self.patch_t}: want 1 with attention=causal"
            if self.attention == "causal" and self.width // max(1, self.num_heads) % 2:
                yield f"width={self.width}: want an even number of channels per head"
            yield from above("mlp_ratio", self.mlp_ratio, 0, 64)
            if 0 < self.width * self.mlp_ratio < 1:
                yield f"mlp_ratio={self.mlp_ratio}: want at least 1 / width, {1 / self.width:.2g}"
            for name in ("width", "num_blocks", "num_heads", "patch", "patch_t", "in_channels",
                         "out_channels", "max_frames", "max_height", "max_width"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("context_dim", "vector_dim", "concat_channels"):
                yield from in_range(name, getattr(self, name), 0)
            if self.num_heads > 0 and self.width % self.num_heads:
                yield f"width={self.width}: want a multiple of num_heads={self.num_heads}"
            yield from in_range("time_features", self.time_features, 2)
            yield from above("time_scale", self.time_scale, 0, 1000)
            for name in self.scalars:
                yield from one_of("scalars", name, sorted(SCALARS))
            if len(set(self.scalars)) < len(self.scalars):
                yield f"scalars={list(self.scalars)}: want each name once"

        def motion_problems(self) -> Iterator[str]:
            yield from motion_setting_problems(self)
            if self.motion_module not in MOTION_MODULES[1:]:
                return
            if self.attention != "spatial":
                yield (
                    f"motion_module={self.motion_module!r}: attention={self.attention} already "
                    "mixes frames; want attention=spatial, or none"
                )
            if self.width > 0 and self.width % GROUPS:
                yield f"width={self.width}: want a multiple of {GROUPS}, or motion_module=none"
            elif self.motion_heads > 0:
                yield from motion_width_problems(self.width, self.motion_heads)

        def takes_frame_times(self) -> bool:
            return self.patch_t == 1

        def takes_time_scalars(self) -> bool:
            return True

        def caches_frames(self) -> bool:
            return self.attention == "causal"

        def blocks(self) -> tuple[str, ...]:
            return tuple(f"blocks.{i}" for i in range(self.num_blocks))

        def hidden(self, block: str) -> Hidden | None:
            cells = self.patch_t, self.patch, self.patch
            return Hidden("b t (h w) d", self.width, cells) if block in self.blocks() else None

        def layers(self) -> tuple[str | None, int]:
            return "num_blocks", 2 if self.skips == "uvit" else 1

        def takes(self) -> frozenset[str]:
            return frozenset({"context", "vector", "concat", *self.scalars})

        def needs(self) -> frozenset[str]:
            return frozenset(self.scalars)

        def grid(self, z: Clip) -> Clip:
            """`z` with frames padded to a multiple of patch_t; height and width must divide."""
            block = self.motion_block_size if self.motion_module == "grid" else 1
            must_divide("height", z.height, self.patch * block)
            must_divide("width", z.width, self.patch * block)
            z = replace(z, frames=-(-z.frames // self.patch_t) * self.patch_t)
            patches = {"frames": self.patch_t, "height": self.patch, "width": self.patch}
            if self.attention == "causal":
                del patches["frames"]
            for name, patch in patches.items():
                size, most = getattr(z, name), getattr(self, f"max_{name}")
                if size > most * patch:
                    rule = f"at most {most * patch} (max_{name}={most} patches of {patch})"
                    raise SizeError(name, size, rule)
            return z

        def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
            self.grid(z)
            names = tuple(sorted(slots.time_scalars))
            if self.time_scalars not in ((), names):
                raise ConfigError(
                    f"time_scalars={list(self.time_scalars)}, but {list(names)} is needed"
                )
            scale = 0.001 if names and self.time_scale is None else self.time_scale
            return replace(self, time_scalars=names, time_scale=scale).agree(
                in_channels=z.channels,
                out_channels=outputs * z.channels,
                context_dim=slots.context.width if slots.context else 0,
                vector_dim=slots.vector,
                concat_channels=slots.concat,
            )

        def adapter_targets(self) -> tuple[str, ...]:
            cross = ("to_q", "to_kv") if self.context_dim else ()
            if self.motion_module == "none":
                return ("to_qkv", "to_out", *cross)
            # to_out of a motion module is a Sequential
            outs = ("attn.to_out", "to_out.0", *(("cross.to_out",) if self.context_dim else ()))
            return ("to_qkv", *outs, *dict.fromkeys((*cross, "to_q", "to_k", "to_v")))

        def additions(self) -> tuple[str, ...]:
            return (".motion.", "skips.", "time_scalars.")

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        sizes = (wired_number(cfg, name) for name in FROM_WIRING)
        in_channels, out_channels, context_dim, vector_dim, concat_channels = sizes
        self.cfg = cfg
        cells = cfg.patch_t * cfg.patch**2
        self.patch_in = nn.Linear((in_channels + concat_channels) * cells, cfg.width)
        self.positions = GridPositions((cfg.max_frames, cfg.max_height, cfg.max_width), cfg.width)
        self.time = NumberEmbedding(cfg.time_features, cfg.width)
        self.scalars = nn.ModuleDict(
            {name: NumberEmbedding(cfg.time_features, cfg.width) for name in cfg.scalars}
        )
        direct = vector_dim in (0, cfg.width)
        self.vector_in = nn.Identity() if direct else nn.Linear(vector_dim, cfg.width)
        blocks = [Block(cfg, context_dim, i) for i in range(cfg.num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.skips = long_skips(cfg.num_blocks if cfg.skips == "uvit" else 1, cfg.width)
        self.modulation = nn.Linear(cfg.width, 2 * cfg.width)
        self.patch_out = nn.Linear(cfg.width, out_channels * cells)
        self.initialise(blocks)
        self.time_scalars = nn.ModuleDict(  # last: the other weights are those of a network without
            {name: zero_number_embedding(cfg) for name in cfg.time_scalars}
        )

    def initialise(self, blocks: list["Block"]) -> None:
        """Xavier for linear layers; zero for modulations, output layers and skips."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        zero = [self.modulation, self.patch_out]
        for block in blocks:
            zero += [block.modulation, *([block.cross.to_out] if block.cross else [])]
            zero += [block.motion.temporal_transformer.proj_out] if block.motion else []
        for layer in zero:
            nn.init.zeros_(layer.weight)
        for skip in self.skips:
            nn.init.zeros_(skip.get_parameter("weight"))

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) or (B, T) -> (B, out_channels, T, H, W)."""
        self.check(z_t, cond)
        cfg = self.cfg
        times = {name: cond.scalars[name] for name in self.time_scalars}
        if cfg.time_scale not in (None, 1):
            t, times = t * cfg.time_scale, {n: x * cfg.time_scale for n, x in times.items()}
        c = by_time(self.time, t)  # (B, D) or (B, T, D)
        if cond.vector is not None:
            c = c + by_frame(self.vector_in(cond.vector), c)
        for name, embed in self.scalars.items():
            c = c + by_frame(embed(cond.scalars[name]), c)
        for name, embed in self.time_scalars.items():
            c = c + by_frame(embed(times[name]), c)
        c = F.silu(c)

        z = with_concat(z_t, cond)
        sizes = {"r": cfg.patch_t, "p": cfg.patch, "q": cfg.patch}
        x = rearrange(z, "b c (t r) (h p) (w q) -> b t h w (r p q c)", **sizes)
        frames, height, width = x.shape[1:4]
        # With spatial attention every frame has temporal position 0, the one that images train, and
        # with causal attention rotary positions.
        is_alike = cfg.attention in ("spatial", "causal")
        positions = self.positions(1 if is_alike else frames, height, width)
        x = self.patch_in(x.flatten(2, 3)) + positions  # (B, T, S, D)

        def step(block: nn.Module, x: Tensor) -> Tensor:
            conditions = (c, cond.context, cond.context_mask, height, cond.past)
            return run_checkpointed(cfg.gradient_checkpointing, block, x, *conditions)

        x = apply_blocks([partial(step, block) for block in self.blocks], self.skips, x)
        shift, scale = over_tokens(self.modulation(c)).chunk(2, -1)
        x = self.patch_out(norm(x, shift, scale))
        return rearrange(x, "b t (h w) (r p q c) -> b c (t r) (h p) (w q)", h=height, **sizes)

    def check(self, z_t: Tensor, cond: Conditions) -> None:
        """Raises ValueError for inputs that do not match the settings, SizeError for sizes."""
        cfg = self.cfg
        size = latent_size(z_t, cfg.in_channels)
        if cfg.grid(size) != size:
            raise SizeError("frames", size.frames, f"a multiple of patch_t={cfg.patch_t}")
        sizes = {"context_dim": context_width(cond), "vector_dim": vector_width(cond)}
        concat_channels = 0 if cond.concat is None else cond.concat.shape[1]
        check_sizes(cfg, {**sizes, "concat_channels": concat_channels})
        refuse_image_context("dit", cond)
        names = (*cfg.scalars, *cfg.time_scalars)
        if set(cond.scalars) != set(names):
            raise ValueError(
                f"backbone.scalars={list(names)}, but the inputs have {sorted(cond.scalars)}"
            )


class Block(nn.Module):
    """Attention, motion module, cross-attention and MLP on tokens (B, T, S, D), S of `height` rows.

    `c` (B, D) or (B, T, D) shifts, scales and gates attention and MLP. The output layer of
    cross-attention starts at zero.
    """

    def __init__(self, cfg: DiT.Config, context_dim: int, layer: int = 0) -> None:
        super().__init__()
        self.is_joint, is_causal = cfg.attention == "joint", cfg.attention == "causal"
        factorised = is_causal or cfg.attention == "factorised"
        hidden = int(cfg.width * cfg.mlp_ratio)
        self.modulation = nn.Linear(cfg.width, (9 if factorised else 6) * cfg.width)
        self.attn = SelfAttention(cfg.width, cfg.num_heads)
        self.temporal: nn.Module | None = None
        if is_causal:
            self.temporal = CausalAttention(cfg.width, cfg.num_heads, cfg.max_frames, layer)
        elif factorised:
            self.temporal = TemporalAttention(cfg.width, cfg.num_heads)
        self.motion = motion_of(cfg)
        self.cross = CrossAttention(cfg.width, cfg.num_heads, context_dim) if context_dim else None
        self.mlp = nn.Sequential(
            nn.Linear(cfg.width, hidden), nn.GELU("tanh"), nn.Linear(hidden, cfg.width)
        )

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        context: Tensor | None,
        context_mask: Tensor | None,
        height: int = 1,
        past: Any = None,
    ) -> Tensor:
        parts = 6 if self.temporal is None else 9
        shift, scale, gate, *more = over_tokens(self.modulation(c)).chunk(parts, -1)
        h = norm(x, shift, scale)
        h = h.flatten(1, 2) if self.is_joint else h.flatten(0, 1)  # (B, T*S, D) or (B*T, S, D)
        x = torch.addcmul(x, gate, self.attn(h).view_as(x))
        if self.temporal is not None:
            shift, scale, gate, *more = more
            given = () if past is None else (past,)
            x = torch.addcmul(x, gate, self.temporal(norm(x, shift, scale), *given))
        if self.motion is not None:
            x = self.motion(x.unflatten(2, (height, -1))).flatten(2, 3)
        if self.cross is not None and context is not None:
            x = x + self.cross(norm(x).flatten(1, 2), context, context_mask).view_as(x)
        shift, scale, gate = more
        return torch.addcmul(x, gate, self.mlp(norm(x, shift, scale)))


def zero_number_embedding(cfg: DiT.Config) -> NumberEmbedding:
    """An embedding that is zero before training."""
    embed = NumberEmbedding(cfg.time_features, cfg.width)
    nn.init.zeros_(embed.mlp[-1].get_parameter("weight"))
    nn.init.zeros_(embed.mlp[-1].get_parameter("bias"))
    return embed


def motion_of(cfg: DiT.Config) -> MotionModule | None:
    if cfg.motion_module == "none":
        return None
    block_size = cfg.motion_block_size if cfg.motion_module == "grid" else 1
    return MotionModule(
        cfg.width, cfg.motion_heads, block_size=block_size, max_frames=cfg.max_frames
    )
