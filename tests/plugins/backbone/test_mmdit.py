"""The multimodal transformer against diffusers, its presets, and what each setting does."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn

from plugins._blocks.grid_tables import even_rotary_table
from plugins._blocks.mmdit import Block
from plugins.adapter.lora import LoRA
from plugins.backbone.mmdit import MMDiT
from sandbox.config.wiring import wire
from sandbox.contracts import Clip, Conditions, SizeError, Slots, Tokens
from tests.helpers import composed, preset, sampled, train

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32; another order of sums
SMALL = MMDiT.Config(
    num_layers=2, attention_head_dim=12, in_channels=4, out_channels=4, joint_attention_dim=10,
    pooled_projection_dim=6, time_features=16,
)  # fmt: skip
SD3 = replace(
    SMALL, patch_size=2, sample_size=16, pos_embed_max_size=12, rope=False, register_tokens=0,
    time_features=256,
)  # fmt: skip
CROSS = replace(SMALL, text_attention="cross", modulation="shared", register_tokens=0)


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """Without zeros and ones of the initialisation; buffers stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / p.shape[-1] ** 0.5))
    return module.eval()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(cfg: MMDiT.Config = SMALL, frames: int = 3) -> tuple[Tensor, Tensor, Conditions]:
    cond = Conditions(
        context=rand(2, 5, 10, seed=1) if cfg.joint_attention_dim else None,
        vector=rand(2, 6, seed=2) if cfg.pooled_projection_dim else None,
        scalars={name: torch.tensor([10.0, 300.0]) for name in cfg.time_scalars},
    )
    return rand(2, 4, frames, 4, 6), torch.tensor([20.0, 700.0]), cond


# --- published networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", ["none", "rms_norm", "layer_norm"])
@torch.no_grad()
def test_it_equals_stable_diffusion_3(qk_norm: str) -> None:
    """Names of weights are equal, the table of positions too."""
    cfg = replace(SD3, qk_norm=qk_norm)
    theirs = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=12, num_attention_heads=2, joint_attention_dim=10,
        caption_projection_dim=24, pooled_projection_dim=6, pos_embed_max_size=12,
        qk_norm=None if qk_norm == "none" else qk_norm,
    )  # fmt: skip
    randomised(theirs)
    ours, own = MMDiT(cfg), theirs.state_dict()
    torch.testing.assert_close(ours.pos_embed.pos_embed, own["pos_embed.pos_embed"], **CLOSE)
    ours.load_state_dict(own)
    z, t, cond = rand(2, 4, 1, 8, 12), torch.tensor([20.0, 700.0]), inputs()[2]
    want = theirs(z[:, :, 0], cond.context, cond.vector, t, return_dict=False)[0]
    torch.testing.assert_close(ours.eval()(z, t, cond)[:, :, 0], want, **CLOSE)


NAMES = (  # patterns of our names, and the official ones
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (
        r"^time_text_embed\.timestep_embedder\.linear_(\d)",
        lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}",
    ),
    (
        r"^time_text_embed\.text_embedder\.linear_(\d)",
        lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}",
    ),
    (r"^transformer_blocks", "joint_blocks"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"attn\.to_q\.", "x_block.attn.qkv."),
    (r"attn\.add_q_proj\.", "context_block.attn.qkv."),
    (r"attn\.to_out\.0", "x_block.attn.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"attn\.norm_(q|k)\.", r"x_block.attn.ln_\1."),
    (r"attn\.norm_added_(q|k)\.", r"context_block.attn.ln_\1."),
    (r"ff\.", "x_block.mlp."),
    (r"ff_context\.", "context_block.mlp."),
    (r"net\.0\.proj", "fc1"),
    (r"net\.2", "fc2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out\.", "final_layer.linear."),
)


@pytest.mark.parametrize("qk_norm", ["none", "rms_norm"])
def test_official_weights_are_translated(qk_norm: str) -> None:
    """As by diffusers, whose function is the judge of the official names in this test."""
    model = randomised(MMDiT(replace(SD3, qk_norm=qk_norm)))
    own, official = model.state_dict(), {}
    for name, weight in own.items():
        if re.search(r"\.(to|add)_[kv](_proj)?\.", name):
            continue
        if re.search(r"\.(to|add)_q", name):
            weight = torch.cat([own[re.sub(r"_q(_proj)?\.", rf"_{x}\1.", name)] for x in "qkv"])
        if "norm_out" in name or "1.norm1_context" in name:
            weight = torch.cat(weight.chunk(2)[::-1])  # the shift is first
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        official[name] = weight
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(official))
    for found in (converted, model.from_published(official), model.from_published(own)):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)


