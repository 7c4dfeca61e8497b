"""The CogVideoX transformer against recorded outputs, its published sizes, and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from plugins._blocks.grid_tables import (
    crop_region,
    rotary_table,
    sinusoidal_table,
)
from plugins.backbone.cogvideox import CogVideoX
from sandbox.contracts import Clip, Conditions, ConfigError, Misfit, Slots, Tokens
from tests.helpers import preset

GOLDEN = Path(__file__).parents[2] / "golden/cogvideox"
VARIANTS = ("2b", "5b", "5b_i2v", "1_5_5b", "1_5_5b_i2v")
PARAMETERS = {
    "2b": 1_693_783_872,
    "5b": 5_570_283_072,
    "5b_i2v": 5_570_479_680,
    "1_5_5b": 5_570_676_352,
    "1_5_5b_i2v": 5_571_594_880,
}
SMALL = CogVideoX.Config(
    num_layers=2, attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=20,
    max_text_seq_length=6, vector_dim=0, patch_size=2, time_embed_dim=24,
)  # fmt: skip
KNOWN = set(CogVideoX.Config.__dataclass_fields__)


def recorded(variant: str) -> tuple[CogVideoX, dict[str, Tensor], dict]:
    """The tiny published model with recorded weights, the fixture and its metadata."""
    path = GOLDEN / f"transformer_{variant}.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    fixture = load_file(path)
    settings = {k: v for k, v in meta["config"].items() if k in KNOWN}
    cfg = CogVideoX.Config(**settings, vector_dim=0)
    model = CogVideoX(replace(cfg, rope_grid="counted" if cfg.patch_size_t else "fitted"))
    weights = {k[11:]: v for k, v in fixture.items() if k.startswith("state_dict/")}
    model.load_state_dict(weights)
    return model.eval(), fixture, meta


def case_inputs(
    fixture: dict[str, Tensor], case: str, noisy: int
) -> tuple[Tensor, Tensor, Conditions]:
    """(z_t, t, conditions) of a recorded case, whose video is (B, F, C, H, W)."""
    x = fixture[f"{case}/hidden_states"].transpose(1, 2)
    scalars = {}
    if f"{case}/ofs" in fixture:
        scalars["ofs"] = fixture[f"{case}/ofs"].expand(x.shape[0])
    cond = Conditions(
        context=fixture[f"{case}/encoder_hidden_states"],
        concat=x[:, noisy:] if x.shape[1] > noisy else None,
        scalars=scalars,
    )
    return x[:, :noisy], fixture[f"{case}/timestep"], cond


def built(cfg: CogVideoX.Config = SMALL) -> CogVideoX:
    """A model without zero-initialised parameters."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = CogVideoX(cfg)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model


def inputs(frames: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Conditions]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, frames, height, width, generator=generator)
    context = torch.randn(2, 6, 20, generator=generator)
    return z, torch.tensor([10.0, 900.0]), Conditions(context=context)


