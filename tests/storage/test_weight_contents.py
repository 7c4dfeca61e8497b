"""Checkpoints of other programs: EMA weights first, no wrappers, wrong values refused."""

import logging

import pytest
import torch
from torch import Tensor

from sandbox.contracts import StorageError
from sandbox.storage import weight_files
from sandbox.storage.weight_check import check_values, differences, kind_of
from sandbox.storage.weight_contents import match_names, weights_in

LIVE = {"blocks.0.weight": torch.zeros(2, 3), "out.bias": torch.zeros(4)}
EMA = {k: v + 1 for k, v in LIVE.items()}


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def dotless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace(".", ""): v for k, v in state.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


BUFFERS = {"norm.running_mean": torch.zeros(5), "norm.num_batches_tracked": torch.tensor(3)}
COUNTS = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(7)}
WITH_EMA = {
    "model and ema": {"model": LIVE, "ema": EMA, "opt": {"state": {}}},
    "state_dict and ema_state_dict": {"state_dict": LIVE, "ema_state_dict": EMA},
    "PixArt": {"state_dict": LIVE, "state_dict_ema": EMA, "epoch": 1},
    "timm": {"state_dict": LIVE, "state_dict_ema": EMA, "arch": "vit"},
    "torchvision": {"model": LIVE, "model_ema": below("module.", EMA) | {"step": COUNTS["decay"]}},
    "BasicSR": {"params": LIVE, "params_ema": EMA},
    "BasicSR, EMA alone": {"params_ema": EMA},
    "DeepSpeed": {"module": below("module.", LIVE), "ema": EMA},
    "DDP and a plain EMA": {"model": below("module.", LIVE), "ema": EMA},
    "a nested EMA": {"model": LIVE, "ema": {"state_dict": EMA, "decay": 0.99}},
    "an EMA in a wrapper": {"model": LIVE, "ema": {"module": EMA, "updates": 5}},
    "shadow": {"model": LIVE, "ema": {"shadow": EMA}},
    "shadow_params": {"model": LIVE, "ema": {"shadow_params": [*EMA.values()], "decay": 0.9}},
    "shadow_params at the top": {"model": LIVE, "shadow_params": [*EMA.values()]},
    "LitEma": {"state_dict": LIVE, "ema": dotless(EMA) | COUNTS},
    "ema_pytorch": {"model": LIVE, "ema": below("online_model.", LIVE) | below("ema_model.", EMA)},
    "a callback": {"state_dict": LIVE, "callbacks": {"EMA": {"ema_state_dict": EMA}}},
    "swa": {"state_dict": LIVE, "swa_state_dict": EMA},
    "a rate in the name": {"model": LIVE, "ema_0.9999": EMA},
    "two containers": {"model": {"state_dict": LIVE, "ema_state_dict": EMA}},
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_EMA)
def test_ema_weights_are_taken_and_logged(tmp_path, caplog, name):
    path = tmp_path / "model.pt"
    torch.save(WITH_EMA[name], path)
    with caplog.at_level(logging.INFO):
        found = weight_files.read(path)
    assert same(match_names(found, LIVE), EMA)
    assert "EMA (" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("name", ["model and ema", "shadow_params", "LitEma"])
def test_buffers_that_an_ema_lacks_are_those_of_the_live_weights(name):
    checkpoint = dict(WITH_EMA[name])
    key = "state_dict" if "state_dict" in checkpoint else "model"
    checkpoint[key] = LIVE | BUFFERS
    assert same(weights_in(checkpoint)[0], EMA | BUFFERS)


WITHOUT_EMA = {
    "live alone": {"state_dict": LIVE, "ema_decay": 0.99, "ema": None},
    "a flag": {"model": LIVE, "ema": True, "use_ema": False},
    "an empty one": {"model": LIVE, "ema": {}},
    "its settings": {"model": LIVE, "ema": {"decay": 0.999, "every": 10}},
    "params": {"params": LIVE},
    "two containers": {"checkpoint": 3, "model": {"state_dict": LIVE}},
    "no container": LIVE,
}


@pytest.mark.parametrize("name", WITHOUT_EMA)
def test_live_weights_are_taken_where_there_is_no_ema(name):
    found, taken = weights_in(WITHOUT_EMA[name])
    assert same(found, LIVE) and "EMA" not in taken


