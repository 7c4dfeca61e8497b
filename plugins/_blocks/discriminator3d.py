"""3-D discriminator of EasyAnimate (aigc-apps/EasyAnimate, June 2024), with published names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks.conv3d import Conv3d
from plugins._blocks.patchgan import NLayerDiscriminator
from plugins._blocks.unet import GROUPS, Norm

SLOPE = 0.2  # of every leaky ReLU
BLUR = (1.0, 2.0, 1.0)


class BlurPool3d(nn.Module):
    """Blurs and halves time and space, rounding up (Zhang 2019, 1904.11486)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor(BLUR) / sum(BLUR)
        cube = line[:, None, None] * line[:, None] * line
        self.register_buffer("filt", cube.repeat(channels, 1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.filt, stride=2, padding=1, groups=x.shape[1])


class DiscriminatorBlock3D(nn.Module):
    """Norm, leaky ReLU and convolution, twice, and a residual; the sum is divided by sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, is_pooled: bool) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = Conv3d(in_channels, out_channels, 3, padding=1)
        self.downsampler = BlurPool3d(out_channels) if is_pooled else nn.Identity()
        self.norm2 = Norm(out_channels)
        self.conv2 = Conv3d(out_channels, out_channels, 3, padding=1)
        pool = [BlurPool3d(in_channels)] if is_pooled else []
        self.shortcut = nn.Sequential(*pool, nn.Conv3d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(x), SLOPE))
        h = self.conv2(self.downsampler(F.leaky_relu(self.norm2(h), SLOPE)))
        return (h + self.shortcut(x)) * 0.5**0.5


class Discriminator3D(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1] -> a logit for each patch (B, 1, t, h, w).

    The first convolution and all blocks except the last halve the size. Channels are multiples of
    32; published: 64, 128, 256.
    """

    def __init__(self, channels: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        self.conv_in = Conv3d(3, channels[0], 3, 2, 1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock3D(a, b, i < len(channels) - 1)
            for i, (a, b) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        # As published: in the state dict but unused.
        self.conv_norm_out = nn.GroupNorm(GROUPS, channels[-1])
        self.conv_out = Conv3d(channels[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class FramesAndClips(NLayerDiscriminator):
    """PatchGAN for frames, with a 3-D discriminator for clips as `discriminator3d`."""

    def __init__(self, ndf: int, n_layers: int, channels: tuple[int, ...]) -> None:
        super().__init__(ndf, n_layers)
        self.discriminator3d = Discriminator3D(channels)
