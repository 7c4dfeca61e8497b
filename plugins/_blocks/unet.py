"""The U-shaped network of latent diffusion (Rombach et al. 2022, 2112.10752) and its blocks.

DynamiCrafter's (Xing et al. 2023, 2310.12190) is the same with layers over time. Parameter names
are the published ones. Pictures are (N, C, H, W); those of clips are frame-major, N = B * T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import group_norm
from plugins._blocks.checkpointing import checkpointed
from plugins._blocks.conv3d import Conv3d
from sandbox.contracts import Conditions

GROUPS = 32  # as published, in every norm


class Sizes(Protocol):
    """The published hyper-parameters that both UNets have."""

    in_channels: int | None
    out_channels: int | None
    model_channels: int
    attention_resolutions: tuple[int, ...]  # downsampling factors, not sizes
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    dropout: float
    conv_resample: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_checkpoint: bool
    context_dim: int | None
    adm_in_channels: int | None


@dataclass
class Told:
    """What layers may be told besides the picture; sets of tokens serve N / n pictures each."""

    emb: Tensor  # (B, E)
    frames: int = 1  # pictures of a clip
    context: Tensor | None = None  # (n, L, D)
    mask: Tensor | None = None  # (n, L) bool, True where seen
    image: Tensor | None = None  # (n, L, D)


# --- helpers --------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) numbers -> (B, dim) float32: cosines, then sines.

    In the published order of operations: another one moves the angles at t = 999 by 3e-5.
    """
    steps = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000) * steps / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def zeroed(layer: nn.Module) -> nn.Module:
    """`layer` with all parameters zero, so that its block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Norm(nn.GroupNorm):
    """Group norm through `kernels`, with its neighbours; of `frames` pictures together."""

    def __init__(self, channels: int, eps: float = 1e-5, act: str = "none") -> None:
        super().__init__(GROUPS, channels, eps)
        self.act = act

    def forward(
        self,
        x: Tensor,
        pre_shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        frames: int = 1,
    ) -> Tensor:
        """act(norm(x + pre_shift) * (1 + scale) + shift), the three of them (N, C)."""
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps,
            act=self.act, pre_shift=pre_shift, scale=scale, shift=shift, frames=frames,
        )  # fmt: skip


# --- blocks ---------------------------------------------------------------------------------------


class Downsample(nn.Module):
    """Half the size: a convolution with stride 2, or the mean of 2 x 2 pixels."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the size: each pixel four times, then a convolution, if any."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class TemporalConvBlock(nn.Module):
    """Four convolutions over time and a residual: (B, C, T, H, W) -> the same.

    With `spatial_aware` they look at three rows and at three columns in turn.
    """

    def __init__(self, channels: int, dropout: float = 0.0, spatial_aware: bool = False) -> None:
        super().__init__()
        rows, columns = ((3, 3, 1), (3, 1, 3)) if spatial_aware else ((3, 1, 1), (3, 1, 1))
        self.conv1 = self.stage(channels, rows)
        self.conv2 = self.stage(channels, columns, nn.Dropout(dropout))
        self.conv3 = self.stage(channels, rows, nn.Dropout(dropout))
        self.conv4 = self.stage(channels, columns, nn.Dropout(dropout))
        zeroed(self.conv4[-1])

    @staticmethod
    def stage(channels: int, kernel: tuple[int, int, int], *dropout: nn.Module) -> nn.Sequential:
        conv = Conv3d(channels, channels, kernel, padding=tuple(k // 2 for k in kernel))
        # Identity keeps the place of the published SiLU, which the norm does
        return nn.Sequential(Norm(channels, act="silu"), nn.Identity(), *dropout, conv)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them, and a residual.

    resample: "down" or "up" by two, or "none"; temporal_conv: what follows, on clips.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        resample: str = "none",
        temporal_conv: TemporalConvBlock | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm, self.use_checkpoint = use_scale_shift_norm, use_checkpoint
        self.in_layers = nn.Sequential(
            Norm(channels, act="silu"),
            nn.Identity(),  # the published SiLU, which the norm does; so below
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        resamplers = {"none": nn.Identity, "down": Downsample, "up": Upsample}
        # one for both branches: without a convolution it has no parameters
        self.resample = resamplers[resample](channels, False)
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            Norm(out_channels, act="silu"),
            nn.Identity(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        self.temopral_conv = temporal_conv  # the name as published

    def forward(self, x: Tensor, emb: Tensor, frames: int = 1) -> Tensor:
        """x (N, C, H, W), emb (n, E) of N / n consecutive pictures each -> (N, C', H', W')."""
        return checkpointed(self.use_checkpoint, self, x, emb, frames, run=self.run)

    def tell(self, x: Tensor, told: Told) -> Tensor:
        return self(x, told.emb, told.frames)

    def run(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self.resample(norm(x)))
        e = self.emb_layers(emb).repeat_interleave(len(x) // len(emb), 0)  # (N, C') or (N, 2C')
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, 1)
            h = rest(norm(h, scale=scale, shift=shift))
        else:
            h = rest(norm(h, pre_shift=e))
        h = self.skip_connection(self.resample(x)) + h
        if self.temopral_conv is None:
            return h
        h = self.temopral_conv(rearrange(h, "(b t) c h w -> b c t h w", t=frames))
        return rearrange(h, "b c t h w -> (b t) c h w")


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a picture, without a context.

    `qkv` makes q, k and v of the first head, then of the second, ... (the legacy order), or with
    `use_new_attention_order` all q, then all k, then all v.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        use_new_attention_order: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.order = "(i h d)" if use_new_attention_order else "(h i d)"
        self.num_heads, self.use_checkpoint = num_heads, use_checkpoint
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self.use_checkpoint, self, x, run=self.run)

    def run(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (N, 3C, S)
        q, k, v = rearrange(qkv, f"n {self.order} s -> i n h s d", i=3, h=self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "n h s d -> n (h d) s")).view_as(x)


# --- the whole ------------------------------------------------------------------------------------


class Layers(nn.Sequential):
    """Layers one after the other; those that have `tell` are told what they take.

    A layer's own `motion_module` follows it: inside the layer, it moves no name of those after it.
    """

    def forward(self, x: Tensor, told: Told) -> Tensor:
        for layer in self:
            x = layer.tell(x, told) if hasattr(layer, "tell") else layer(x)
            if (motion := getattr(layer, "motion_module", None)) is not None:
                x = motion.tell(x, told)
        return x


class UNet(nn.Module, ABC):
    """Input blocks down to the smallest size, the middle, and output blocks that see each of them.

    A subclass says what attention is (`attention`) and what follows a ResBlock (`temporal_conv`).
    """

    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        for name in ("in_channels", "out_channels"):
            if getattr(cfg, name) is None:
                raise ValueError(f"backbone.{name} is null: wiring fills it, or set it to a number")
        self.cfg = s = cfg
        width, emb = s.model_channels, 4 * s.model_channels
        self.time_embed = self.embedder(width, emb)
        # name and place of Stability's models; neither published system here has it
        vector = nn.Sequential(self.embedder(s.adm_in_channels, emb)) if s.adm_in_channels else None
        self.label_emb = vector

        blocks = [Layers(nn.Conv2d(s.in_channels, width, 3, padding=1))]
        widths, factor, last = [width], 1, len(s.channel_mult) - 1  # widths of what is kept
        for level, mult in enumerate(s.channel_mult):
            for _ in range(s.num_res_blocks):
                layers = [self.res_block(width, mult * s.model_channels)]
                width = mult * s.model_channels
                if factor in s.attention_resolutions:
                    layers += self.attention(width)
                blocks.append(Layers(*layers))
                widths.append(width)
            if level < last:
                blocks.append(Layers(self.resampler(width, "down")))
                widths.append(width)
                factor *= 2
        self.input_blocks = nn.ModuleList(blocks)

        self.middle_block = Layers(
            self.res_block(width, width), *self.attention(width), self.res_block(width, width)
        )

        blocks = []
        for level, mult in reversed(list(enumerate(s.channel_mult))):
            for i in range(s.num_res_blocks + 1):
                layers = [self.res_block(width + widths.pop(), mult * s.model_channels)]
                width = mult * s.model_channels
                if factor in s.attention_resolutions:
                    layers += self.attention(width, output=True)
                if level and i == s.num_res_blocks:
                    layers.append(self.resampler(width, "up"))
                    factor //= 2
                blocks.append(Layers(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            Norm(width, act="silu"),
            nn.Identity(),
            zeroed(nn.Conv2d(width, s.out_channels, 3, padding=1)),
        )
        self.init_attn: Layers | None = None

    @abstractmethod
    def attention(self, width: int, output: bool = False) -> list[nn.Module]:
        """The layers that follow a ResBlock where there is attention."""

    def temporal_conv(self, width: int) -> TemporalConvBlock | None:
        return None

    @staticmethod
    def embedder(features: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def res_block(self, width: int, out: int, resample: str = "none") -> ResBlock:
        s = self.cfg
        temporal = self.temporal_conv(out) if resample == "none" else None
        return ResBlock(
            width, 4 * s.model_channels, out, s.dropout, s.use_scale_shift_norm, resample, temporal,
            s.use_checkpoint,
        )  # fmt: skip

    def resampler(self, width: int, way: str) -> nn.Module:
        if self.cfg.resblock_updown:
            return self.res_block(width, width, way)
        return (Downsample if way == "down" else Upsample)(width, self.cfg.conv_resample)

    def embedding(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """(B, E) of the time and, if any, the vector."""
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(z_t.dtype))
        return emb if self.label_emb is None else emb + self.label_emb(cond.vector)

    def run(self, x: Tensor, told: Told) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        kept = []
        for block in self.input_blocks:
            x = block(x, told)
            if not kept and self.init_attn is not None:
                x = self.init_attn(x, told)
            kept.append(x)
        x = self.middle_block(x, told)
        for block in self.output_blocks:
            x = block(torch.cat((x, kept.pop()), 1), told)
        return self.out(x)

    def joined(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """z_t with the channels of cond.concat.

        Raises ValueError for latents and conditions that these settings cannot take.
        """
        z = z_t if cond.concat is None else torch.cat((z_t, cond.concat), 1)
        if z.ndim != 5:
            raise ValueError(f"backbone: z_t has shape {tuple(z.shape)}: want (B, C, T, H, W)")
        given = {
            "in_channels": z.shape[1],
            "context_dim": 0 if cond.context is None else cond.context.shape[-1],
            "adm_in_channels": 0 if cond.vector is None else cond.vector.shape[-1],
        }
        for name, number in given.items():
            if number != (getattr(self.cfg, name) or 0):
                stated = f"backbone.{name}={getattr(self.cfg, name)}"
                raise ValueError(f"{stated}, but latents and conditions bring {number}")
        return z