WAN = {  # their names -> ours
    "scale_shift_table": "norm1.table", "attn1.": "attn.", "attn2.": "cross.", "ffn.": "ff.",
    "norm2.": "norm_cross.",
}  # fmt: skip


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_its_block_equals_that_of_wan(frames: int) -> None:
    """With one time for a clip, and with a time for each frame."""
    cfg = replace(CROSS, qk_norm="rms_norm_across_heads", ffn_dim=40)
    theirs = randomised(WanTransformerBlock(24, 40, 2, cross_attn_norm=True))
    state = theirs.state_dict()
    for old, new in WAN.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    ours = Block(cfg, has_text=True, is_last=False)
    ours.load_state_dict(state)
    text, x, emb = rand(2, 5, 24, seed=1), rand(2, 3 * 2 * 4, 24), rand(2, frames, 6, 24, seed=2)
    rope = WanRotaryPosEmbed(12, (1, 1, 1), 32)(torch.empty(1, 1, 3, 2, 4))
    if frames == 1:
        want = theirs(x, text, emb[:, 0], rope)
    else:
        want = theirs(x, text, emb.repeat_interleave(8, 1), rope)
    table = even_rotary_table(3, (2, 4), 12, x.device)
    kept, got = ours(text, x, emb, emb[:, :1], table, None)
    torch.testing.assert_close(got, want, **CLOSE)
    assert kept is text


@pytest.mark.parametrize(
    ("name", "count"),
    [("mmdit_sd3_medium", 2_028_328_000), ("mmdit_sd3_5_large", 8_056_627_520)],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    cfg = preset("backbone", name)
    with torch.device("meta"):
        model = MMDiT(cfg)
    assert sum(p.numel() for p in model.parameters()) == count
    wired = cfg.wired(Clip(16, 1, 128, 128), Slots(context=Tokens(4096, 333), vector=2048), 1)
    assert wired == cfg


# --- settings -------------------------------------------------------------------------------------

SWITCHES = {
    "text_attention": replace(SMALL, register_tokens=0, text_attention="cross"),
    "modulation": replace(SMALL, modulation="shared"),
    "norm": replace(SMALL, norm="rms"),
    "qk_norm": replace(SMALL, qk_norm="rms_norm_across_heads"),
    "mlp": replace(SMALL, mlp="swiglu"),
    "sandwich_norm": replace(SMALL, sandwich_norm=True),
    "no registers": replace(SMALL, register_tokens=0),
    "table": replace(SMALL, pos_embed_max_size=8),
    "no text": replace(SMALL, joint_attention_dim=0),
    "video alone": replace(SMALL, joint_attention_dim=0, register_tokens=0),
    "time scalars": replace(SMALL, time_scalars=("step_size",)),
    "one layer": replace(SMALL, num_layers=1),
}


@pytest.mark.parametrize("cfg", SWITCHES.values(), ids=list(SWITCHES))
def test_every_weight_gets_a_gradient_with_and_without_checkpointing(cfg: MMDiT.Config) -> None:
    assert not list(cfg.problems())
    found = []
    for on in (False, True):
        model = randomised(MMDiT(replace(cfg, gradient_checkpointing=on)))
        model(*inputs(cfg)).square().sum().backward()
        found.append({k: p.grad for k, p in model.named_parameters()})
    assert not [k for k, x in found[0].items() if x is None]
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cfg", [SMALL, CROSS], ids=["joint", "cross"])
@torch.no_grad()
def test_masked_text_tokens_have_no_effect(cfg: MMDiT.Config) -> None:
    model = randomised(MMDiT(cfg))
    z, t, cond = inputs(cfg)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    assert cond.context is not None
    changed = torch.where(mask[..., None], cond.context, cond.context + 1)
    shorter = model(z, t, replace(cond, context=cond.context[:, :3]))
    for context in (cond.context, changed):
        got = model(z, t, replace(cond, context=context, context_mask=mask))
        torch.testing.assert_close(got, shorter, **CLOSE)
    assert (model(z, t, replace(cond, context=changed)) - shorter).abs().max() > 1e-3


@torch.no_grad()
def test_rope_depends_on_distances_alone() -> None:
    """The score of two cells is that of two others as far apart along each axis."""
    cos, sin = (x.view(3, 4, 5, 12) for x in even_rotary_table(3, (4, 5), 12, torch.device("cpu")))
    q, k = rand(12), rand(12, seed=1)

    def at(x: Tensor, *cell: int) -> Tensor:
        even, odd = x.view(-1, 2).unbind(-1)
        turned = torch.stack((-odd, even), -1).flatten()
        return x * cos[cell] + turned * sin[cell]

    near = at(q, 0, 1, 2) @ at(k, 1, 0, 4)
    torch.testing.assert_close(near, at(q, 1, 3, 0) @ at(k, 2, 2, 2), **CLOSE)
    for other in ((0, 0, 4), (1, 1, 4), (1, 0, 3)):
        assert (near - at(q, 0, 1, 2) @ at(k, *other)).abs() > 1e-3


def test_swiglu_has_as_many_weights_as_gelu() -> None:
    cfg = MMDiT.Config(num_attention_heads=24, attention_head_dim=64)
    assert replace(cfg, mlp="swiglu").mlp_width() * 3 == cfg.mlp_width() * 2 == 2 * 4 * 1536


@torch.no_grad()
def test_it_starts_as_a_network_that_ignores_its_input() -> None:
    """Gates and the output layer start at zero (adaLN-zero)."""
    for cfg in (SMALL, CROSS):
        block = MMDiT(cfg).transformer_blocks[0]
        text, x, emb = rand(2, 5, 24, seed=1), rand(2, 8, 24), torch.zeros(2, 1, 6, 24)
        got = block(text, x, emb, emb, None, None)
        assert torch.equal(got[0], text)
        assert torch.equal(got[1], x)


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rope": False}, "pos_embed_max_size"),
        ({"attention_head_dim": 7}, "even number"),
        ({"text_attention": "cross"}, "register_tokens=4: want 0"),
        ({"qk_norm": "l2"}, "qk_norm"),
        ({"ffn_dim": 0}, "ffn_dim"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], problem: str) -> None:
    assert any(problem in p for p in replace(SMALL, **changes).problems())


