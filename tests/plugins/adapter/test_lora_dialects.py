"""LoRA files of many dialects: strengths as in diffusers and peft, others refused by their name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from plugins.adapter.lora import LoRA
from plugins.backbone.cogvideox import CogVideoX
from sandbox.contracts import StorageError

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
WIDTH, RANK = 16, 4
PARTS = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = [f"transformer_blocks.{i}.attn1.{part}" for i in (0, 1) for part in PARTS]
SIZES = {
    "num_attention_heads": 1, "attention_head_dim": WIDTH, "num_layers": 2, "time_embed_dim": 8,
    "in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "max_text_seq_length": 4,
}  # fmt: skip
METADATA = "lora_adapter_metadata"


def ours() -> CogVideoX:
    return CogVideoX(CogVideoX.Config(**SIZES, vector_dim=0))


def theirs() -> Any:
    return diffusers.CogVideoXTransformer3DModel(**SIZES)


def factors(rank: Callable[[str], int] = lambda layer: RANK) -> dict[str, Tensor]:
    """peft's names: A (rank, in) and B (out, rank) of every layer."""
    made = torch.Generator().manual_seed(0)
    state = {}
    for layer in LAYERS:
        state[f"{layer}.lora_A.weight"] = torch.randn(rank(layer), WIDTH, generator=made)
        state[f"{layer}.lora_B.weight"] = torch.randn(WIDTH, rank(layer), generator=made)
    return state


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """What each adapted layer adds to its weight, computed by peft."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(
            module.active_adapters[0]
        ).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def loaded(path: Path, rank: int = RANK, **settings: Any) -> dict[str, Tensor]:
    model = ours()
    lora = LoRA(LoRA.Config(rank=rank, weights=str(path), **settings))
    lora.apply(model, model.cfg.adapter_targets(), torch.float32)
    return deltas(model)


def same(path: Path, want: dict[str, Tensor], **settings: Any) -> None:
    found = loaded(path, **settings)
    assert found.keys() == want.keys() == set(LAYERS)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5)


def by_diffusers(state: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    model = theirs()
    model.load_lora_adapter(dict(state), prefix="transformer", **settings)
    return deltas(model)


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def renamed(state: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def down_and_up(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, ("lora_A", "lora_down"), ("lora_B", "lora_up"))


def flat(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names of kohya."""
    out = {}
    for name, tensor in state.items():
        layer, side, _ = name.rsplit(".", 2)
        kind = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
        out[f"{prefix}{layer.replace('.', '_')}.{kind}.weight"] = tensor
    return out


# --- files of diffusers, compared with diffusers --------------------------------------------------

HEADERS: dict[str, dict[str, Any]] = {
    "an alpha": {"r": 4, "lora_alpha": 8},
    "rsLoRA": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "an alpha per module": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 16, "to_out.0": 2}},
    "an alpha by a pattern": {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks\.1\..*": 3},
    },
    "an alpha of one layer": {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn1.to_k": 1},
    },
    "rsLoRA with patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_v": 5},
        "rank_pattern": {"to_k": 2},
    },
    "ranks per module": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "to_v": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("own_alpha", [None, 3.0])
def test_the_settings_in_the_header_decide_as_in_diffusers(tmp_path, name, own_alpha) -> None:
    settings = HEADERS[name] | {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    ranks = settings.get("rank_pattern", {})
    state = below("transformer.", factors(lambda layer: ranks.get(layer.rpartition(".")[2], 4)))
    metadata = {f"transformer.{k}": v for k, v in settings.items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, path, {"format": "pt", METADATA: json.dumps(metadata)})
    same(path, by_diffusers(state, metadata=metadata), alpha=own_alpha)


def test_the_strength_of_rslora_is_alpha_by_the_root_of_the_rank(tmp_path, caplog) -> None:
    """Case 5: alpha 8, rank 4: 8 / sqrt(4) = 4, not 2."""
    state = factors()
    path = tmp_path / "lora.safetensors"
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}
    save_file(below("transformer.", state), path, {METADATA: json.dumps(settings)})
    with caplog.at_level(logging.INFO):
        found = loaded(path)
    a, b = (state[f"{LAYERS[0]}.lora_{k}.weight"] for k in "AB")
    torch.testing.assert_close(found[LAYERS[0]], 4 * b @ a)
    assert "strength 4 (rsLoRA)" in caplog.text and "transformer. removed" in caplog.text


