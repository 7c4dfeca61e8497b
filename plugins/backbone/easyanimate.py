"""Transformer of EasyAnimateV2 (Xu et al. 2024, 2405.18991): PixArt with motion modules and skips.

The text-to-image transformer of PixArt-alpha (Chen et al. 2023, 2310.00426) applied to the frames
of a clip: attention within each frame, a motion module over time, cross-attention to text.
Parameter names are the published ones; the published sizes are the presets `easyanimate_v1` and
`easyanimate_v2`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.backbone import (
    check_sizes,
    context_width,
    latent_size,
    refuse_image_context,
    vector_width,
    wired_number,
    with_concat,
)
from plugins._blocks.checkpointing import run_checkpointed
from plugins._blocks.embeddings import timestep_embedding
from plugins._blocks.layers import GELU, MLP, FeedForward, zero_module
from plugins._blocks.motion import MotionModule, frame_sinusoids
from plugins._blocks.skips import apply_blocks, long_skips
from plugins._blocks.unet_attention import Attention
from plugins._configs.backbone import (
    GROUPS,
    MOTION_MODULES,
    motion_setting_problems,
    motion_width_problems,
    slots_taken,
)
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    Hidden,
    SizeError,
    Slots,
    State,
    in_range,
    must_divide,
)
from sandbox.registry import register

MICRO = ("height", "width", "aspect_ratio")  # micro-conditions: pixels, pixels, height / width
TIME_FEATURES = 256
MICRO_SIZE = 128  # the sample_size whose published network has micro-conditions


@register("backbone", "easyanimate")
class EasyAnimate(nn.Module):
    """EasyAnimateV2 transformer: spatial attention, motion modules over time, long skips."""

    @dataclass
    class Config(BackboneConfig):
        """The published hyper-parameters: small sizes, and the published default of the rest.

        sample_size: height and width of the latents that positions are made for; other sizes span
        the same range of positions. As published, sample_size=128 is also conditioned on height,
        width and aspect_ratio. enable_uvit: long skips from early to late blocks.

        motion_module: temporal attention, "vanilla" (per position) or "grid" (over blocks of
        motion_block_size x motion_block_size tokens). motion_depth: its blocks; motion_attentions:
        attentions per block; motion_dim_div: divides its width; motion_positions: whether it has
        frame positions, up to motion_max_frames.

        null: wiring fills it; 0: none. in_channels counts the latents and `concat`;
        caption_channels is the width of the context. vector_dim is the width of a vector condition,
        which the published network does not have: a linear layer adds it to the time embedding.
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
            yield from motion_setting_problems(self)
            for name in ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size",
                         "in_channels", "out_channels", "motion_depth", "motion_attentions",
                         "motion_dim_div", "motion_max_frames"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("caption_channels", "vector_dim"):
                yield from in_range(name, getattr(self, name), 0)
            yield from in_range("norm_eps", self.norm_eps, 1e-12, 1)
            yield from in_range("sample_size", self.sample_size, max(self.patch_size, 1))
            width = self.width()
            if width > 0 and width % 4:
                yield f"{self.stated_width()}: want a multiple of 4"
            if width > 0 and self.has_micro_conditions() and width % 3:
                yield f"{self.stated_width()}: want a multiple of 3 with sample_size={MICRO_SIZE}"
            if self.motion_module in MOTION_MODULES[1:]:
                yield from self.motion_problems(width)

        def motion_problems(self, width: int) -> Iterator[str]:
            if width > 0 and width % GROUPS:
                yield (
                    f"{self.stated_width()}: want a multiple of {GROUPS} (group norm of the motion "
                    "module), or motion_module=none"
                )
            if self.motion_heads > 0 and self.motion_dim_div > 0:
                yield from motion_width_problems(width, self.motion_heads, self.motion_dim_div)

        def width(self) -> int:
            return self.num_attention_heads * self.attention_head_dim

        def stated_width(self) -> str:
            heads, size = self.num_attention_heads, self.attention_head_dim
            return f"attention_head_dim={size}: {heads} heads make a width of {self.width()}"

        def has_micro_conditions(self) -> bool:
            return self.sample_size == MICRO_SIZE

        def blocks(self) -> tuple[str, ...]:
            return tuple(f"transformer_blocks.{i}" for i in range(self.num_layers))

        def hidden(self, block: str) -> Hidden | None:
            cells = 1, self.patch_size, self.patch_size
            return Hidden("b t h w d", self.width(), cells) if block in self.blocks() else None

        def layers(self) -> tuple[str | None, int]:
            return "num_layers", 2 if self.enable_uvit else 1

        def takes(self) -> frozenset[str]:
            return slots_taken(
                context=self.caption_channels != 0,
                vector=self.vector_dim != 0,
                concat=True,
                **dict.fromkeys(MICRO, self.has_micro_conditions()),
            )

        def needs(self) -> frozenset[str]:
            return frozenset(MICRO if self.has_micro_conditions() else ())

        def grid(self, z: Clip) -> Clip:
            """`z`; height and width must divide into patches, and into blocks of a motion grid."""
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
        names = ("in_channels", "out_channels", "caption_channels", "vector_dim")
        in_channels, out_channels, captions, vector_dim = (wired_number(cfg, n) for n in names)
        self.cfg = cfg
        width, patch = cfg.width(), cfg.patch_size
        self.pos_embed = PatchEmbed(in_channels, width, patch)
        self.adaln_single = AdaLNSingle(width, cfg.has_micro_conditions())
        self.vector_in = nn.Linear(vector_dim, width) if vector_dim else None
        self.caption_projection = MLP(captions, width, nn.GELU("tanh")) if captions else None
        self.transformer_blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.long_connect_fc = long_skips(cfg.num_layers if cfg.enable_uvit else 1, width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch**2 * out_channels)

    def from_published(self, state: State) -> State:
        """Converts published weights of this network, or of the image network it starts from.

        Entries that do not fit are kept as they are, so that strict loading reports them.
        """
        state = from_published(state)
        fitted, unused = from_pixart(state, self.state_dict())
        return {k: v if k in unused else fitted[k] for k, v in state.items()}

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) -> (B, out_channels, T, H, W).

        Raises ValueError for inputs that do not match the settings, SizeError for sizes.
        """
        z = self.checked(z_t, cond)
        cfg = self.cfg
        x = self.pos_embed(rearrange(z, "b c t h w -> (b t) c h w"))
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

        def step(block: nn.Module, x: Tensor) -> Tensor:
            return run_checkpointed(cfg.gradient_checkpointing, block, x, modulation, context, bias)

        blocks = [partial(step, block) for block in self.transformer_blocks]
        x = apply_blocks(blocks, self.long_connect_fc, x)
        shift, scale = spread(self.scale_shift_table + e[:, None])
        x = self.proj_out(norm(x, cfg.norm_eps) * (1 + scale) + shift)
        p = cfg.patch_size
        return rearrange(x, "b t h w (p q c) -> b c t (h p) (w q)", p=p, q=p)

    def checked(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """Latents and concat channels (B, in_channels, T, H, W), after all checks."""
        cfg = self.cfg
        z = with_concat(z_t, cond)
        cfg.grid(latent_size(z, cfg.in_channels))
        check_sizes(
            cfg, {"caption_channels": context_width(cond), "vector_dim": vector_width(cond)}
        )
        refuse_image_context("easyanimate", cond)
        if set(cond.scalars) != cfg.needs():
            want, found = sorted(cfg.needs()), sorted(cond.scalars)
            raise ValueError(f"backbone: the inputs have the scalars {found}: want {want}")
        return z

    def positions(self, height: int, width: int, device: torch.device) -> Tensor:
        """(H', W', D) float32: the first half encodes the column, the second the row."""
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


def axis_sinusoids(positions: Tensor, width: int) -> Tensor:
    """(N,) positions on an axis -> (N, width / 2) float32: sines, then cosines."""
    steps = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    angles = positions.double()[:, None] / 10_000.0**steps
    return torch.cat((angles.sin(), angles.cos()), -1).float()


def norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def spread(table: Tensor) -> list[Tensor]:
    """(B, n, D) -> n tensors (B, 1, 1, 1, D) that broadcast over the tokens of a clip."""
    return [row[:, None, None, None] for row in table.unbind(1)]


class Block(nn.Module):
    """Spatial attention, motion module, cross-attention, MLP; adaLN on the first and the last."""

    def __init__(self, cfg: EasyAnimate.Config) -> None:
        super().__init__()
        width, self.eps = cfg.width(), cfg.norm_eps
        heads = (width, cfg.num_attention_heads, cfg.attention_head_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(*heads, bias=cfg.attention_bias)
        self.attn_temporal = motion_of(cfg)
        has_text = bool(cfg.caption_channels)
        self.attn2 = Attention(*heads, width, cfg.attention_bias) if has_text else None
        self.ff = FeedForward(width, GELU)

    def forward(
        self, x: Tensor, modulation: Tensor, context: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """x (B, T, H, W, D), modulation (B, 6D), context (B, L, D), bias of the scores (B, L)."""
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


class PatchEmbed(nn.Module):
    """Patches of a frame to tokens: (N, C, H, W) -> (N, D, H', W')."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AdaLNSingle(nn.Module):
    """Time embedding, and the modulation that all blocks share (PixArt-alpha, section 2.3)."""

    def __init__(self, width: int, micro: bool) -> None:
        super().__init__()
        self.emb = TimeAndSize(width, micro)
        self.linear = nn.Linear(width, 6 * width)