AMBIGUOUS = {
    "several rates": ({"model": LIVE, "ema_0.99": EMA, "ema_0.9999": EMA}, "several sets of EMA"),
    "several": ({"model": LIVE, "ema": EMA, "swa_state_dict": EMA}, "several sets of EMA weights"),
    "other names": ({"model": LIVE, "ema": {"other.w": torch.ones(1)}}, "lack: other"),
    "a list of another length": (
        {"model": LIVE, "ema": {"shadow_params": [torch.ones(1)]}}, "1 tensors without names",
    ),
    "a list of other shapes": (
        {"model": LIVE, "shadow_params": [torch.ones(1), torch.ones(2)]}, "without names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ema_weights_that_cannot_be_told_are_refused(tmp_path, name):
    content, want = AMBIGUOUS[name]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(StorageError, match=f"model.pt: .*{want}"):
        weight_files.read(tmp_path / "model.pt")


# --- names ----------------------------------------------------------------------------------------

PREFIXED = {
    "module.": "wrappers module. removed",
    "_orig_mod.": "wrappers _orig_mod. removed",
    "_forward_module.": "wrappers _forward_module. removed",
    "_fsdp_wrapped_module.": "_fsdp_wrapped_module.",
    "model.": "prefix model. removed",
    "transformer.": "prefix transformer. removed",
    "net.": "prefix net.",
    "module._orig_mod.": "wrappers _orig_mod., module. removed",
    "_orig_mod.module.": "_orig_mod., module.",
    "model._orig_mod.": "wrappers _orig_mod. removed; prefix model. removed",
    "module.model.": "wrappers module. removed; prefix model. removed",
    "model.diffusion_model.": "prefix model.diffusion_model. removed",
    "model.transformer._orig_mod.": "prefix model.transformer. removed",
    "pipe.transformer.": "prefix pipe.transformer. removed",
    "ema_model.": r"EMA weights (ema_model.) taken",
}


@pytest.mark.parametrize("prefix", PREFIXED)
def test_known_prefixes_are_removed_and_logged(prefix):
    said: list[str] = []
    assert same(match_names(below(prefix, EMA), LIVE, said.append), EMA)
    assert PREFIXED[prefix] in said[0]


def test_wrappers_inside_names_are_removed():
    state = {"blocks.0._checkpoint_wrapped_module._orig_mod.weight": EMA["blocks.0.weight"],
             "module.out.bias": EMA["out.bias"]}  # fmt: skip
    assert same(match_names(state, LIVE), EMA)


def test_of_a_training_module_the_network_is_taken_and_the_rest_counted():
    said: list[str] = []
    state = below("model.", EMA) | {"vae.encoder.w": torch.ones(1), "loss.w": torch.ones(1)}
    assert same(match_names(state, LIVE, said.append), EMA)
    assert "2 other names left out (vae. 1, loss. 1)" in said[0]


@pytest.mark.parametrize(
    "state",
    [
        below("model.", LIVE) | below("model_ema.", dotless(EMA)) | below("model_ema.", COUNTS),
        below("model.", LIVE) | below("ema.", EMA),
        below("model.", LIVE) | below("ema_model.", EMA) | {"step": torch.tensor(1)},
        below("module.model.", LIVE) | below("module.ema_model.", EMA),
        LIVE | below("model_ema.", dotless(EMA)) | below("model_ema.", COUNTS),
        below("unet.", LIVE) | below("ema.", below("module.", EMA)),
    ],
)
def test_ema_weights_in_the_same_state_are_taken(state):
    said: list[str] = []
    assert same(match_names(state, LIVE, said.append), EMA)
    assert "EMA weights (" in said[0]


def test_buffers_stay_beside_ema_weights_below_another_prefix():
    state = below("pipe.transformer.", LIVE | BUFFERS) | below("ema.", EMA)
    assert same(match_names(state, {**LIVE, **BUFFERS}), EMA | BUFFERS)


@pytest.mark.parametrize("own", [below("module.", LIVE), below("model.", LIVE), LIVE])
def test_names_that_match_are_left_alone(own):
    assert same(match_names(own, own), own)
    other = {"x": torch.ones(1)}
    assert match_names(other, own) == other


# --- messages -------------------------------------------------------------------------------------


def test_each_class_of_differences_is_shown_with_at_most_five_names():
    own = {f"a{i}": torch.zeros(1) for i in range(9)} | {f"c{i}": torch.zeros(2) for i in range(7)}
    given = {f"b{i}": torch.zeros(3) for i in range(8)} | {
        f"c{i}": torch.zeros(5) for i in range(7)
    }
    found = differences(own, given)
    assert found and found.count == 24
    missing, unknown, shapes = found.lines.strip().splitlines()
    assert missing == "missing (9): a0, a1, a2, a3, a4 and 4 more"
    assert unknown == "  not in this model (8): b0, b1, b2, b3, b4 and 3 more"
    assert shapes.startswith("  other shape (7): c0 is 5 and 2 here") and "and 2 more" in shapes


def test_renamed_names_are_paired():
    own = {f"blocks.{i}.attention.to_{k}": torch.zeros(2, 2) for i in range(2) for k in "qkv"}
    given = dict(own)
    for k in "qk":
        given[f"blocks.0.attn.to_{k}"] = given.pop(f"blocks.0.attention.to_{k}")
    del given["blocks.1.attention.to_v"]
    found = differences(own, given)
    assert found and "missing (3)" in found.lines and "not in this model (2)" in found.lines
    assert "blocks.0.attn.to_k -> blocks.0.attention.to_k" in found.lines
    assert "blocks.0.attn.to_q -> blocks.0.attention.to_q" in found.lines


FILES = {
    "transformer.blocks.0.attn1.to_q.lora_A.weight": "a LoRA file: use adapter=lora",
    "lora_unet_down_blocks_0.lora_down.weight": "a LoRA file",
    "blocks.0.hada_w1_a": None,
    "blocks.0.attn.hada_w1_a": "a LoRA file",
    "text_encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a CLIP of transformers",
    "model.diffusion_model.input_blocks.0.0.weight": "a full system of latent-diffusion",
    "model.diffusion_model.mixins.patch_embed.proj.weight": "a CogVideoX checkpoint of SAT",
    "input_blocks.0.0.weight": "a UNet of latent-diffusion",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet of diffusers",
    "transformer_blocks.0.attn1.norm_q.weight": "a CogVideoX",
    "double_blocks.0.img_attn.qkv.weight": "a Flux",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "a first stage of diffusers",
    "encoder.conv_in.weight": "a first stage",
    "blocks.0.weight.absmax": "quantised weights",
    "controlnet_blocks.0.weight": "a ControlNet",
}


@pytest.mark.parametrize("name", FILES)
def test_a_message_says_what_the_file_is(name):
    want, given = FILES[name], {name: torch.zeros(1)}
    assert (kind_of(given) or "").startswith(want or "")
    found = differences(LIVE, given)
    assert found and (want is None or f"the file seems to be {want}" in found.lines)


def test_an_unknown_prefix_of_all_names_is_named():
    found = differences(LIVE, below("my.wrapper.", LIVE))
    assert found and "all its names begin with 'my.wrapper.'; save it without" in found.lines
    found = differences(LIVE, below("my.wrapper.", {"other.w": torch.zeros(1)}))
    assert found and "begin with" not in found.lines


# --- values ---------------------------------------------------------------------------------------

INF = float("inf")
BAD = {
    "NaN": torch.tensor([1.0, float("nan")]),
    "infinite": torch.tensor([INF, 1.0]),
    "infinities that cancel": torch.tensor([INF, -INF]),
    "half precision": torch.tensor([1.0, INF], dtype=torch.float16),
    "bfloat16": torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
    "float8": torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn),
    "complex": torch.tensor([complex(1, INF), 1]),
}


@pytest.mark.parametrize("name", BAD)
def test_values_that_are_not_finite_are_refused_by_name(name):
    with pytest.raises(StorageError, match=r"F: 1 of its 2 tensors .* NaN or infinite: bad"):
        check_values("F", {"good": torch.ones(2), "bad": BAD[name]})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_in_place_of_floats_are_refused(dtype):
    with pytest.raises(StorageError, match=r"F: its tensor w is \w+, not floating point"):
        check_values("F", {"w": torch.ones(2).to(dtype)}, {"w": torch.ones(2)})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((9,), 3e38), torch.full((9,), 6e4, dtype=torch.float16), torch.empty(0),
        torch.tensor(3), torch.empty(2, device="meta"), torch.tensor([1e300], dtype=torch.float64),
    ],
)  # fmt: skip
def test_finite_values_are_accepted(tensor):
    check_values("F", {"w": tensor}, {})