# the published model


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_equal_the_recorded_ones(variant: str, case: str) -> None:
    model, fixture, meta = recorded(variant)
    got = model(*case_inputs(fixture, case, meta["config"]["out_channels"]))
    want = fixture[f"{case}/output"].transpose(1, 2)
    torch.testing.assert_close(got, want, **meta["tolerance"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_have_the_published_names_and_shapes(variant: str) -> None:
    with torch.device("meta"):
        model = CogVideoX(preset("backbone", f"cogvideox_{variant}"))
    manifest = json.loads((GOLDEN / f"cogvideox_{variant}_transformer.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: shape for k, (shape, _) in manifest.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_have_the_published_number_of_parameters(variant: str) -> None:
    with torch.device("meta"):
        model = CogVideoX(preset("backbone", f"cogvideox_{variant}"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize(
    ("variant", "clip", "grid"),
    [
        ("2b", Clip(16, 13, 60, 90), Clip(16, 13, 60, 90)),
        ("5b_i2v", Clip(16, 13, 60, 90), Clip(16, 13, 60, 90)),
        ("1_5_5b", Clip(16, 21, 96, 170), Clip(16, 22, 96, 170)),
        ("1_5_5b_i2v", Clip(16, 14, 96, 96), Clip(16, 14, 96, 96)),
    ],
)
def test_presets_take_the_published_sizes(variant: str, clip: Clip, grid: Clip) -> None:
    cfg = preset("backbone", f"cogvideox_{variant}")
    image = variant.endswith("i2v")
    scalars = frozenset({"ofs"}) if variant == "1_5_5b_i2v" else frozenset()
    slots = Slots(context=Tokens(4096, 226), concat=16 if image else 0, scalars=scalars)
    assert cfg.grid(clip) == grid
    assert cfg.wired(grid, slots, 1) == cfg


# positions


def positions() -> tuple[dict[str, Tensor], dict]:
    path = GOLDEN / "positions.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["meta"])


@pytest.mark.parametrize("name", ["lin_default", "lin_portrait", "lin_crop", "slice"])
def test_rotary_tables_equal_the_recorded_ones(name: str) -> None:
    tensors, meta = positions()
    facts = meta["rope"][name]
    base = tuple(facts["base"]) if facts["kind"] == "linspace" else None
    got = rotary_table(facts["T"], tuple(facts["grid"]), base, facts["hd"], torch.device("cpu"))
    for part, table in zip(("cos", "sin"), got, strict=True):
        torch.testing.assert_close(table, tensors[f"rope/{name}/{part}"], atol=1e-6, rtol=0)


def test_crop_regions_equal_the_recorded_ones() -> None:
    _, meta = positions()
    for facts in meta["crop_regions"]:
        got = crop_region(tuple(facts["grid"]), tuple(facts["base_hw"]))
        assert [list(corner) for corner in got] == facts["crop"], facts


def test_sinusoids_equal_the_recorded_ones() -> None:
    tensors, meta = positions()
    for facts in meta["sincos"]:
        scales = facts["temporal_interpolation_scale"], facts["spatial_interpolation_scale"]
        got = sinusoidal_table(facts["T"], tuple(facts["hw"]), facts["dim"], scales)
        want = tensors[f"sincos/{facts['name']}"]
        torch.testing.assert_close(got.to(want), want, atol=1e-6, rtol=0)


def test_fixed_table_of_the_small_model_equals_the_recorded_one() -> None:
    _, fixture, meta = recorded("2b")
    facts = meta["config"]
    grid = facts["sample_height"] // 2, facts["sample_width"] // 2
    table = sinusoidal_table(3, grid, 32, (1.0, 1.875)).flatten(0, 1)
    want = fixture["pos_embedding_default_f32"][0]
    assert not want[: facts["max_text_seq_length"]].any()
    torch.testing.assert_close(table.float(), want[facts["max_text_seq_length"] :])


def test_counted_and_fitted_grids_agree_at_the_sample_size_only() -> None:
    device, base = torch.device("cpu"), (30, 45)
    same = [rotary_table(2, base, b, 64, device)[0] for b in (None, base)]
    other = [rotary_table(2, (16, 28), b, 64, device)[0] for b in (None, base)]
    torch.testing.assert_close(*same, atol=2e-5, rtol=0)  # linspace in float32 up to 44
    assert (other[0] - other[1]).abs().max() > 0.5


# the contract


def test_checkpointing_does_not_change_gradients() -> None:
    z, t, cond = inputs()
    plain, saving = built(), built(replace(SMALL, gradient_checkpointing=True))
    outs = [model(z, t, cond) for model in (plain, saving)]
    for out in outs:
        out.square().mean().backward()
    assert torch.equal(*outs)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_masked_text_tokens_have_no_effect() -> None:
    z, t, cond = inputs()
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    other = cond.context.clone()
    other[:, 4:] += 1
    outs = [built()(z, t, Conditions(c, mask)) for c in (cond.context, other)]
    torch.testing.assert_close(*outs)


@torch.no_grad()
def test_all_text_tokens_count_without_a_mask() -> None:
    z, t, cond = inputs()
    other = cond.context.clone()
    other[:, -1] += 1
    model = built()
    assert (model(z, t, cond) - model(z, t, Conditions(other))).abs().max() > 1e-3


@torch.no_grad()
def test_ofs_and_vector_reach_the_output() -> None:
    z, t, cond = inputs()
    model = built(replace(SMALL, ofs_embed_dim=24, vector_dim=5))
    vector, ofs = torch.ones(2, 5), torch.full((2,), 2.0)
    out = model(z, t, replace(cond, vector=vector, scalars={"ofs": ofs}))
    assert not torch.equal(out, model(z, t, replace(cond, vector=-vector, scalars={"ofs": ofs})))
    assert not torch.equal(out, model(z, t, replace(cond, vector=vector, scalars={"ofs": 3 * ofs})))


@torch.no_grad()
def test_it_runs_in_half_precision_with_frozen_half_weights() -> None:
    z, t, cond = inputs()
    out = built().to(torch.bfloat16)(z.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_a_stored_table_is_a_buffer_and_fixes_the_size() -> None:
    cfg = replace(SMALL, use_learned_positional_embeddings=True, sample_height=8, sample_width=8)
    model = built(cfg)
    assert "patch_embed.pos_embedding" in model.state_dict()
    assert "patch_embed.pos_embedding" not in dict(model.named_parameters())
    with pytest.raises(Misfit, match="height=6: want 8, the size of the stored table"):
        model(*inputs(height=6))


def test_a_network_without_text_runs() -> None:
    cfg = CogVideoX.Config().wired(Clip(4, 3, 4, 4), Slots(), 1)
    model = built(cfg)
    assert model(torch.zeros(1, 4, 3, 4, 4), torch.zeros(1), Conditions()).shape == (1, 4, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concat": torch.zeros(2, 4, 3, 8, 8)}, "latents have shape"),
        ({"vector": torch.zeros(2, 5)}, "vector_dim=0, but the inputs have 5"),
        ({"scalars": {"ofs": torch.zeros(2)}}, r"ofs_embed_dim=None, but the inputs have \['ofs'"),
        ({"context": None}, "the inputs have 0 tokens of width 0"),
        ({"context": torch.zeros(2, 7, 20)}, "the inputs have 7 tokens of width 20"),
        ({"image_context": torch.zeros(2, 1, 1, 20)}, "takes no image_context"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    z, t, cond = inputs()
    with pytest.raises(ValueError, match=message):
        built()(z, t, replace(cond, **change))


def test_frames_must_fill_temporal_patches() -> None:
    with pytest.raises(Misfit, match="frames=3: want a multiple of patch_size_t=2"):
        built(replace(SMALL, patch_size_t=2))(*inputs())


def test_a_size_that_contradicts_the_wiring_is_refused() -> None:
    slots = Slots(context=Tokens(4096, 120))
    with pytest.raises(ConfigError, match="max_text_seq_length=226, but 120 is needed"):
        preset("backbone", "cogvideox_2b").wired(Clip(16, 13, 60, 90), slots, 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_head_dim": 24}, "attention_head_dim=24: want a multiple of 16"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: want >= 1"),
        ({"ofs_embed_dim": 32}, "ofs_embed_dim=32: want time_embed_dim=24"),
        ({"rope_grid": "slice"}, "rope_grid='slice': want one of ['counted', 'fitted']"),
        ({"norm_eps": float("nan")}, "norm_eps=nan: want > 0"),
        ({"spatial_interpolation_scale": 0.0}, "spatial_interpolation_scale=0.0: want > 0"),
        (
            {"use_learned_positional_embeddings": True, "patch_size_t": 2},
            "use_learned_positional_embeddings=True: want patch_size_t=null",
        ),
        (
            {"use_learned_positional_embeddings": True, "sample_height": 5},
            "sample_height and sample_width: want multiples of 2",
        ),
    ],
)
def test_a_bad_setting_is_reported(changes: dict, problem: str) -> None:
    problems = list(replace(SMALL, **changes).problems())
    assert any(p.startswith(problem) for p in problems), problems
