"""Frozen networks that compute features of images or clips for metrics.

Weights come from a file, torchvision's server or the hub. If they cannot be loaded, the error names
the file, its size and the fix; there is no fallback.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks import openclip
from plugins._blocks.fetching import from_url
from plugins._blocks.state_dicts import check_values, read_file
from sandbox.contracts import StorageError

if TYPE_CHECKING:
    from open_clip.model import CLIP

OF_CLIPS = frozenset({"random3d", "r3d_18", "i3d", "script3d"})  # others take images
TORCHSCRIPT = frozenset({"script2d", "i3d", "script3d"})
BATCH = 32  # clips or images per forward pass
URL = "https://download.pytorch.org/models/"
FILES = {  # torchvision's; the eight hex digits are the start of the file's SHA-256
    "inception_v3": ("inception_v3_google-0cc3c7bd.pth", "104 MB"),
    "r3d_18": ("r3d_18-b3b3357e.pth", "127 MB"),
}
SIDES = {"inception_v3": 299, "r3d_18": 112, "i3d": 224}
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # r3d_18's mean and std
# The config of "tiny", for tests; other names are open_clip's.
CLIP_TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2},
}


class Features:
    """Clips (N, 3, T, H, W) in [-1, 1] -> features (N, D) of a clip network, (N, T, D) of an image
    network. Runs on the GPU if there is one; returns CPU tensors.
    """

    def __init__(self, network: str, weights: str, setting: str) -> None:
        """`setting` is the name of `weights` in errors. Raises StorageError."""
        self.of_clips, self.network = network in OF_CLIPS, network
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            make = _torchscript if network in TORCHSCRIPT else MAKERS[network]
            self.module = make(weights, setting).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        rows = video if self.of_clips else video.transpose(1, 2).flatten(0, 1)
        features = torch.cat(
            [self._forward(part.to(self.device)).float().cpu() for part in rows.split(BATCH)]
        )
        return features if self.of_clips else features.unflatten(0, (len(video), -1))

    def _forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.network == "clip":
            return image_features(self.module, x)
        if side := SIDES.get(self.network):
            x = resize(x, side)
        if self.network == "r3d_18":
            mean, std = (x.new_tensor(v).view(-1, 1, 1, 1) for v in KINETICS)
            x = ((x + 1) / 2 - mean) / std
        if self.network == "i3d":  # arguments of this file; pixels have its range and size already
            return self.module(x, rescale=False, resize=False, return_features=True)
        return self.module(x)


def resize(x: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) or (N, 3, T, H, W) -> (..., side, side), antialiased; the aspect is not kept."""
    images = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return images.unflatten(0, (len(x), -1)).transpose(1, 2) if x.ndim == 5 else images


def image_features(model: Any, images: Tensor) -> Tensor:
    """OpenCLIP image features (N, D) of images (N, 3, H, W) in [-1, 1]."""
    return model.visual(clip_pixels(images, model.visual.image_size[0]))


def clip_pixels(x: Tensor, side: int) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], preprocessed as in CLIP's evaluation.

    Resizes the short side to `side` (bicubic), crops the centre and normalises.
    """
    h, w = x.shape[-2:]
    size = [max(side, round(n * side / min(h, w))) for n in (h, w)]
    x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((n - side) // 2 for n in size)
    return openclip.normalise(x[..., top : top + side, left : left + side])


def _tiny(convolution: type[nn.Module], pooled: type[nn.Module]) -> nn.Module:
    """A few untrained filters, for tests."""
    layers = [convolution(3, 32, 3, padding=1), nn.ReLU(), convolution(32, 32, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, pooled(1), nn.Flatten())


def _inception(weights: str, setting: str) -> nn.Module:
    """torchvision's, up to the last pooling (2048 features); it takes pixels in [-1, 1], as we do.

    Published FID values use another copy of these weights and are not comparable.
    """
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, init_weights=False, transform_input=False)
    _load(model, "inception_v3", weights, setting)
    model.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  (declared nn.Linear)
    return model


def _r3d(weights: str, setting: str) -> nn.Module:
    """torchvision's R3D-18 trained on Kinetics-400, up to the last pooling (512 features)."""
    from torchvision.models.video import r3d_18

    model = r3d_18(weights=None)
    _load(model, "r3d_18", weights, setting)
    model.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  (declared nn.Linear)
    return model


def clip(name: str, weights: str, setting: str) -> "CLIP":
    """A frozen OpenCLIP model by open_clip's name, or "tiny"; `weights` as in `openclip.load`."""
    import open_clip
    from open_clip.model import CLIP

    cfg: dict[str, Any] | None = CLIP_TINY if name == "tiny" else open_clip.get_model_config(name)
    assert cfg  # the Config checks the name
    model = CLIP(**cfg)
    openclip.load(model, weights, "", setting)
    return model.requires_grad_(False).eval()


MAKERS: dict[str, Callable[[str, str], nn.Module]] = {
    "random2d": lambda weights, setting: _tiny(nn.Conv2d, nn.AdaptiveAvgPool2d),
    "random3d": lambda weights, setting: _tiny(nn.Conv3d, nn.AdaptiveAvgPool3d),
    "inception_v3": _inception,
    "r3d_18": _r3d,
    "clip": lambda weights, setting: clip("ViT-B-32", weights, setting),
}


def _load(model: nn.Module, network: str, weights: str, setting: str) -> None:
    if weights == openclip.RANDOM:
        return
    name, size = FILES[network]
    try:
        if weights == "hub":
            state = from_url(URL + name, name, True)
        else:
            state = read_file(Path(weights).expanduser(), setting)
        model.load_state_dict(state)
        check_values(f"{setting}={weights}", state)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise StorageError(
            f"{setting}={weights}: {name} ({size}, {URL}{name}) cannot be loaded "
            f"({type(e).__name__}: {_brief(e)}); download it where there is a network and set "
            f"{setting}=FILE"
        ) from e


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _torchscript(weights: str, setting: str) -> nn.Module:
    """A TorchScript file; it contains operations only, no Python code."""
    try:
        return torch.jit.load(Path(weights).expanduser(), map_location="cpu")
    except (OSError, RuntimeError, ValueError) as e:
        raise StorageError(
            f"{setting}={weights}: cannot be read as TorchScript ({type(e).__name__}: "
            f"{_brief(e)}); want a file such as i3d_torchscript.pt (51 MB), or another network"
        ) from e
