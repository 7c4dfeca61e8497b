"""Frozen networks that turn pictures or clips into features, which metrics compare.

Weights come from a file, or from torchvision's or the hub's own place; where they cannot be had the
error names the file, its size and the cure. Nothing is put in their place.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks import openclip
from plugins._blocks.fetching import from_url
from sandbox.contracts import StorageError

OF_CLIPS = frozenset({"random3d", "r3d_18", "i3d", "script3d"})  # others look at pictures
IN_FILES = frozenset({"script2d", "i3d", "script3d"})
AT_ONCE = 32  # clips, or pictures, in one pass
URL = "https://download.pytorch.org/models/"
FILES = {  # of torchvision; the eight digits are the start of the file's SHA-256
    "inception_v3": ("inception_v3_google-0cc3c7bd.pth", "104 MB"),
    "r3d_18": ("r3d_18-b3b3357e.pth", "127 MB"),
}
SIDES = {"inception_v3": 299, "r3d_18": 112, "i3d": 224}
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # mean, std of r3d_18's data
# OpenCLIP models that are small enough to be made here; others go by open_clip's own names.
CLIP_TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2},
}


class Features:
    """Clips (N, 3, T, H, W) in [-1, 1] -> features: (N, D) of a network of clips, (N, T, D) of one
    of pictures. On the GPU where there is one; the result is on the CPU.
    """

    def __init__(self, network: str, weights: str, setting: str) -> None:
        """`setting`: what errors call `weights`. Raises StorageError."""
        self.of_clips, self.network = network in OF_CLIPS, network
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.module = _built(network, weights, setting).to(self.device)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        rows = video if self.of_clips else video.transpose(1, 2).flatten(0, 1)
        found = torch.cat(
            [self._of(part.to(self.device)).float().cpu() for part in rows.split(AT_ONCE)]
        )
        return found if self.of_clips else found.unflatten(0, (len(video), -1))

    def _of(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.network == "clip":
            return self.module.visual(clip_pixels(x, self.module.visual.image_size[0]))  # type: ignore[union-attr]
        if side := SIDES.get(self.network):
            x = resized(x, side)
        if self.network == "r3d_18":
            mean, std = (x.new_tensor(v).view(-1, 1, 1, 1) for v in KINETICS)
            x = ((x + 1) / 2 - mean) / std
        if self.network == "i3d":  # of this file alone: pixels are in its range and size already
            return self.module(x, rescale=False, resize=False, return_features=True)
        return self.module(x)


def resized(x: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) or (N, 3, T, H, W) -> (..., side, side) whatever the aspect, without aliases."""
    pictures = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
    pictures = F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
    return pictures.unflatten(0, (len(x), -1)).transpose(1, 2) if x.ndim == 5 else pictures


def clip_pixels(x: Tensor, side: int) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as CLIP was evaluated: the shorter side to `side`, bicubic,
    the middle cut out, normalised.
    """
    h, w = x.shape[-2:]
    size = [max(side, round(n * side / min(h, w))) for n in (h, w)]
    x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((n - side) // 2 for n in size)
    return openclip.normalised(x[..., top : top + side, left : left + side])


# --- networks -------------------------------------------------------------------------------------


def _built(network: str, weights: str, setting: str) -> nn.Module:
    make = _scripted if network in IN_FILES else MAKERS[network]
    return make(weights, setting).eval()


def _tiny(convolution: type[nn.Module], pooled: type[nn.Module]) -> nn.Module:
    """A few random filters: features of a network that has learned nothing, for tests."""
    layers = [convolution(3, 32, 3, padding=1), nn.ReLU(), convolution(32, 32, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, pooled(1), nn.Flatten())


def _inception(weights: str, setting: str) -> nn.Module:
    """torchvision's, up to its last pooling (2048). Its pixels are in [-1, 1], like ours.

    FID as published is of another copy of these weights: numbers compare with themselves only.
    """
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, init_weights=False, transform_input=False)
    _fill(model, "inception_v3", weights, setting)
    model.fc = nn.Identity()
    return model


def _r3d(weights: str, setting: str) -> nn.Module:
    """torchvision's R3D-18 of Kinetics-400, up to its last pooling (512)."""
    from torchvision.models.video import r3d_18

    model = r3d_18(weights=None)
    _fill(model, "r3d_18", weights, setting)
    model.fc = nn.Identity()
    return model


def _clip(weights: str, setting: str) -> nn.Module:
    return clip("ViT-B-32", weights, setting)


def clip(name: str, weights: str, setting: str) -> nn.Module:
    """OpenCLIP of this name in its own configurations, or "tiny"; `weights` as `openclip.load`."""
    import open_clip
    from open_clip.model import CLIP

    cfg: dict[str, Any] | None = CLIP_TINY if name == "tiny" else open_clip.get_model_config(name)
    assert cfg  # the Config knows the names
    model = CLIP(**cfg)
    openclip.load(model, weights, "", setting)
    return model.requires_grad_(False).eval()


MAKERS: dict[str, Callable[[str, str], nn.Module]] = {
    "random2d": lambda weights, setting: _tiny(nn.Conv2d, nn.AdaptiveAvgPool2d),
    "random3d": lambda weights, setting: _tiny(nn.Conv3d, nn.AdaptiveAvgPool3d),
    "inception_v3": _inception,
    "r3d_18": _r3d,
    "clip": _clip,
}


# --- weights --------------------------------------------------------------------------------------


def _fill(model: nn.Module, network: str, weights: str, setting: str) -> None:
    if weights == openclip.RANDOM:
        return
    name, size = FILES[network]
    try:
        state = from_url(URL + name, name, True) if weights == "hub" else _file(weights)
        model.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise StorageError(
            f"{setting}={weights}: {name} ({size}, {URL}{name}) cannot be had "
            f"({type(e).__name__}: {_brief(e)}); download it where there is a network and name "
            f"the file, {setting}=FILE"
        ) from e


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _file(weights: str) -> dict[str, Tensor]:
    return torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True)


def _scripted(weights: str, setting: str) -> nn.Module:
    """A TorchScript file: its operations are run, no Python of it is."""
    try:
        return torch.jit.load(Path(weights).expanduser(), map_location="cpu")
    except (OSError, RuntimeError, ValueError) as e:
        raise StorageError(
            f"{setting}={weights}: cannot be read as TorchScript ({type(e).__name__}: "
            f"{_brief(e)}); want a file such as i3d_torchscript.pt (51 MB), or another network"
        ) from e
