"""LPIPS, the perceptual distance of Zhang et al. 2018 (1801.03924), VGG16, published names."""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from plugins._blocks.fetching import from_url
from sandbox.contracts import StorageError

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each slice of VGG16
VGG_FILE = "vgg16-397923af.pth"
LINEAR_FILE = "vgg.pth"
SIZES = {VGG_FILE: "528 MB", LINEAR_FILE: "8 kB"}
URLS = {
    VGG_FILE: f"https://download.pytorch.org/models/{VGG_FILE}",
    LINEAR_FILE: "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1",
}


class VGG16(nn.Module):
    """The five slices of VGG16 up to relu5_3; layers keep their numbers in torchvision's model."""

    def __init__(self) -> None:
        super().__init__()
        number, width = 0, 3
        for i, (wider, count) in enumerate(zip(WIDTHS, CONVOLUTIONS, strict=True), 1):
            part = nn.Sequential()
            if i > 1:
                part.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for _ in range(count):
                part.add_module(str(number), nn.Conv2d(width, wider, 3, padding=1))
                part.add_module(str(number + 1), nn.ReLU())
                number, width = number + 2, wider
            self.add_module(f"slice{i}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.children():
            x = part(x)
            found.append(x)
        return found


class ScalingLayer(nn.Module):
    """From [-1, 1] to the numbers that VGG16 was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class Linear(nn.Module):
    """A weight for each channel, none negative once trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Distance of pictures (N, 3, H, W) in [-1, 1] -> (N,); frozen, always in eval mode.

    `weights`: "random" (for tests: it compares nothing that people see); "hub" (downloads what is
    not in torch's cache, 528 MB); a folder that holds both files, vgg16-397923af.pth of torchvision
    and vgg.pth of LPIPS 0.1; or one file with the whole state dict. Raises StorageError, in which
    it is called `setting`.
    """

    def __init__(self, weights: str, setting: str = "reconstruction.lpips") -> None:
        super().__init__()
        self.setting = setting
        self.scaling_layer, self.net = ScalingLayer(), VGG16()
        for i, width in enumerate(WIDTHS):
            self.add_module(f"lin{i}", Linear(width))
        if weights == "random":
            for i in range(len(WIDTHS)):
                nn.init.constant_(getattr(self, f"lin{i}").model[1].weight, 1.0)
        else:
            self._load(weights)
        self._frozen = True  # not trained, hashed in place of being in checkpoints
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        pairs = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)), strict=True)
        for i, (a, b) in enumerate(pairs):
            difference = (_unit(a) - _unit(b)).square()
            total = total + getattr(self, f"lin{i}")(difference).mean((1, 2, 3))
        return total  # type: ignore[return-value]

    def _load(self, weights: str) -> None:
        place = Path(weights).expanduser()
        if place.is_file():
            state = _read(place, self.setting)
        else:
            vgg, linear = (_found(weights, name, self.setting) for name in (VGG_FILE, LINEAR_FILE))
            state = from_torchvision(vgg) | linear
        own = self.state_dict()
        state = {k: v for k, v in own.items() if k.startswith("scaling_layer.")} | state
        strange = sorted(own.keys() ^ state.keys())
        strange += [k for k in own if k in state and own[k].shape != state[k].shape]
        if strange:
            raise StorageError(
                f"{self.setting}={weights}: {len(strange)} names or shapes are not those of "
                f"LPIPS with VGG16: {', '.join(strange[:10])}"
            )
        self.load_state_dict(state)


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's VGG16 -> those here; the classifier is left out."""
    slices = {
        name.split(".")[1]: name.split(".")[0]
        for name in VGG16().state_dict()
    }  # fmt: skip
    parts = [(k.split("."), v) for k, v in state.items() if k.startswith("features.")]
    return {f"net.{slices[n]}.{n}.{kind}": v for (_, n, kind), v in parts if n in slices}


def _found(weights: str, name: str, setting: str) -> dict[str, Tensor]:
    if weights != "hub":
        return _read(Path(weights).expanduser() / name, setting)
    try:
        return from_url(URLS[name], name)
    except OSError as e:
        raise StorageError(
            f"{setting}=hub: {name} ({SIZES[name]}) cannot be fetched from {URLS[name]} "
            f"({e}); put {VGG_FILE} and {LINEAR_FILE} in a folder and name it, "
            f"{setting}=FOLDER, or try things out with {setting}=random"
        ) from e


def _read(path: Path, setting: str) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise StorageError(
            f"{setting}: {path} cannot be read ({e}); want a folder with {VGG_FILE} and "
            f"{LINEAR_FILE}"
        ) from e


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