class TimeAndSize(nn.Module):
    """Embeds time (B,) and optionally height, width and aspect ratio (B, 3): (B, D)."""

    def __init__(self, width: int, micro: bool) -> None:
        super().__init__()
        self.timestep_embedder = MLP(TIME_FEATURES, width, nn.SiLU())
        if micro:
            self.resolution_embedder = MLP(TIME_FEATURES, width // 3, nn.SiLU())
            self.aspect_ratio_embedder = MLP(TIME_FEATURES, width // 3, nn.SiLU())
            zero_module(self.resolution_embedder.linear_2)
            zero_module(self.aspect_ratio_embedder.linear_2)

    def forward(self, t: Tensor, micro: Tensor | None, dtype: torch.dtype) -> Tensor:
        e = self.timestep_embedder(timestep_embedding(t, TIME_FEATURES).to(dtype))
        if micro is None:
            return e
        numbers = timestep_embedding(micro.flatten(), TIME_FEATURES).to(dtype)
        sides, ratio = numbers.unflatten(0, (-1, 3)).split((2, 1), 1)  # (B, 2, F), (B, 1, F)
        parts = self.resolution_embedder(sides), self.aspect_ratio_embedder(ratio)
        return e + torch.cat(parts, 1).flatten(1)


# Conversion of published files: pure functions of state dicts.

POSITIONS = "pos_encoder.pe"


def from_published(state: State) -> State:
    """Drops the tables of frame positions, which are computed here."""
    return {k: v for k, v in state.items() if not k.endswith(POSITIONS)}


def to_published(state: State, max_frames: int = 4096) -> State:
    """Adds the published table of frame positions of each temporal attention."""
    out = dict(state)
    for key, weight in state.items():
        if ".attention_blocks." in key and key.endswith("to_q.weight"):
            table = frame_sinusoids(max_frames, weight.shape[1])[None].to(weight)
            out[key.removesuffix("to_q.weight") + POSITIONS] = table
    return out


def from_pixart(image: State, video: State) -> tuple[State, list[str]]:
    """Copies the weights of an image network (PixArt) into those of a new network `video`.

    As published: weights are matched by name; a patch embedding with more channels is padded with
    zeros; a larger output layer repeats the old one; other shapes are left out. Motion modules and
    skips, which start at zero, keep their weights. Returns the new state, and the names in `image`
    that were not used.
    """
    out, unused = dict(video), []
    for name, weight in image.items():
        if name not in video:
            unused.append(name)
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
            unused.append(name)
    return out, unused
