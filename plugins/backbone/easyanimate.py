"""Transformer of EasyAnimateV2 (Xu et al. 2024, 2405.18991): PixArt with motion modules and skips.

The text-to-image transformer of PixArt-alpha (Chen et al. 2023, 2310.00426) on the frames of a
clip: attention within each frame, a motion module over time, attention to text. Parameter names are
the published ones; the published sizes are the presets `easyanimate_v1` and `easyanimate_v2`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.checkpointing import checkpointed
from plugins._blocks.motion import MotionModule, frame_sinusoids
from plugins._blocks.skips import long_skips, through
from plugins._blocks.unet import timestep_embedding, zeroed
from plugins._blocks.unet_attention import Attention
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    SizeError,
    Slots,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

MOTION_MODULES = ("none", "vanilla", "grid")
GROUPS = 32  # of a motion module's norm, as published
MICRO = ("height", "width", "aspect_ratio")  # micro-conditions: pixels, pixels, height / width
TIME_FEATURES = 256
LARGEST = 128  # the sample_size whose published network has micro-conditions

State = dict[str, Tensor]


@register("backbone", "easyanimate")
class EasyAnimate(nn.Module):
    """EasyAnimateV2's transformer: attention in frames, motion modules over time, long skips."""

    @dataclass
    class Config(BackboneConfig):
        """The published hyper-parameters, small; what is not a size has the published default.

        sample_size: height and width of the latents that positions were made for; a picture of any
        size spans the same positions. enable_uvit: long skips from early blocks to late ones.
        motion_module: none, vanilla (over time at each place) or grid (over time in blocks of
        motion_block_size x motion_block_size tokens); motion_heads, motion_depth (blocks),
        motion_attentions (of a block), motion_dim_div (divides the width) and motion_max_frames
        are of that module; motion_positions: it knows the order of frames.

        null is what the latents and the conditioning need, 0 is none. in_channels counts concat
        channels too. caption_channels: width of the context; vector_dim: of a vector that joins
        the time embedding, which the published network has not. As published, sample_size=128 is
        told height, width and aspect_ratio.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("gradient_checkpointing",)

        num_attention_heads: int = 4
        attention_head_dim: int = 16
        num_layers: int = 4
        patch_size: int = 1
        sample_size: int = 8
        attention_bias: bool = True
        norm_eps: float = 1e-6
        enable_uvit: bool = True
        motion_module: str = "vanilla"
        motion_block_size: int = 2
        motion_heads: int = 8
        motion_depth: int = 1
        motion_attentions: int = 2
        motion_dim_div: int = 1
        motion_positions: bool = True
        motion_max_frames: int = 4096
        gradient_checkpointing: bool = False
        in_channels: int | None = None
        out_channels: int | None = None
        caption_channels: int | None = None
        vector_dim: int | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("motion_module", self.motion_module, MOTION_MODULES)
            for name in ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size",
                         "in_channels", "out_channels", "motion_block_size", "motion_heads",
                         "motion_depth", "motion_attentions", "motion_dim_div",
                         "motion_max_frames"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("caption_channels", "vector_dim"):
                yield from in_range(name, getattr(self, name), 0)
            yield from in_range("norm_eps", self.norm_eps, 1e-12, 1)
            yield from in_range("sample_size", self.sample_size, max(self.patch_size, 1))
            width = self.width()
            if width > 0 and width % 4:
                yield f"{self.stated_width()}: want a multiple of 4"
            if width > 0 and self.has_micro_conditions() and width % 3:
                yield f"{self.stated_width()}: want a multiple of 3 with sample_size={LARGEST}"
            if self.motion_module in MOTION_MODULES[1:]:
                yield from self.motion_problems(width)

        def motion_problems(self, width: int) -> Iterator[str]:
            if width > 0 and width % GROUPS:
                yield (
                    f"{self.stated_width()}: want a multiple of {GROUPS}, which a motion module's "
                    "norm needs, or motion_module=none"
                )
            if self.motion_heads > 0 and self.motion_dim_div > 0:
                inner = width // self.motion_heads // self.motion_dim_div * self.motion_heads
                if width > 0 and (inner < 2 or inner % 2):
                    yield (
                        f"motion_heads={self.motion_heads}: {width} // heads // motion_dim_div * "
                        f"heads is {inner}; want an even number"
                    )

        def width(self) -> int:
            return self.num_attention_heads * self.attention_head_dim

        def stated_width(self) -> str:
            size = self.attention_head_dim
            return f"attention_head_dim={size}: {self.num_attention_heads} heads are {self.width()}"

        def has_micro_conditions(self) -> bool:
            return self.sample_size == LARGEST

        def layers(self) -> tuple[str | None, int]:
            return "num_layers", 2 if self.enable_uvit else 1

        def takes(self) -> frozenset[str]:
            told = {
                "context": self.caption_channels != 0,
                "vector": self.vector_dim != 0,
                "concat": True,
                **dict.fromkeys(MICRO, self.has_micro_conditions()),
            }
            return frozenset(name for name, is_told in told.items() if is_told)

        def needs(self) -> frozenset[str]:
            return frozenset(MICRO if self.has_micro_conditions() else ())

        def grid(self, z: Clip) -> Clip:
            """`z`: patches, and blocks of them in a motion grid, must fit."""
            block = self.motion_block_size if self.motion_module == "grid" else 1
            must_divide("height", z.height, self.patch_size * block)
            must_divide("width", z.width, self.patch_size * block)
            limited = self.motion_module != "none" and self.motion_positions
            if limited and z.frames > self.motion_max_frames:
                raise SizeError(
                    "frames", z.frames, f"at most motion_max_frames={self.motion_max_frames}"
                )
            return z

        def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
            self.grid(z)
            context = slots.context if "context" in self.takes() else None
            return self.agree(
                in_channels=z.channels + slots.concat,
                out_channels=outputs * z.channels,
                caption_channels=context.width if context else 0,
                vector_dim=slots.vector if "vector" in self.takes() else 0,
            )

        def adapter_targets(self) -> tuple[str, ...]:
            """Every linear layer, as published."""
            motion = () if self.motion_module == "none" else ("proj_in",)
            skips = range((self.num_layers - 1) // 2 if self.enable_uvit else 0)
            return (
                "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_out", *motion,
                "linear_1", "linear_2", "linear", *(f"long_connect_fc.{i}" for i in skips),
            )  # fmt: skip

        def additions(self) -> tuple[str, ...]:
            return (".attn_temporal.", "long_connect_fc.")

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        for name in ("in_channels", "out_channels", "caption_channels", "vector_dim"):
            if getattr(cfg, name) is None:
                raise ValueError(f"backbone.{name} is null: wiring fills it, or set it to a number")
        self.cfg = cfg
        width, patch = cfg.width(), cfg.patch_size
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(cfg.in_channels, width, patch, patch)
        self.adaln_single = AdaLNSingle(width, cfg.has_micro_conditions())
        self.vector_in = nn.Linear(cfg.vector_dim, width) if cfg.vector_dim else None
        captions = cfg.caption_channels
        self.caption_projection = TwoLayers(captions, width, nn.GELU("tanh")) if captions else None
        self.transformer_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.long_connect_fc = long_skips(cfg.num_layers if cfg.enable_uvit else 1, width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch**2 * cfg.out_channels)

    def from_published(self, state: State) -> State:
        """A published state of this network, or of the image network that it began from, as ours.

        Names and shapes that have no place here stay: they are refused where weights are put in.
        """
        state = from_published(state)
        fitted, homeless = from_pixart(state, self.state_dict())
        return {k: v if k in homeless else fitted[k] for k, v in state.items()}

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) in [0, 1000) -> (B, out_channels, T, H, W).

        Raises ValueError for what these settings cannot take, SizeError for sizes.
        """
        z = self.joined(z_t, cond)
        cfg = self.cfg
        x = self.pos_embed.proj(rearrange(z, "b c t h w -> (b t) c h w"))
        x = rearrange(x, "(b t) d h w -> b t h w d", b=len(z))  # (B, T, H', W', D)
        x = x + self.positions(*x.shape[2:4], x.device).to(x.dtype)
        micro = torch.stack([cond.scalars[n] for n in MICRO], 1) if cond.scalars else None
        e = self.adaln_single.emb(t, micro, x.dtype)  # (B, D)
        if self.vector_in is not None:
            e = e + self.vector_in(cond.vector)
        modulation = self.adaln_single.linear(F.silu(e))  # (B, 6D)
        context, bias = None, None
        if self.caption_projection is not None:
            context = self.caption_projection(cond.context)  # (B, L, D)
            if cond.context_mask is not None:
                bias = (~cond.context_mask.bool()).to(x.dtype) * -10_000.0  # (B, L), as published

        def step(block: Block, x: Tensor) -> Tensor:
            return checkpointed(cfg.gradient_checkpointing, block, x, modulation, context, bias)

        blocks = [lambda x, block=block: step(block, x) for block in self.transformer_blocks]
        x = through(blocks, self.long_connect_fc, x)
        shift, scale = spread(self.scale_shift_table + e[:, None])
        x = self.proj_out(norm(x, cfg.norm_eps) * (1 + scale) + shift)
        p = cfg.patch_size
        return rearrange(x, "b t h w (p q c) -> b c t (h p) (w q)", p=p, q=p)

    def joined(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """z_t with the channels of cond.concat, where these settings can take them all."""
        cfg = self.cfg
        z = z_t if cond.concat is None else torch.cat((z_t, cond.concat), 1)
        if z.ndim != 5 or z.shape[1] != cfg.in_channels:
            want = f"(B, {cfg.in_channels}, T, H, W), concat channels included"
            raise ValueError(f"backbone: latents have shape {tuple(z.shape)}: want {want}")
        cfg.grid(Clip(*z.shape[1:]))
        given = {
            "caption_channels": 0 if cond.context is None else cond.context.shape[-1],
            "vector_dim": 0 if cond.vector is None else cond.vector.shape[-1],
        }
        for name, number in given.items():
            if number != getattr(cfg, name):
                stated = getattr(cfg, name)
                raise ValueError(f"backbone.{name}={stated}, but conditions bring {number}")
        if cond.image_context is not None:
            raise ValueError("backbone=easyanimate takes no image_context")
        if set(cond.scalars) != cfg.needs():
            want, found = sorted(cfg.needs()), sorted(cond.scalars)
            raise ValueError(f"backbone: conditions bring the numbers {found}: want {want}")
        return z

    def positions(self, height: int, width: int, device: torch.device) -> Tensor:
        """(H', W', D) float32: the first half tells the column, the second the row."""
        cfg = self.cfg
        base = cfg.sample_size // cfg.patch_size
        finer = max(cfg.sample_size // 64, 1)
        rows, columns = (
            axis_sinusoids(torch.arange(n, dtype=torch.float32) / (n / base) / finer, cfg.width())
            for n in (height, width)
        )
        shape = (height, width, cfg.width() // 2)
        both = torch.cat((columns.expand(shape), rows[:, None].expand(shape)), -1)
        return both.to(device)


def axis_sinusoids(places: Tensor, width: int) -> Tensor:
    """(N,) places on an axis -> (N, width / 2) float32: sines, then cosines."""
    steps = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    angles = places.double()[:, None] / 10_000.0**steps
    return torch.cat((angles.sin(), angles.cos()), -1).float()


def norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def spread(table: Tensor) -> list[Tensor]:
    """(B, n, D) -> n of (B, 1, 1, 1, D), for all tokens of a clip."""
    return [row[:, None, None, None] for row in table.unbind(1)]


class Block(nn.Module):
    """Attention in frames, motion, attention to text, MLP; time moves the first and the last."""

    def __init__(self, cfg: EasyAnimate.Config) -> None:
        super().__init__()
        width, self.eps = cfg.width(), cfg.norm_eps
        heads = (width, cfg.num_attention_heads, cfg.attention_head_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(*heads, bias=cfg.attention_bias)
        self.attn_temporal = motion_of(cfg)
        has_text = bool(cfg.caption_channels)
        self.attn2 = Attention(*heads, width, cfg.attention_bias) if has_text else None
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, modulation: Tensor, context: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """x (B, T, H, W, D), modulation (B, 6D), context (B, L, D), bias of scores (B, L)."""
        table = self.scale_shift_table + modulation.unflatten(1, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = spread(table)
        h = norm(x, self.eps) * (1 + scale) + shift
        h = self.attn1(rearrange(h, "b t h w d -> (b t) (h w) d"))
        x = x + gate * h.view_as(x)
        if self.attn_temporal is not None:
            x = self.attn_temporal(x)
        if self.attn2 is not None:
            x = x + self.attn2(x.flatten(1, 3), context, bias).view_as(x)  # as published: no norm
        return x + gate_ff * self.ff(norm(x, self.eps) * (1 + scale_ff) + shift_ff)


def motion_of(cfg: EasyAnimate.Config) -> MotionModule | None:
    if cfg.motion_module == "none":
        return None
    return MotionModule(
        cfg.width(), cfg.motion_heads, cfg.motion_depth, cfg.motion_attentions, cfg.motion_dim_div,
        block_size=cfg.motion_block_size if cfg.motion_module == "grid" else 1,
        max_frames=cfg.motion_max_frames if cfg.motion_positions else None,
        num_groups=GROUPS,
    )  # fmt: skip


class TwoLayers(nn.Module):
    """linear_1, an activation, linear_2: (..., features) -> (..., width)."""

    def __init__(self, features: int, width: int, act: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.act = act
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class AdaLNSingle(nn.Module):
    """The time as a vector, and what all blocks make of it (PixArt-alpha, section 2.3)."""

    def __init__(self, width: int, micro: bool) -> None:
        super().__init__()
        self.emb = TimeAndSize(width, micro)
        self.linear = nn.Linear(width, 6 * width)


class TimeAndSize(nn.Module):
    """Time (B,) and, if any, height, width and aspect ratio (B, 3) -> (B, D)."""

    def __init__(self, width: int, micro: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_FEATURES, width, nn.SiLU())
        self.has_micro = micro
        if micro:
            self.resolution_embedder = TwoLayers(TIME_FEATURES, width // 3, nn.SiLU())
            self.aspect_ratio_embedder = TwoLayers(TIME_FEATURES, width // 3, nn.SiLU())
            zeroed(self.resolution_embedder.linear_2)
            zeroed(self.aspect_ratio_embedder.linear_2)

    def forward(self, t: Tensor, micro: Tensor | None, dtype: torch.dtype) -> Tensor:
        e = self.timestep_embedder(timestep_embedding(t, TIME_FEATURES).to(dtype))
        if not self.has_micro:
            return e
        numbers = timestep_embedding(micro.flatten(), TIME_FEATURES).to(dtype)
        sides, ratio = numbers.unflatten(0, (-1, 3)).split((2, 1), 1)  # (B, 2, F), (B, 1, F)
        parts = self.resolution_embedder(sides), self.aspect_ratio_embedder(ratio)
        return e + torch.cat(parts, 1).flatten(1)


class FeedForward(nn.Module):
    """Four times as wide inside; published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Identity keeps the place of the published dropout, which is never on
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


# Published files: pure functions of state dicts.

POSITIONS = "pos_encoder.pe"


def from_published(state: State) -> State:
    """A published state dict as ours: without the tables of frame positions."""
    return {k: v for k, v in state.items() if not k.endswith(POSITIONS)}


def to_published(state: State, max_frames: int = 4096) -> State:
    """Our state dict as the published one, with a table for each temporal attention."""
    out = dict(state)
    for key, weight in state.items():
        if ".attention_blocks." in key and key.endswith("to_q.weight"):
            table = frame_sinusoids(max_frames, weight.shape[1])[None].to(weight)
            out[key.removesuffix("to_q.weight") + POSITIONS] = table
    return out


def from_pixart(image: State, video: State) -> tuple[State, list[str]]:
    """The state dict of a fresh network `video` with all that fits of an image network's, PixArt.

    As published: weights go by name; patches of more channels get zeros for those that are new; a
    larger output repeats the old one; other shapes are left out. Motion modules and skips, which
    start at zero, stay as they are. Returns the new state and the names in `image` that went
    nowhere.
    """
    out, dropped = dict(video), []
    for name, weight in image.items():
        if name not in video:
            dropped.append(name)
            continue
        own = video[name]
        if name == "pos_embed.proj.weight" and own.shape[1] > weight.shape[1]:
            new = own.shape[1] - weight.shape[1]
            weight = F.pad(weight, (0, 0, 0, 0, 0, new))
        elif name.startswith("proj_out.") and len(own) > len(weight):
            times = -(-len(own) // len(weight))
            weight = torch.cat([weight] * times)[: len(own)]
        if weight.shape == own.shape:
            out[name] = weight.to(own.dtype)
        else:
            dropped.append(name)
    return out, dropped
