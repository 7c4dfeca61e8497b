"""OpenCLIP towers against recorded outputs of the original and the current open_clip."""

import json
from dataclasses import replace
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plugins._blocks import openclip
from plugins._blocks.openclip import ImageEncoder, ImageModel, TextEncoder, TextModel, Vision
from plugins.conditioning.openclip import OpenCLIP
from sandbox.contracts import Batch, Clip, StorageError
from sandbox.data.randomness import Recorded
from tests.golden_weights import filled
from tests.helpers import preset

GOLDEN = Path(__file__).parents[2] / "golden/dynamicrafter"
FACTS = json.loads((GOLDEN / "openclip.json").read_text())
TENSORS = load_file(GOLDEN / "openclip.safetensors")
GRID = Clip(4, 3, 4, 4)


def near(got: Tensor, want: Tensor) -> None:
    """1e-5 of the largest value: reruns of the original differ by about 2e-6."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def text_encoder(skip: int) -> TextEncoder:
    model = TextModel(embed_dim=FACTS["embed_dim"], **FACTS["text_cfg"])
    encoder = TextEncoder(model, skip)
    encoder.load_state_dict(filled("dynamicrafter", FACTS["weights"]["text"]))
    return encoder.eval()


def image_encoder() -> ImageEncoder:
    visual = Vision(embed_dim=FACTS["embed_dim"], **FACTS["vision_cfg"])
    text = FACTS["text_cfg"]
    model = ImageModel(
        visual, text["width"], FACTS["embed_dim"], text["vocab_size"], text["context_length"]
    )
    encoder = ImageEncoder(model)
    encoder.load_state_dict(filled("dynamicrafter", FACTS["weights"]["image"]))
    return encoder.eval()


def images(count: int, height: int, width: int) -> Tensor:
    """The images of the recording, see `image_formula`."""
    b, c, i, j = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (count, 3, height, width)), indexing="ij"
    )
    x = (0.9 * b + 1.1 * c + 0.13 * i + 0.0002 * i * j).sin() * (0.3 * c - 0.11 * j).cos()
    return x.float()


@torch.no_grad()
@pytest.mark.parametrize(("layer", "skip"), [("penultimate", 1), ("last", 0)])
def test_text_features_equal_the_original(layer, skip):
    near(text_encoder(skip)(TENSORS["in/tokens"]), TENSORS[f"out/text_{layer}"])


@torch.no_grad()
def test_image_tokens_equal_the_original():
    size = FACTS["image_tokens_input"]
    got = image_encoder()(images(size["batch"], size["h"], size["w"]))
    near(got, TENSORS["out/image_tokens"])


@pytest.mark.parametrize("size", [(320, 512), (256, 256), (200, 220)])
def test_images_are_preprocessed_as_in_the_original(size):
    got = openclip.normalise(openclip.resize(images(1, *size), 224))
    name = f"out/preprocess_{size[0]}x{size[1]}_every8"
    near(got[..., ::8, ::8], TENSORS[name])
    assert got.mean().item() == pytest.approx(FACTS["preprocess"][name]["mean"], abs=1e-4)
    assert got.std().item() == pytest.approx(FACTS["preprocess"][name]["std"], abs=1e-4)


@torch.no_grad()
def test_the_text_tower_equals_the_current_open_clip():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=14, image_size=28)
    text = CLIPTextCfg(context_length=77, vocab_size=64, width=16, heads=2, layers=3)
    theirs = CLIP(12, vision, text).eval()
    ours = TextModel(16, 3, 2, 12, vocab_size=64)
    state = theirs.state_dict()
    ours.load_state_dict({k: v for k, v in state.items() if not k.startswith("visual.")})
    ids = TENSORS["in/tokens"]
    features = TextEncoder(ours, 0)(ids)
    picked = features[torch.arange(len(ids)), ids.argmax(-1)] @ ours.text_projection
    near(picked, theirs.encode_text(ids))


def made(**settings) -> OpenCLIP:
    torch.manual_seed(0)
    return OpenCLIP(OpenCLIP.Config(**settings))


def context(module: OpenCLIP, captions: list[str], drop: list[bool], **fields) -> Tensor:
    batch = Batch(captions=captions, ids=captions, **fields)
    conditions = module(batch, GRID, {"text": torch.tensor(drop)}, Recorded({}), None, None)
    return conditions.context


def test_a_dropped_caption_becomes_an_empty_one():
    module = made()
    got = context(module, ["a red 3", "a red 3"], [False, True])
    near(got, context(module, ["a red 3", ""], [False, False]))


def test_a_dropped_caption_becomes_the_negative_prompt():
    module = made()
    got = context(module, ["a red 3"], [True], negative=["blurry"])
    near(got, context(module, ["blurry"], [False]))


def test_the_tower_is_frozen():
    module = made()
    assert not any(p.requires_grad for p in module.parameters())
    assert module.cond_stage_model._frozen


def test_released_weights_load_under_both_names(tmp_path):
    """A CLIP file has the model's names, a published system has them under a prefix."""
    one = made()
    state = one.cond_stage_model.model.state_dict()
    save_file(state | {"visual.proj": torch.zeros(2, 2)}, tmp_path / "clip.safetensors")
    torch.save(
        {"state_dict": {f"cond_stage_model.model.{k}": v for k, v in state.items()}},
        tmp_path / "system.ckpt",
    )
    torch.manual_seed(1)
    for name in ("clip.safetensors", "system.ckpt"):
        other = OpenCLIP(OpenCLIP.Config(weights=str(tmp_path / name)))
        near(context(other, ["a 3"], [False]), context(one, ["a 3"], [False]))


def test_weights_of_another_size_are_an_error_with_names(tmp_path):
    save_file(made(width=16).cond_stage_model.model.state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(StorageError, match=r"token_embedding\.weight is 49408x16 and"):
        made(weights=str(tmp_path / "clip.safetensors"))


def test_a_missing_file_is_an_error_with_the_fix():
    with pytest.raises(StorageError, match=r"weights=nowhere/clip\.bin: no such file.*random"):
        made(weights="nowhere/clip.bin")


def test_without_internet_the_error_names_file_size_and_fix(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StorageError, match=r"open_clip_model\.safetensors.*3\.9 GB.*FILE"):
        made(weights="laion/nothing-here")


class SilentServer(BaseRequestHandler):
    """Accepts connections without answering, like a network without internet access."""

    requests = 0

    def handle(self) -> None:
        type(self).requests += 1


def test_a_silent_hub_is_requested_once(monkeypatch, tmp_path):
    """The hub's library would retry a dozen times, for a minute and a half."""
    with TCPServer(("127.0.0.1", 0), SilentServer) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        place = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(StorageError, match=r"open_clip_model\.safetensors.*3\.9 GB.*FILE"):
            # the published size, which takes long to build
            OpenCLIP(replace(preset("conditioning", "openclip_vit_h14"), weights="laion/nothing"))
        hub.shutdown()
    assert SilentServer.requests == 1


def test_the_published_size_builds_on_the_meta_device():
    with torch.device("meta"):
        module = OpenCLIP(preset("conditioning", "openclip_vit_h14"))
    assert sum(p.numel() for p in module.parameters()) == 354_032_641


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"layer": "first"}, "layer"), ({"heads": 3}, "heads"), ({"drop_text": 1.5}, "drop_text")],
)
def test_bad_settings_are_reported(settings, field):
    (problem,) = OpenCLIP.Config(**settings).problems()
    assert problem.startswith(f"{field}=")
