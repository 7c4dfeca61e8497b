"""3-D convolution that is safe for short clips on a CPU."""

import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d: (B, C, T, H, W) -> (B, out_channels, T', H', W').

    On a CPU a clip shorter than the kernel is padded in time beforehand: for the bfloat16 gradient
    of such weights oneDNN (3.13, torch 2.15) reads memory that nobody wrote, which at times is NaN.
    """

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = self.padding
        if not frames or x.device.type != "cpu" or x.shape[2] >= self.kernel_size[0]:
            return super().forward(x)
        x = F.pad(x, (0, 0, 0, 0, frames, frames))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, height, width))
