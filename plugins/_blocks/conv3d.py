"""3-D convolution that works around a CPU bug on short clips."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d: (B, C, T, H, W) -> (B, out_channels, T', H', W').

    On a CPU, clips shorter than the kernel are padded in time beforehand. Otherwise the bfloat16
    gradient of the weights reads uninitialised memory in oneDNN 3.13 (torch 2.15), at times NaN.
    """

    def forward(self, input: Tensor) -> Tensor:
        frames, height, width = cast("tuple[int, int, int]", self.padding)  # never a string here
        if not frames or input.device.type != "cpu" or input.shape[2] >= self.kernel_size[0]:
            return super().forward(input)
        x = F.pad(input, (0, 0, 0, 0, frames, frames))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, height, width))
