"""The UNet of latent diffusion (Rombach et al. 2022, 2112.10752) and its blocks.

The UNet of DynamiCrafter (Xing et al. 2023, 2310.12190) adds temporal layers. Parameter names are
the published ones. Frames are (N, C, H, W) with N = B * T, frame-major.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.backbone import (
    check_sizes,
    context_width,
    vector_width,
    wired_number,
    with_concat,
)
from plugins._blocks.checkpointing import run_checkpointed
from plugins._blocks.conv3d import Conv3d
from plugins._blocks.embeddings import timestep_embedding
from plugins._blocks.layers import GroupNorm, zero_module
from sandbox.contracts import Conditions

GROUPS = 32  # of every group norm, as published


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
class LayerInputs:
    """Conditions of all layers. Each of the n token sets is shared by N / n consecutive frames."""

    emb: Tensor  # (B, E), of time and vector; (B*T, E) with a time for each frame
    frames: int = 1  # frames per clip
    context: Tensor | None = None  # (n, L, D)
    mask: Tensor | None = None  # (n, L) bool, True for real tokens
    image: Tensor | None = None  # (n, L, D)


def as_rows_of(x: Tensor, like: Tensor) -> Tensor:
    """x (B, E) repeated to the length of `like`, which has one row per clip or per frame."""
    return x.repeat_interleave(len(like) // len(x), 0)


class ConditionedLayer(nn.Module, ABC):
    """A layer that reads LayerInputs. `motion_module`, if set, is applied to its output.

    The motion module is inside the layer so that later layers keep their indices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.motion_module: ConditionedLayer | None = None

    @abstractmethod
    def conditioned(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""


class Norm(GroupNorm):
    """Group norm with the published number of groups."""

    def __init__(self, channels: int, eps: float = 1e-5, act: str = "none") -> None:
        super().__init__(GROUPS, channels, eps, act)


# --- blocks ---------------------------------------------------------------------------------------


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2, or by the mean of 2 x 2 pixels."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour upsampling, then an optional convolution."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class TemporalConvBlock(nn.Module):
    """Four convolutions over time and a residual: (B, C, T, H, W) -> the same shape.

    spatial_aware: the kernels also cover three rows and three columns, alternately.
    """

    def __init__(self, channels: int, dropout: float = 0.0, spatial_aware: bool = False) -> None:
        super().__init__()
        rows, columns = ((3, 3, 1), (3, 1, 3)) if spatial_aware else ((3, 1, 1), (3, 1, 1))
        self.conv1 = self.stage(channels, rows)
        self.conv2 = self.stage(channels, columns, nn.Dropout(dropout))
        self.conv3 = self.stage(channels, rows, nn.Dropout(dropout))
        self.conv4 = self.stage(channels, columns, nn.Dropout(dropout))
        zero_module(self.conv4[-1])

    @staticmethod
    def stage(channels: int, kernel: tuple[int, int, int], *dropout: nn.Module) -> nn.Sequential:
        time, rows, columns = kernel
        conv = Conv3d(channels, channels, kernel, padding=(time // 2, rows // 2, columns // 2))
        # Identity takes the index of the published SiLU, which the norm applies.
        return nn.Sequential(Norm(channels, act="silu"), nn.Identity(), *dropout, conv)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


class ResBlock(ConditionedLayer):
    """Two convolutions, conditioned on the time embedding between them, and a residual.

    resample: "down" or "up" by two, or "none"; temporal_conv: applied to the output as clips.
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
            nn.Identity(),  # index of the published SiLU, which the norm applies; also below
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        resamplers = {"none": nn.Identity, "down": Downsample, "up": Upsample}
        # Both branches share it: it has no parameters.
        self.resample = resamplers[resample](channels, False)
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            Norm(out_channels, act="silu"),
            nn.Identity(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        self.temopral_conv = temporal_conv  # as published: the misspelt name

    def forward(self, x: Tensor, emb: Tensor, frames: int = 1) -> Tensor:
        """x (N, C, H, W), emb (n, E) for N / n consecutive frames each -> (N, C', H', W')."""
        return run_checkpointed(self.use_checkpoint, self, x, emb, frames, run=self.run)

    def conditioned(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self(x, inputs.emb, inputs.frames)

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


class AttentionBlock(ConditionedLayer):
    """Self-attention over the pixels of a frame, without a context.

    The channels of `qkv` are q, k, v of head 0, then of head 1, ... (the legacy order), or with
    `use_new_attention_order` q of all heads, then k, then v.
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
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return run_checkpointed(self.use_checkpoint, self, x, run=self.run)

    def conditioned(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self(x)

    def run(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (N, 3C, S)
        q, k, v = rearrange(qkv, f"n {self.order} s -> i n h s d", i=3, h=self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "n h s d -> n (h d) s")).view_as(x)


# --- the network ----------------------------------------------------------------------------------


class Layers(nn.Sequential):
    """Layers in sequence, each followed by its motion module, if any."""

    # Not a ModuleList: FSDP would wrap every layer instead of the block.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a second input
        self, input: Tensor, inputs: LayerInputs
    ) -> Tensor:
        x = input
        for layer in self:
            if not isinstance(layer, ConditionedLayer):
                x = layer(x)
                continue
            x = layer.conditioned(x, inputs)
            if layer.motion_module is not None:
                x = layer.motion_module.conditioned(x, inputs)
        return x


class UNet(nn.Module, ABC):
    """Input blocks, a middle block, and output blocks with a skip from each input block.

    Subclasses define the attention layers (`attention`) and the temporal convolution after a
    ResBlock (`temporal_conv`).
    """

    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        in_channels, out_channels = (
            wired_number(cfg, name) for name in ("in_channels", "out_channels")
        )
        self.cfg = cfg
        width, emb = cfg.model_channels, 4 * cfg.model_channels
        self.time_embed = self.embedder(width, emb)
        # Name and position as in Stability's models; neither published system here has a vector.
        vector_dim = cfg.adm_in_channels
        self.label_emb = nn.Sequential(self.embedder(vector_dim, emb)) if vector_dim else None

        blocks, widths = self.make_input_blocks(in_channels)
        self.input_blocks = nn.ModuleList(blocks)
        width = widths[-1]
        self.middle_block = Layers(
            self.res_block(width, width), *self.attention(width), self.res_block(width, width)
        )
        self.output_blocks = nn.ModuleList(self.make_output_blocks(widths))
        width = cfg.channel_mult[0] * cfg.model_channels
        self.out = nn.Sequential(
            Norm(width, act="silu"),
            nn.Identity(),
            zero_module(nn.Conv2d(width, out_channels, 3, padding=1)),
        )
        self.init_attn: Layers | None = None

    def make_input_blocks(self, in_channels: int) -> tuple[list[Layers], list[int]]:
        """Blocks from the largest to the smallest size, and the channels of their outputs."""
        s = self.cfg
        width = s.model_channels
        blocks = [Layers(nn.Conv2d(in_channels, width, 3, padding=1))]
        widths, last = [width], len(s.channel_mult) - 1
        for level, mult in enumerate(s.channel_mult):
            for _ in range(s.num_res_blocks):
                layers: list[nn.Module] = [self.res_block(width, mult * s.model_channels)]
                width = mult * s.model_channels
                if 2**level in s.attention_resolutions:
                    layers += self.attention(width)
                blocks.append(Layers(*layers))
                widths.append(width)
            if level < last:
                blocks.append(Layers(self.resampler(width, "down")))
                widths.append(width)
        return blocks, widths

    def make_output_blocks(self, widths: list[int]) -> list[Layers]:
        """Blocks from the smallest to the largest size; `widths` are those of the input blocks."""
        s = self.cfg
        blocks, skips, width = [], list(widths), widths[-1]
        for level, mult in reversed(list(enumerate(s.channel_mult))):
            for i in range(s.num_res_blocks + 1):
                layers: list[nn.Module] = [
                    self.res_block(width + skips.pop(), mult * s.model_channels)
                ]
                width = mult * s.model_channels
                if 2**level in s.attention_resolutions:
                    layers += self.attention(width, output=True)
                if level and i == s.num_res_blocks:
                    layers.append(self.resampler(width, "up"))
                blocks.append(Layers(*layers))
        return blocks

    @abstractmethod
    def attention(self, width: int, output: bool = False) -> list[nn.Module]:
        """Attention layers after a ResBlock of `width` channels; `output`: in an output block."""

    def temporal_conv(self, width: int) -> TemporalConvBlock | None:
        """Temporal convolution after a ResBlock of `width` channels, if any."""
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

    def resampler(self, width: int, resample: str) -> nn.Module:
        if self.cfg.resblock_updown:
            return self.res_block(width, width, resample)
        return (Downsample if resample == "down" else Upsample)(width, self.cfg.conv_resample)

    def embedding(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """Embedding of the time and the vector, if any: (B, E), or (B*T, E) for t (B, T)."""
        features = timestep_embedding(t.flatten(), self.cfg.model_channels)
        emb = self.time_embed(features.to(z_t.dtype))
        if self.label_emb is not None:
            emb = emb + as_rows_of(self.label_emb(cond.vector), emb)
        return emb

    def run(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        skips = []
        for block in self.input_blocks:
            x = block(x, inputs)
            if not skips and self.init_attn is not None:
                x = self.init_attn(x, inputs)
            skips.append(x)
        x = self.middle_block(x, inputs)
        for block in self.output_blocks:
            x = block(torch.cat((x, skips.pop()), 1), inputs)
        return self.out(x)

    def checked(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """Latents and concat channels (B, in_channels, T, H, W).

        Raises ValueError for inputs that do not match the settings.
        """
        z = with_concat(z_t, cond)
        if z.ndim != 5:
            raise ValueError(f"backbone: z_t has shape {tuple(z.shape)}: want (B, C, T, H, W)")
        sizes = {"context_dim": context_width(cond), "adm_in_channels": vector_width(cond)}
        check_sizes(self.cfg, {"in_channels": z.shape[1], **sizes})
        return z
