"""features=dinov2 against transformers' network with the same random weights."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from sandbox.config import registry
from sandbox.contracts import StorageError
from tests.helpers import composed

RENAMED = (  # released name -> that of transformers
    (r"^(cls_token|mask_token)", r"embeddings.\1"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.o_proj"),
    (r"^blocks\.(\d+)\.ls(\d)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
)
SIDE = 56  # 4 x 4 patches


def settings(path, **words):
    given = {"size": "small", "side": SIDE, "weights": path} | words
    return composed(
        "method=repa", "features=dinov2", *(f"features.{k}={v}" for k, v in given.items())
    ).features


@pytest.fixture(scope="module")
def theirs():
    """transformers' network with random weights, and the same weights under released names."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIDE, patch_size=14)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.05)
    weights, state = model.state_dict(), {"mask_token": torch.zeros(1, 384)}
    with torch.device("meta"):
        names = registry.create(settings("planned")).model.state_dict()
    for released in names:
        name = released
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        stem, _, kind = name.partition("attn.qkv")
        parts = [f"{stem}attention.{p}_proj{kind}" for p in "qkv"]
        state[released] = torch.cat([weights[n] for n in (parts if kind else [name])])
    return model, state


@torch.no_grad()
def test_patch_features_equal_those_of_transformers(theirs, tmp_path):
    model, state = theirs
    torch.save(state, path := tmp_path / "dinov2_vits14_pretrain.pth")
    encoder = registry.create(settings(path))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    x = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
    x = ((x + 1) / 2 - encoder.mean) / encoder.std
    want = model(x).last_hidden_state[:, 1:].mT.unflatten(2, (4, 4))
    got = encoder(images)
    assert got.shape == (2, 384, 4, 4)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_the_released_table_is_resized_and_other_weights_are_refused(theirs, tmp_path):
    table = torch.randn(1, 1 + 37 * 37, 384)
    torch.save(theirs[1] | {"pos_embed": table}, path := tmp_path / "released.pth")
    own = registry.create(settings(path)).model.pos_embed
    assert own.shape == (1, 17, 384) and torch.equal(own[:, 0], table[:, 0])
    with pytest.raises(StorageError, match=r"not the weights of DINOv2 of features\.size=base"):
        registry.create(settings(path, size="base"))