@pytest.mark.parametrize(
    "header",
    [
        {"r": "4", "lora_alpha": "8", "use_rslora": "true"},
        {"rank": "4", "alpha": "8.0", "use_rslora": "True"},
    ],
)
def test_settings_may_be_entries_of_the_header(tmp_path, header) -> None:
    state = factors()
    save_file(below("transformer.", state), tmp_path / "lora.safetensors", header)
    a, b = (state[f"{LAYERS[0]}.lora_{k}.weight"] for k in "AB")
    torch.testing.assert_close(loaded(tmp_path / "lora.safetensors")[LAYERS[0]], 4 * b @ a)


PLAIN: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "peft names": lambda s: below("transformer.", s),
    "lora.down": lambda s: below(
        "transformer.", renamed(s, (".lora_A", ".lora.down"), (".lora_B", ".lora.up"))
    ),
    "processors": lambda s: below("transformer.", renamed(
        s, ("to_out.0.", "to_out."), ("attn1.", "attn1.processor."), (".lora_A", "_lora.down"),
        (".lora_B", "_lora.up"),
    )),
    "projections": lambda s: below("transformer.", renamed(
        s, ("to_out.0.", "to_out."), (".lora_A", "_lora.down"), (".lora_B", "_lora.up"),
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_files_without_an_alpha_have_strength_1_as_in_diffusers(tmp_path, name) -> None:
    state = PLAIN[name](factors())
    save_file(state, tmp_path / "lora.safetensors")
    judge = renamed(state, ("processor.", "")) if name == "processors" else state
    same(tmp_path / "lora.safetensors", by_diffusers(judge))


def test_ranks_that_differ_without_settings_are_as_in_diffusers(tmp_path, caplog) -> None:
    state = below("transformer.", factors(lambda layer: 2 if "to_q" in layer else 4))
    save_file(state, tmp_path / "lora.safetensors")
    with caplog.at_level(logging.INFO):
        same(tmp_path / "lora.safetensors", by_diffusers(state))
    assert "ranks 2 to 4, padded with zeros" in caplog.text


# --- alphas as tensors, compared with diffusers with the same alphas ------------------------------

ALPHAS = {layer: 2.0 if "to_q" in layer else 6.0 for layer in LAYERS}
WITH_ALPHA: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "kohya": (lambda s: flat(s, "lora_unet_"), "lora_unet_{}"),
    "EasyAnimate": (lambda s: flat(s, "lora_unet__"), "lora_unet__{}"),
    "kohya for transformers": (lambda s: flat(s, "lora_transformer_"), "lora_transformer_{}"),
    "LyCORIS": (lambda s: flat(s, "lycoris_"), "lycoris_{}"),
    "ComfyUI": (lambda s: below("diffusion_model.", s), "diffusion_model.{}"),
    "ComfyUI, down and up": (
        lambda s: below("diffusion_model.", down_and_up(s)),
        "diffusion_model.{}",
    ),
    "dotted": (lambda s: below("transformer.", s), "transformer.{}"),
    "two prefixes": (lambda s: below("model.diffusion_model.", s), "model.diffusion_model.{}"),
    "no prefix": (lambda s: s, "{}"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_ALPHA)
def test_alphas_of_layers_are_as_in_diffusers(tmp_path, name) -> None:
    names, alpha_name = WITH_ALPHA[name]
    state = names(factors())
    for layer, alpha in ALPHAS.items():
        key = layer.replace(".", "_") if alpha_name[-3:-2] == "_" else layer
        state[f"{alpha_name.format(key)}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "lora.safetensors")
    alphas = {f"transformer.{k}.alpha": v for k, v in ALPHAS.items()}
    want = by_diffusers(below("transformer.", factors()), network_alphas=alphas)
    same(tmp_path / "lora.safetensors", want)


# --- folders that peft writes, compared with peft -------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rsLoRA": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"to_q": 3},
        "rank_pattern": {"to_v": 2},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("as_pickle", [False, True])
def test_folders_of_peft_are_as_in_peft(tmp_path, name, as_pickle) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(**CONFIGS[name], target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(ours(), config)
    model.save_pretrained(tmp_path, safe_serialization=not as_pickle)
    file = next(p for p in tmp_path.iterdir() if p.name.startswith("adapter_model."))
    same(tmp_path, deltas(model))
    same(file, deltas(model))


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.base_model.model.", "_orig_mod."])
def test_raw_states_of_peft_are_read(tmp_path, prefix) -> None:
    """With the adapter's name inside, as `state_dict` has it."""
    state = renamed(factors(), ("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default."))
    save_file(below(prefix, state), tmp_path / "lora.safetensors")
    same(tmp_path / "lora.safetensors", by_diffusers(below("transformer.", factors())))


# --- refused by name ------------------------------------------------------------------------------

Q = f"transformer.{LAYERS[0]}"
ONE = torch.ones(1)
NOT_PLAIN = {
    "DoRA": ({f"{Q}.lora_magnitude_vector": ONE}, {}, "a DoRA"),
    "DoRA of kohya": ({"lora_unet_a.dora_scale": ONE}, {}, "a DoRA"),
    "DoRA in the settings": ({}, {"use_dora": True}, r"a DoRA \(use_dora\)"),
    "LoHa": ({"lora_unet_a.hada_w1_a": ONE}, {}, "a LoHa"),
    "LoKr": ({"lora_unet_a.lokr_w1": ONE}, {}, "a LoKr"),
    "OFT": ({"oft_unet_a.oft_blocks": ONE}, {}, "an OFT"),
    "IA3": ({f"{Q}.ia3_l": ONE}, {}, "an IA3"),
    "AdaLoRA": ({f"{Q}.lora_E": ONE}, {}, "an AdaLoRA"),
    "AdaLoRA in the settings": ({}, {"peft_type": "ADALORA"}, "peft_type is ADALORA"),
    "Tucker": ({"lora_unet_a.lora_mid.weight": ONE}, {}, "a LoCon with a Tucker"),
    "biases": ({f"{Q}.lora_B.bias": ONE}, {}, "a LoRA with biases"),
    "trained biases": ({}, {"bias": "lora_only"}, "bias=lora_only"),
    "full differences": ({"diffusion_model.a.diff": ONE}, {}, "full differences"),
    "full weights": ({}, {"modules_to_save": ["proj_out"]}, "full weights of other layers"),
    "a text encoder": ({"lora_te1_a.lora_up.weight": ONE}, {}, "layers of a text encoder"),
    "PiSSA": ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
    "repeated layers": ({}, {"layer_replication": [[0, 2]]}, "layer_replication"),
    "an alpha that differs": ({f"{Q}.alpha": torch.tensor(2.0)}, {"r": 4, "lora_alpha": 8},
                              r"alpha is 2, but its settings say lora_alpha=8"),
    "a rank that differs": ({}, {"r": 16, "lora_alpha": 8}, "rank 4, but its settings say r=16"),
    "unknown names": ({f"{Q}.scalar": ONE}, {}, "1 of its names are not those of a plain LoRA"),
    "NaN": ({f"{Q}.lora_A.weight": torch.full((4, 16), float("nan"))}, {}, "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_methods_are_refused_by_their_name(tmp_path, name) -> None:
    more, settings, want = NOT_PLAIN[name]
    path = tmp_path / "lora.safetensors"
    metadata = {f"transformer.{k}": v for k, v in settings.items()}
    header = {METADATA: json.dumps(metadata)} if metadata else {}
    save_file(below("transformer.", factors()) | more, path, header)
    with pytest.raises(StorageError, match=rf"^adapter\.weights=.*lora\.safetensors: .*{want}"):
        loaded(path)


def test_a_file_of_other_layers_says_which_targets_it_has(tmp_path) -> None:
    state = {
        k: v for k, v in below("transformer.", factors()).items() if "to_q" in k or "to_v" in k
    }
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(StorageError, match=r"set adapter.targets=\[to_q,to_v\]") as e:
        loaded(tmp_path / "lora.safetensors")
    assert "missing (8): transformer_blocks.0.attn1.to_k" in str(e.value)
    assert loaded(tmp_path / "lora.safetensors", targets=("to_q", "to_v"))


def test_a_full_model_is_no_lora(tmp_path) -> None:
    state = {k: v.contiguous() for k, v in ours().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=r"not a LoRA file: it seems to be a CogVideoX"):
        loaded(tmp_path / "model.safetensors")


def test_a_folder_without_an_adapter_is_named(tmp_path) -> None:
    with pytest.raises(StorageError, match="none of adapter_model"):
        loaded(tmp_path)
