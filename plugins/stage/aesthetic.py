"""Aesthetic score: LAION's predictor, a linear head on CLIP features.

EasyAnimate keeps clips with a mean of at least 4.0 over four frames (ViT-L/14, predictor V2). The
V2 head is a chain of linear layers without activations; V1 is one layer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from plugins._configs.stages import SampledFramesConfig
from sandbox.contracts import BadItem, Row, VideoClip, in_range
from sandbox.registry import register


@register("stage", "aesthetic")
class Aesthetic:
    """Drops clips with a low aesthetic score (CLIP features and a linear head)."""

    @dataclass
    class Config(SampledFramesConfig):
        """model, weights: open_clip's model name, and a pretrained tag or a file.

        head: file with the head's state dict; frames: number of evenly spaced frames to score;
        min: lowest mean score that is kept, on a scale of about 1 to 10.
        """

        model: str = "ViT-L-14"
        weights: str = "openai"
        head: str | None = None
        frames: int = 4
        min: float = 4.0

        limits: ClassVar[tuple[str, ...]] = ("min",)
        distributions: ClassVar[tuple[str, ...]] = ("open_clip_torch", "torch")

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("frames", self.frames, 1)
            yield from in_range("min", self.min, -100, 100)

        def files(self) -> dict[str, str | None]:
            return {"head": self.head}

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.networks: Any = None

    def score(self, clip: VideoClip) -> dict[str, Any]:
        """{"score": mean over frames}."""
        import torch
        from PIL import Image

        clip_model, preprocess, head = self._networks()
        images = clip.at(self.cfg.times(clip.seconds))
        with torch.inference_mode():
            pixels = torch.stack([preprocess(Image.fromarray(x)) for x in images])
            features = clip_model.encode_image(pixels)
            score = head(features / features.norm(dim=-1, keepdim=True)).mean().item()
        if not np.isfinite(score):
            raise BadItem("has an aesthetic score that is not finite")
        return {"score": round(score, 4)}

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        scores = [row["scores"]["aesthetic"]["score"] for row in rows]
        limit = self.cfg.min
        return [{"drop": f"score {s:.2f} < min={limit:g}"} if s < limit else {} for s in scores]

    def _networks(self) -> Any:
        if self.networks is None:
            import open_clip

            from plugins._blocks.state_dicts import check_values, read_file

            # OpenAI's weights were trained with QuickGELU, open_clip's default is GELU
            quick = self.cfg.weights == "openai" or "quickgelu" in self.cfg.weights
            name = f"{self.cfg.model}-quickgelu" if quick else self.cfg.model
            model, _, preprocess = open_clip.create_model_and_transforms(
                name.replace("-quickgelu-quickgelu", "-quickgelu"), pretrained=self.cfg.weights
            )
            state = read_file(Path(str(self.cfg.head)), "head")
            check_values(f"head={self.cfg.head}", state)
            self.networks = model.eval(), preprocess, linear_layers(state)
        return self.networks


def linear_layers(state: dict[str, Any]) -> Any:
    """A chain of linear layers, ordered by the numbers in their names."""
    from torch import nn

    names = sorted(
        (name.removesuffix("weight") for name in state if name.endswith("weight")),
        key=lambda name: [int(n) for n in re.findall(r"\d+", name)],
    )
    layers = nn.Sequential()
    for name in names:
        weight = state[f"{name}weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"{name}bias"]})
        layers.append(layer)
    return layers.eval()
