"""How well clips fit their captions, by OpenCLIP (Hessel et al. 2021, 2104.08718)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.features import AT_ONCE, clip, clip_pixels
from plugins._blocks.openclip import tokenizer
from sandbox.contracts import MetricConfig, is_path, one_of
from sandbox.registry import register

# Those of open_clip that are plain CLIP: towers of open_clip, its tokenizer, 77 tokens.
MODELS = ("tiny", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")


@register("metric", "clip_score")
class ClipScore:
    """100 times the cosine of frames and captions in OpenCLIP, mean over frames."""

    @dataclass
    class Config(MetricConfig):
        """model: open_clip's name. weights: a file, a name on the hub such as
        laion/CLIP-ViT-B-32-laion2B-s34B-b79K, or "random" (for tests: it tells nothing).
        """

        model: str = "tiny"
        weights: str = "random"
        imports = ("open_clip",)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("model", self.model, MODELS)
            if self.model == "tiny" and self.weights != "random":
                yield f"weights={self.weights!r}: nobody trained model=tiny; want random"

        def files(self) -> dict[str, str | None]:
            is_here = self.weights != "random" and is_path(self.weights)
            return {"weights": self.weights} if is_here else {}

        def needs(self) -> frozenset[str]:
            return frozenset({"captions"})

        def learns_from(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.model = clip(cfg.model, cfg.weights, "metric.weights").to(self.device)

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """There is nothing to learn."""

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        return {k: v.mean().item() for k, v in self.per_clip(video, captions).items()}

    @torch.no_grad()
    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        texts = self.model.encode_text(tokenizer()(captions).to(self.device), normalize=True)  # type: ignore[operator]
        side = self.model.visual.image_size[0]  # type: ignore[index, union-attr]
        frames = video.float().nan_to_num().clamp(-1, 1).transpose(1, 2).flatten(0, 1)
        seen = torch.cat([
            F.normalize(self.model.visual(clip_pixels(part.to(self.device), side)), dim=-1)  # type: ignore[operator]
            for part in frames.split(AT_ONCE)
        ])  # fmt: skip
        cosines = torch.einsum("ntd,nd->nt", seen.unflatten(0, (len(video), -1)), texts)
        return {"clip_score": 100 * cosines.mean(1).cpu().clamp_min(0)}

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        return {}

    def proportions(self) -> frozenset[str]:
        return frozenset()

    def meaning(self) -> dict[str, str]:
        known = " (random: tells nothing)" if self.cfg.weights == "random" else ""
        return {
            "clip_score": f"fit of frames and caption in {self.cfg.model}{known}; real about 30"
        }