def test_sizes_without_positions_are_refused() -> None:
    assert SD3.grid(Clip(4, 1, 24, 24)) == Clip(4, 1, 24, 24)
    for clip in (Clip(4, 1, 26, 24), Clip(4, 2, 24, 24), Clip(4, 1, 24, 23)):
        with pytest.raises(SizeError):
            SD3.grid(clip)


TRAINED = {
    "no text": ("conditioning=none",),
    "text": ("conditioning.offer=both", "conditioning.width=8"),
    "wan": ("conditioning.offer=tokens", "conditioning.width=8", "backbone.text_attention=cross",
            "backbone.register_tokens=0", "backbone.modulation=shared"),
    "features": ("conditioning=none", "method=dispersive", "method.module=transformer_blocks.0"),
    "frame times": ("conditioning=none", "method=diffusion_forcing"),
    "average velocity": ("conditioning.offer=both", "conditioning.width=8", "method=mean_flow",
                         "sampler=flow_map", "guidance=none"),
    "skipped blocks": ("conditioning.width=8", "guidance=skip_layer"),
}  # fmt: skip


@pytest.mark.parametrize("part", TRAINED.values(), ids=list(TRAINED))
def test_it_trains_and_samples_in_a_system(tmp_path, part: tuple[str, ...]) -> None:
    size = ("backbone.num_layers=2", "backbone.attention_head_dim=6", "backbone.time_features=8")
    run = ("vae.weights=null", "data.batch_size=2", "data.clips_per_epoch=16", "sampler.steps=2",
           "trainer.threads=1", "logger=null", "steps=2")  # fmt: skip
    trained = train(wire(composed("backbone=mmdit", *size, *run, *part)), tmp_path)
    assert all(math.isfinite(x) for x in trained.losses)
    assert sampled(trained.system).isfinite().all()


@pytest.mark.parametrize("cfg", [SMALL, CROSS], ids=["joint", "cross"])
def test_adapters_train_on_all_attention_layers(cfg: MMDiT.Config) -> None:
    pytest.importorskip("peft")
    model, values = randomised(MMDiT(cfg)), inputs(cfg)
    want = model(*values).detach()
    LoRA(LoRA.Config(rank=2)).apply(model, cfg.adapter_targets(), torch.float32)
    torch.testing.assert_close(model(*values), want)
    model(*values).square().sum().backward()
    adapted = {k.partition(".lora_B")[0] for k, p in model.named_parameters() if p.grad is not None}
    attention = {
        k.removesuffix(".base_layer")
        for k, m in model.named_modules()
        if isinstance(m, nn.Linear) and (".attn." in k or ".cross." in k) and "lora" not in k
    }
    assert attention <= adapted
