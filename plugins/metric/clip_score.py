"""CLIP score: how well frames match their captions (Hessel et al. 2021, 2104.08718)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.feature_networks import BATCH, clip, image_features
from plugins._blocks.metrics import ClipMetric
from plugins._blocks.openclip import tokenizer
from plugins._configs.features import score_note
from plugins._configs.weights import local_weights
from sandbox.contracts import MetricConfig, one_of
from sandbox.registry import register

# The plain CLIP models of open_clip: its own towers and tokenizer, 77 tokens.
MODELS = ("tiny", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")


@register("metric", "clip_score")
class ClipScore(ClipMetric):
    """100 x cosine similarity of frames and captions in OpenCLIP, mean over frames."""

    @dataclass
    class Config(MetricConfig):
        """model: open_clip's name. weights: a file, a name on the hub such as
        laion/CLIP-ViT-B-32-laion2B-s34B-b79K, or "random" (for tests).
        """

        model: str = "tiny"
        weights: str = "random"
        imports = ("open_clip",)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("model", self.model, MODELS)
            if self.model == "tiny" and self.weights != "random":
                yield f"weights={self.weights!r}: model=tiny has no trained weights; want random"

        def files(self) -> dict[str, str | None]:
            return local_weights(self.weights, "random")

        def needs(self) -> frozenset[str]:
            return frozenset({"captions"})

        def fit_clips(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.model = clip(cfg.model, cfg.weights, "metric.weights").to(self.device)

    @torch.no_grad()
    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        texts = self.model.encode_text(tokenizer()(captions).to(self.device), normalize=True)
        frames = video.float().nan_to_num().clamp(-1, 1).transpose(1, 2).flatten(0, 1)
        images = torch.cat([
            F.normalize(image_features(self.model, part.to(self.device)), dim=-1)
            for part in frames.split(BATCH)
        ])  # fmt: skip
        cosines = torch.einsum("ntd,nd->nt", images.unflatten(0, (len(video), -1)), texts)
        return {"clip_score": 100 * cosines.mean(1).cpu().clamp_min(0)}

    def meaning(self) -> dict[str, str]:
        network = f"{self.cfg.model}{score_note(self.cfg.weights)}"
        return {"clip_score": f"similarity of frames and caption in {network}; real about 30"}
