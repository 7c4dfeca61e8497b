"""T5 text against recorded outputs, released folders, and image-to-video conditions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from plugins._blocks.t5 import T5Encoder
from plugins.conditioning.t5 import T5
from sandbox.contracts import Batch, Clip, Conditions, Slots, StorageError, Tokens
from sandbox.data.randomness import Keyed, Recorded
from sandbox.model.trainable import Trainable
from tests.helpers import preset, recipe

GOLDEN = Path(__file__).parents[2] / "golden/cogvideox"
CLIP, GRID = Clip(3, 9, 16, 16), Clip(4, 3, 2, 2)
KNOWN = set(T5.Config.__dataclass_fields__)


def recorded() -> tuple[T5.Config, dict[str, Tensor], dict[str, Tensor], dict]:
    """(its Config, weights, the fixture, tolerances) of the tiny published encoder."""
    path = GOLDEN / "t5_encoder.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    fixture = load_file(path)
    weights = {k[11:]: v for k, v in fixture.items() if k.startswith("state_dict/")}
    sizes = {k: v for k, v in meta["config"].items() if k in KNOWN}
    return T5.Config(**sizes, length=226), weights, fixture, meta["tolerance"]


def small(**settings) -> T5:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return T5(replace(T5.Config(d_model=16, vocab_size=64), **settings))


def conditions(model: T5, batch: Batch, drop=None, draws=None, encode=None, z0=None) -> Conditions:
    drop = {} if drop is None else {"text": torch.tensor(drop)}
    return model(batch, GRID, drop, draws or Keyed(0, 0, torch.arange(2), 2), encode, z0)


def means(pixels: Tensor, name: str) -> Tensor:
    """A first stage for tests: 4 channels, each the mean of a cell of 8 x 8 pixels."""
    assert name == "image_posterior"
    cells = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))
    return torch.cat((cells, cells.sum(1, keepdim=True)), 1)


# the encoder


@torch.no_grad()
def test_hidden_states_equal_the_recorded_ones() -> None:
    cfg, weights, fixture, tolerance = recorded()
    encoder = T5Encoder(cfg)
    encoder.load_state_dict(weights)
    torch.testing.assert_close(encoder(fixture["input_ids"]), fixture["output"], **tolerance)


def test_preset_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        encoder = T5Encoder(preset("conditioning", "t5_cogvideox"))
    manifest = json.loads((GOLDEN / "t5_v1_1_xxl_encoder.json").read_text())
    assert {k: list(v.shape) for k, v in encoder.state_dict().items()} == {
        k: shape for k, (shape, _) in manifest.items()
    }
    assert sum(p.numel() for p in encoder.parameters()) == 4_762_310_656


@torch.no_grad()
def test_masked_tokens_do_not_affect_others() -> None:
    cfg, _, _, _ = recorded()
    encoder = T5Encoder(cfg)
    ids = torch.tensor([[5, 6, 1, 0, 0]])
    other = torch.tensor([[5, 6, 1, 9, 9]])
    mask = ids != 0
    a, b = encoder(ids, mask)[:, :3], encoder(other, mask)[:, :3]
    torch.testing.assert_close(a, b)
    assert not torch.allclose(encoder(ids)[:, :3], encoder(other)[:, :3])


def test_float16_keeps_the_layers_that_would_overflow() -> None:
    encoder = T5Encoder(T5.Config()).to_dtype(torch.float16)
    kinds = {name: p.dtype for name, p in encoder.named_parameters()}
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    assert wide == {name for name in kinds if name.endswith("wo.weight")}
    assert encoder(torch.tensor([[5, 1]])).isfinite().all()


# released folders


def released(folder: Path, parts: int = 1, sub: str = "text_encoder") -> T5.Config:
    """Writes the recorded encoder in the released format, in `parts` files; returns its Config."""
    cfg, weights, _, _ = recorded()
    place = folder / sub
    place.mkdir(parents=True)
    del weights["encoder.embed_tokens.weight"]  # files store a shared tensor once
    names = sorted(weights)
    files = {f"model-{i + 1:05}-of-{parts:05}.safetensors": names[i::parts] for i in range(parts)}
    for file, held in files.items():
        save_file({k: weights[k].contiguous() for k in held}, place / file)
    index = {"weight_map": {k: file for file, held in files.items() for k in held}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return cfg


@pytest.mark.parametrize("parts", [1, 3])
@torch.no_grad()
def test_released_weights_are_read_from_all_their_files(tmp_path, parts) -> None:
    cfg = released(tmp_path, parts)
    _, _, fixture, tolerance = recorded()
    with torch.device("meta"):
        encoder = T5Encoder(cfg)
    encoder.load(tmp_path / "text_encoder")
    torch.testing.assert_close(encoder(fixture["input_ids"]), fixture["output"], **tolerance)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_weights_are_loaded_in_the_requested_dtype(tmp_path) -> None:
    cfg = released(tmp_path)
    with torch.device("meta"):
        encoder = T5Encoder(cfg).to_dtype(torch.bfloat16)
    encoder.load(tmp_path / "text_encoder")
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}


def test_weights_of_other_sizes_are_an_error_with_names(tmp_path) -> None:
    cfg = released(tmp_path)
    with pytest.raises(StorageError, match=r"names or shapes differ[^$]*block\.2"):
        T5Encoder(replace(cfg, num_layers=3)).load(tmp_path / "text_encoder")
    with pytest.raises(StorageError, match=r"no model\*\.safetensors"):
        T5Encoder(cfg).load(tmp_path)


class Untrained(Trainable):
    """A system that is not trained."""

    def step(self, batch, draws):
        raise AssertionError("not trained")


@torch.no_grad()
def test_a_released_encoder_is_frozen_and_encodes_captions(tmp_path) -> None:
    pytest.importorskip("transformers")
    cfg = released(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    model = T5(replace(cfg, weights=str(tmp_path), length=6, masked=True))
    cond = conditions(model, Batch(captions=["red left", ""], ids=["0", "1"]))
    assert cond.context.shape == (2, 6, 24)
    assert cond.context_mask.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    assert not any(p.requires_grad for p in model.parameters())
    system = Untrained.__new__(Untrained)
    torch.nn.Module.__init__(system)
    system.conditioner = model
    system.networks = torch.nn.ModuleDict()
    assert system.trainable_state() == {}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words with T5's special tokens: pad 0, end 1, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "left": 4}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **names).save_pretrained(folder)


# text


def test_a_dropped_caption_equals_an_empty_or_negative_one() -> None:
    model = small()
    batch = Batch(captions=["a red 3", "a red 3"], ids=["0", "1"])
    dropped = conditions(model, batch, [True, False]).context
    empty = conditions(model, replace(batch, captions=["", "a red 3"])).context
    torch.testing.assert_close(dropped, empty)
    negative = conditions(model, replace(batch, negative=["blue"] * 2), [True, False]).context
    torch.testing.assert_close(
        negative[0], conditions(model, replace(batch, captions=["blue"] * 2)).context[0]
    )


def test_cached_embeddings_replace_the_encoder() -> None:
    text = torch.randn(2, 8, 16)
    model = T5(T5.Config(d_model=16, weights="cached", drop_text=0.0))
    assert not list(model.parameters())
    assert torch.equal(conditions(model, Batch(text=text, ids=["0", "1"])).context, text)


def test_a_dropped_cached_embedding_becomes_that_of_the_empty_caption() -> None:
    model, text = small(), torch.randn(2, 8, 16)
    context = conditions(model, Batch(text=text, ids=["0", "1"]), [True, False]).context
    empty = conditions(model, Batch(captions=[""], ids=["0"])).context
    torch.testing.assert_close(context[:1], empty)
    assert torch.equal(context[1], text[1])


def test_captions_without_an_encoder_are_an_error() -> None:
    model = T5(T5.Config(weights="cached", drop_text=0.0))
    with pytest.raises(ValueError, match="weights='cached' has no text encoder"):
        conditions(model, Batch(captions=["a"], ids=["0"]))


def test_masked_adds_the_token_mask() -> None:
    batch = Batch(captions=["a red 3", ""], ids=["0", "1"])
    assert conditions(small(), batch).context_mask is None
    mask = conditions(small(masked=True), batch).context_mask
    assert mask.sum(1).tolist() == [4, 1]  # words and the end token


def test_presets_offer_what_the_systems_take() -> None:
    grid = Clip(16, 22, 96, 170)
    chosen = {name: preset("conditioning", name) for name in ("t5_cogvideox", "t5_easyanimate")}
    chosen["1_5_i2v"] = recipe("cogvideox_1_5_5b_i2v_lora").conditioning
    offered = {name: cfg.offers(CLIP, grid) for name, cfg in chosen.items()}
    text = Tokens(4096, 226)
    assert offered["t5_cogvideox"] == Slots(context=text)
    assert offered["1_5_i2v"] == Slots(text, concat=16, scalars=frozenset({"ofs"}))
    assert offered["t5_easyanimate"] == Slots(context=Tokens(4096, 120, masked=True))


# image


def clips() -> Batch:
    video = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(video=video, captions=["a", "b"], ids=["0", "1"], position=torch.arange(2))


Z0 = torch.zeros(2, 4, 3, 2, 2)


def test_image_latents_are_followed_by_zeros() -> None:
    batch, model = clips(), small(image="first_frame", image_latent_scale=2.0)
    concat = conditions(model, batch, encode=means).concat
    assert concat.shape == (2, 4, 3, 2, 2)
    torch.testing.assert_close(
        concat[:, :, :1], 2 * means(batch.video[:, :, :1], "image_posterior")
    )
    assert not concat[:, :, 1:].any()


def test_a_given_image_takes_precedence_over_the_video() -> None:
    batch, model = clips(), small(image="first_frame")
    image = batch.video[:, :, 5:6]
    concat = conditions(model, replace(batch, image=image), encode=means).concat
    torch.testing.assert_close(concat[:, :, :1], means(image, "image_posterior"))


def test_training_adds_the_published_noise_to_the_pixels() -> None:
    batch, model = clips(), small(image="first_frame")
    noise = torch.randn(2, 3, 1, 16, 16)
    draws = Recorded({"image_noise_level": torch.ones(1, 1, 1, 1, 1), "image_noise": noise})
    concat = conditions(model, batch, draws=draws, encode=means, z0=Z0).concat
    noisy = batch.video[:, :, :1] + torch.tensor(-3.0 + 0.5).exp() * noise
    torch.testing.assert_close(concat[:, :, :1], means(noisy, "image_posterior"))


@pytest.mark.parametrize("shared", [True, False])
def test_the_noise_level_is_per_batch_or_per_clip(shared) -> None:
    model = small(image="first_frame", image_noise_shared=shared, image_noise_std=2.0)
    draws, pixels = Keyed(0, 0, torch.arange(2), 2), torch.zeros(2, 3, 1, 16, 16)
    spread = model.noise(pixels, draws) / draws.normal("image_noise", pixels)
    assert torch.allclose(spread[0], spread[1]) == shared


def test_sampling_has_no_image_noise_or_dropout() -> None:
    model = small(image="first_frame", drop_image=1.0)
    concat = conditions(model, clips(), encode=means).concat
    assert concat[:, :, :1].any()


def test_a_dropped_image_is_zeros() -> None:
    model = small(image="first_frame", drop_image=0.5)
    draws = Recorded(
        {
            "drop_image": torch.tensor([0.4, 0.6]),
            "image_noise_level": torch.zeros(1, 1, 1, 1, 1),
            "image_noise": torch.zeros(1, 1, 1, 1, 1),
        }
    )
    concat = conditions(model, clips(), draws=draws, encode=means, z0=Z0).concat
    assert not concat[0].any()
    assert concat[1].any()


def test_a_batch_without_an_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs an image, and the batch has none"):
        conditions(small(image="first_frame"), Batch(captions=["a"], ids=["0"]))


def test_every_clip_has_ofs() -> None:
    assert conditions(small(ofs=2.0), clips()).scalars["ofs"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"length": 0}, "length=0: want >= 1"),
        ({"vocab_size": 2}, "vocab_size=2: want >= 3"),
        ({"dtype": "half"}, "dtype='half': want one of ['fp32', 'bf16', 'fp16']"),
        ({"dtype": "bf16"}, "dtype='bf16': want 'fp32' for a trained encoder"),
        ({"weights": "cached"}, "drop_text=0.1: weights='cached' has no encoder"),
        ({"image": "last_frame"}, "image='last_frame': want one of ['none', 'first_frame']"),
        ({"image_latent_scale": 0.0}, "image_latent_scale=0.0: want > 0"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets=2: want >= 4"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance=8: want more"),
        ({"drop_image": float("nan")}, "drop_image=nan: want 0 to 1"),
    ],
)
def test_bad_settings_are_reported(changes, problem) -> None:
    problems = list(replace(T5.Config(), **changes).problems())
    assert any(p.startswith(problem) for p in problems), problems
