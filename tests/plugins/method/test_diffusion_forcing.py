"""A time for each frame: training, networks, sampling."""

import torch

from plugins.backbone.cogvideox import CogVideoX
from plugins.backbone.dit import DiT
from plugins.backbone.unet3d import UNet3D


def network(name: str) -> torch.nn.Module:
    """A small network with all weights random, in float64."""
    torch.manual_seed(0)
    if name == "dit":
        cfg = DiT.Config(width=16, in_channels=3, out_channels=3, context_dim=0, vector_dim=4,
                         concat_channels=0)  # fmt: skip
        net = DiT(cfg)
    elif name == "unet3d":
        net = UNet3D(wired("unet3d"))
    else:
        net = CogVideoX(wired("cogvideox"))
    net = net.double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net
