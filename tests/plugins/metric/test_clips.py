"""metric=clip_score and metric=temporal, with known answers."""

import pytest
import torch
import torch.nn.functional as F

from plugins._blocks.feature_networks import clip_pixels
from plugins._blocks.openclip import MEAN, STD, tokenizer
from plugins.metric.clip_score import ClipScore
from plugins.metric.temporal import Temporal, magnitude
from sandbox.contracts import Clip, StorageError

CAPTIONS = ["a red 3 moving left", "a blue 7 moving up"]


def texture() -> torch.Tensor:
    """(3, 80, 80), smooth noise in [-1, 1]."""
    noise = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(noise, (80, 80), mode="bicubic").clamp(-1, 1)[0]


def moving(pixels: int) -> torch.Tensor:
    """(3, 4, 64, 64): a texture that moves to the left."""
    return torch.stack([texture()[:, 8:72, 4 + i * pixels : 68 + i * pixels] for i in range(4)], 1)


def test_the_flow_of_a_texture_equals_its_motion():
    assert magnitude(moving(2)) == pytest.approx(2, rel=0.1)  # less at the border
    assert magnitude(moving(0)) < 0.01


def test_a_static_clip_is_consistent_and_a_flickering_one_less_so():
    metric = Temporal(Temporal.Config())
    static = texture()[None, :, None].expand(1, -1, 4, -1, -1)
    flickering = static * torch.tensor([1.0, -1, 1, -1]).view(1, 1, 4, 1, 1)
    found = metric.score(static, [""])
    assert found["consistency"] == pytest.approx(1) and found["flow"] < 0.01
    assert metric.score(flickering, [""])["consistency"] < 0.999
    assert set(metric.score(static, [""])) == set(metric.meaning())


def test_images_have_no_consistency():
    assert list(Temporal.Config().accepts(Clip(3, 1, 16, 16))) == ["frames=1: want >= 2"]


def test_the_clip_score_equals_open_clips_cosine():
    metric = ClipScore(ClipScore.Config())
    metric.model.cpu()
    metric.device = torch.device("cpu")
    video = torch.stack([moving(1), moving(2)])[..., :32, :32]
    found = metric.each(video, CAPTIONS)["clip_score"]
    with torch.no_grad():
        texts = metric.model.encode_text(tokenizer()(CAPTIONS), normalize=True)
        pixels = ((video + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1, 1
        )
        images = [metric.model.encode_image(pixels[:, :, i], normalize=True) for i in range(4)]
    want = torch.stack([(s * texts).sum(1) for s in images], 1).mean(1).mul(100).clamp_min(0)
    assert torch.allclose(found, want, atol=1e-3)


def test_clip_gets_the_centre_of_a_wide_image():
    wide = torch.zeros(1, 3, 32, 64)
    wide[..., :16] = 1
    assert clip_pixels(wide, 32).shape == (1, 3, 32, 32)
    assert torch.equal(clip_pixels(wide, 32), clip_pixels(torch.zeros(1, 3, 32, 32), 32))


def test_missing_weights_are_an_error():
    with pytest.raises(StorageError, match=r"metric\.weights=/nowhere\.pt: no such file"):
        ClipScore(ClipScore.Config(model="ViT-B-32", weights="/nowhere.pt"))
    assert "no trained weights" in next(ClipScore.Config(weights="x/y").problems())
