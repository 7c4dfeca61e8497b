"""An encoder that is fitted in seconds: it tells the words of a caption from single frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sandbox.contracts import FeaturesConfig, in_range
from sandbox.registry import register

BATCH, LR = 64, 0.01


@register("features", "words")
class Words(nn.Module):
    """A small convolutional network, fitted to name the words of the captions of training clips.

    For data with few words and small frames, such as data=moving_digits.
    """

    @dataclass
    class Config(FeaturesConfig):
        """width: channels of the features. stride: pixels per position, a power of 2. steps: of the
        fit, each on 64 frames (about 8 s with the defaults); clips: number of training clips for
        it.
        """

        width: int = 64
        stride: int = 4
        steps: int = 600
        clips: int = 2048

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("width", self.width, 1)
            yield from in_range("steps", self.steps, 2)
            yield from in_range("clips", self.clips, 1)
            if self.stride < 1 or self.stride & (self.stride - 1):
                yield f"stride={self.stride}: want a power of 2"

        def channels(self) -> int:
            return self.width

        def fit_clips(self) -> int:
            return self.clips

        def needs(self) -> frozenset[str]:
            return frozenset({"captions"})

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = nn.ModuleList(convolutions(cfg))
        for layer in self.layers:
            as_buffers(layer)

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """Fits on frames of clips (N, 3, T, H, W) in [-1, 1]. Deterministic.

        Raises ValueError without two different words.
        """
        known = sorted({word for caption in captions for word in caption.split()})
        if len(known) < 2:
            raise ValueError("features=words: the captions have fewer than two different words")
        wanted = torch.tensor([[w in c.split() for w in known] for c in captions]).float()
        wanted /= wanted.sum(1, keepdim=True)
        with torch.random.fork_rng(devices=()), torch.enable_grad():
            torch.manual_seed(0)
            network = Classifier(self.cfg, len(known))
            optimizer = torch.optim.AdamW(network.parameters(), LR)
            rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, self.cfg.steps)
            for _ in range(self.cfg.steps):
                rows = torch.randint(len(video), (BATCH,))
                frames = torch.randint(video.shape[2], (BATCH,))
                logits = network(video[rows, :, frames])
                optimizer.zero_grad()
                F.cross_entropy(logits, wanted[rows]).backward()
                optimizer.step()
                rates.step()
        for own, fitted in zip(self.layers, network.without_norms(), strict=True):
            own.load_state_dict(fitted.state_dict())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, width, H / stride, W / stride)."""
        x = images
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Classifier(nn.Module):
    """The convolutions with batch norms, and a linear layer on pooled features (N, words)."""

    def __init__(self, cfg: Words.Config, words: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(convolutions(cfg))
        self.norms = nn.ModuleList(nn.BatchNorm2d(cfg.width) for _ in self.layers)
        self.words = nn.Linear(2 * cfg.width, words)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.words(torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1))

    def without_norms(self) -> list[nn.Module]:
        """The convolutions with the norms, as they are in eval mode, merged into them."""
        pairs: Any = zip(self.eval().layers, self.norms, strict=True)
        return [fuse_conv_bn_eval(layer, norm) for layer, norm in pairs]


def convolutions(cfg: Words.Config) -> list[nn.Module]:
    """Pairs of which the first halves the size, until a position has `stride` pixels."""
    found, channels = [], 3
    for _ in range(max(1, cfg.stride.bit_length() - 1)):
        down = nn.Conv2d(channels, cfg.width, 4, 2, 1)
        first = down if cfg.stride > 1 else nn.Conv2d(channels, cfg.width, 3, 1, 1)
        found += [first, nn.Conv2d(cfg.width, cfg.width, 3, 1, 1)]
        channels = cfg.width
    return found


def as_buffers(layer: nn.Module) -> None:
    """Its weights become buffers, which are in checkpoints and which no optimizer trains."""
    for name, parameter in [*layer.named_parameters(recurse=False)]:
        delattr(layer, name)
        layer.register_buffer(name, parameter.detach())
