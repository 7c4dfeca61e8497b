"""LPIPS, the perceptual distance of Zhang et al. 2018 (1801.03924), VGG16, published names."""

from pathlib import Path

import torch
from torch import Tensor, nn

from plugins._blocks.fetching import from_url
from plugins._blocks.state_dicts import check_values, differences, read_file
from sandbox.contracts import StorageError

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)  # per slice of VGG16
VGG_FILE = "vgg16-397923af.pth"
LINEAR_FILE = "vgg.pth"
SIZES = {VGG_FILE: "528 MB", LINEAR_FILE: "8 kB"}
URLS = {
    VGG_FILE: f"https://download.pytorch.org/models/{VGG_FILE}",
    LINEAR_FILE: "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1",
}


class VGG16(nn.Module):
    """The five slices of VGG16 up to relu5_3; layers keep the indices of torchvision's model."""

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
    """Converts [-1, 1] to the input normalisation of VGG16."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class Linear(nn.Module):
    """One weight per channel; the trained ones are not negative."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Distance of images (N, 3, H, W) in [-1, 1] -> (N,); frozen, always in eval mode.

    `weights`: "random" (for tests; not a perceptual distance); "hub" (downloads files that are not
    in torch's cache, 528 MB); a folder with vgg16-397923af.pth of torchvision and vgg.pth of LPIPS
    0.1; or a file with the full state dict. `setting` is its name in a StorageError.
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
        self._frozen = True  # checkpoints store its hash instead of its weights
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        pairs = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)), strict=True)
        for i, (a, b) in enumerate(pairs):
            difference = (_unit(a) - _unit(b)).square()
            total = total + getattr(self, f"lin{i}")(difference).mean((1, 2, 3))
        return total

    def _load(self, weights: str) -> None:
        path = Path(weights).expanduser()
        if path.is_file():
            state = _read(path, self.setting)
        else:
            files = (VGG_FILE, LINEAR_FILE)
            vgg, linear = (_read_or_download(weights, name, self.setting) for name in files)
            state = from_torchvision(vgg) | linear
        own = self.state_dict()
        state = {k: v for k, v in own.items() if k.startswith("scaling_layer.")} | state
        if found := differences(own, state):
            raise StorageError(
                f"{self.setting}={weights}: {found.count} names or shapes are not those of LPIPS "
                f"with VGG16{found.lines}"
            )
        check_values(f"{self.setting}={weights}", state, own)
        self.load_state_dict(state)


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts names of torchvision's VGG16; drops the classifier."""
    slices = {name.split(".")[1]: name.split(".")[0] for name in VGG16().state_dict()}
    parts = [(k.split("."), v) for k, v in state.items() if k.startswith("features.")]
    return {f"net.{slices[n]}.{n}.{kind}": v for (_, n, kind), v in parts if n in slices}


def _read_or_download(weights: str, name: str, setting: str) -> dict[str, Tensor]:
    if weights != "hub":
        return _read(Path(weights).expanduser() / name, setting)
    try:
        return from_url(URLS[name], name)
    except OSError as e:
        raise StorageError(
            f"{setting}=hub: {name} ({SIZES[name]}) cannot be downloaded from {URLS[name]} "
            f"({e}); put {VGG_FILE} and {LINEAR_FILE} into a folder and set {setting}=FOLDER, "
            f"or use {setting}=random for a dry run"
        ) from e


def _read(path: Path, setting: str) -> dict[str, Tensor]:
    try:
        return read_file(path, setting)
    except StorageError as e:
        raise StorageError(f"{e}; want a folder with {VGG_FILE} and {LINEAR_FILE}") from e


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
