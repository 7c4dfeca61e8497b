"""DINOv2 as a frozen encoder of frames (Oquab et al. 2023, 2304.07193)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks.state_dicts import read_file
from sandbox.contracts import FeaturesConfig, StorageError, in_range, one_of
from sandbox.registry import register

WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
PATCH = 14  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@register("features", "dinov2")
class DINOv2(nn.Module):
    """DINOv2's patch features after the last norm, as REPA uses them; timm's network."""

    @dataclass
    class Config(FeaturesConfig):
        """weights: the released file of this size, such as dinov2_vitb14_pretrain.pth. side: frames
        are resized to side x side pixels, a multiple of 14.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("weights",)

        size: str = "base"
        weights: str | None = None
        side: int = 224

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("size", self.size, WIDTHS)
            yield from in_range("side", self.side, PATCH)
            if self.side % PATCH:
                yield f"side={self.side}: want a multiple of {PATCH}"

        def channels(self) -> int:
            return WIDTHS[self.size]

        def files(self) -> dict[str, str | None]:
            return {"weights": self.weights}

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: Config) -> None:
        """Raises StorageError for weights of another network."""
        super().__init__()
        self.cfg = cfg
        self.model: Any = network(cfg)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        if not self.mean.is_meta:
            self.load(Path(cfg.weights or "").expanduser())

    def load(self, path: Path) -> None:
        """Loads the released names; position tables are interpolated from their 37 x 37."""
        from timm.models.vision_transformer import checkpoint_filter_fn

        try:
            state = checkpoint_filter_fn(read_file(path, "features.weights"), self.model)
            self.model.load_state_dict(state)
        except (RuntimeError, KeyError) as e:
            what = " ".join(str(e).split())[:200]
            raise StorageError(
                f"features.weights={path}: not the weights of DINOv2 of features.size="
                f"{self.cfg.size} without registers: {what}"
            ) from e

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, channels, side / 14, side / 14)."""
        side = self.cfg.side
        x = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        found = self.model.forward_features(((x + 1) / 2 - self.mean) / self.std)
        patches = found[:, self.model.num_prefix_tokens :]
        return patches.mT.unflatten(2, (side // PATCH, side // PATCH))


def network(cfg: DINOv2.Config) -> nn.Module:
    import timm

    name = f"vit_{cfg.size}_patch14_dinov2"
    return timm.create_model(name, pretrained=False, num_classes=0, img_size=cfg.side)
