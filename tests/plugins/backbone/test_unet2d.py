"""The image UNet against recorded outputs of the original code, its published size, its rules."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kernels
from plugins._blocks.unet import AttentionBlock, Downsample, ResBlock, Upsample, timestep_embedding
from plugins.backbone.unet2d import UNet2D
from sandbox.contracts import Clip, Conditions, ConfigError, Misfit, Slots, Tokens
from tests.helpers import preset

GOLDEN = Path(__file__).parents[2] / "golden"
Z = Clip(4, 1, 4, 6)
TOLD = Slots(context=Tokens(12, 5, masked=True), concat=2, vector=10)


# --- recorded outputs -----------------------------------------------------------------------------


def filled(spec: dict) -> dict[str, Tensor]:
    """Weights from the table of the golden folder, see its README."""
    table = load_file(GOLDEN / "ldm/weights_table.safetensors")["table"]
    state = {}
    for key, (shape, offset, scale, shift) in spec.items():
        index = (offset + torch.arange(torch.Size(shape).numel())) % len(table)
        state[key] = (table[index] * scale + shift).view(shape)
    return state


def recorded(config: dict, weights: dict) -> UNet2D:
    """A model of published hyper-parameters and recorded weights."""
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    model = UNet2D(UNet2D.Config(**sizes))
    model.load_state_dict(filled(weights))
    return model.eval()


def near(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Reruns of the original differ by about 2e-6; convolutions in another order by a bit more."""
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert got.shape == want.shape and error < tolerance, f"{name}: relative error {error:.1e}"


def facts(name: str) -> tuple[dict, dict[str, Tensor]]:
    tensors = load_file(GOLDEN / f"ldm/{name}.safetensors")
    return json.loads((GOLDEN / f"ldm/{name}.json").read_text()), tensors


def told(x: Tensor, **given: Tensor | None) -> tuple[Tensor, Conditions]:
    return x[:, :, None], Conditions(**given)


def test_outputs_and_gradients_equal_the_original() -> None:
    spec, tensors = facts("unet2d")
    model, t = recorded(spec["config"], spec["weights"]), tensors["in/timesteps"]
    z, cond = told(tensors["in/x"])
    y = model(z, t, cond).squeeze(2)
    near("y", y, tensors["out/y"])
    near("flipped", model(z, t.flip(0), cond).squeeze(2), tensors["out/y_timesteps_flipped"])
    loss = (y - tensors["in/grad_target"]).square().mean()
    assert loss.item() == pytest.approx(spec["grad_check"]["loss_value"], rel=1e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    # below 1e-6: zero up to rounding
    assert norms == pytest.approx(spec["grad_check"]["grad_l2"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["updown_filmnorm", "spatial_transformer"])
def test_variants_equal_the_original(name) -> None:
    spec, tensors = facts("unet2d_variants")
    model = recorded(spec["variants"][name]["config"], spec["weights"][name])
    z, cond = told(tensors["in/x"], context=tensors.get(f"in/{name}/context"))
    near(name, model(z, tensors["in/timesteps"], cond).squeeze(2), tensors[f"out/{name}"])


BLOCKS = {
    "unet_attention_legacy": lambda: AttentionBlock(64, 4),
    "unet_attention_new": lambda: AttentionBlock(64, 4, use_new_attention_order=True),
    "unet_resblock": lambda: ResBlock(64, 24, 64),
}


@pytest.mark.parametrize("key", [*BLOCKS, "unet_attention_legacy_smallx", "unet_resblock_smallx"])
def test_blocks_equal_the_original(key) -> None:
    spec, tensors = facts("blocks")
    name = key.removesuffix("_smallx")
    block = BLOCKS[name]()
    block.load_state_dict(filled(spec["weights"][name]))
    # inputs times 0.01 make the eps of the group norm visible
    x = tensors["in/x"] * (0.01 if key != name else 1)
    out = block(x, tensors["in/emb"]) if "resblock" in name else block(x)
    near(key, out, tensors[f"out/{key}"])


def test_time_embedding_equals_the_original() -> None:
    """Angles reach 1000 (float32 step 6e-5); exp and cos differ between processors."""
    tensors = load_file(GOLDEN / "dynamicrafter/schedules.safetensors")
    got = timestep_embedding(tensors["temb/in"], 320)
    torch.testing.assert_close(got, tensors["temb/out_320"], rtol=0, atol=1.2e-4)


# --- the published size ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> UNet2D:
    with torch.device("meta"):
        return UNet2D(preset("backbone", "unet2d_ldm_celebahq"))


def test_preset_has_the_published_names_and_shapes(published) -> None:
    want = json.loads((GOLDEN / "ldm/unet2d_celebahq_keys.json").read_text())
    state = published.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == want
    assert len(state) == 368 and sum(v.numel() for v in state.values()) == 274_056_163


def test_preset_has_the_published_heads_and_resampling(published) -> None:
    """Neither shows in names and shapes."""
    heads, places = {}, {}
    for name, layer in published.named_modules():
        if isinstance(layer, AttentionBlock):
            heads[name.removesuffix(".1")] = layer.num_heads
        if isinstance(layer, Downsample | Upsample):
            places[name] = type(layer)
    inputs = {f"input_blocks.{i}": 7 * (1 + i // 3) for i in (4, 5, 7, 8, 10, 11)}
    outputs = {f"output_blocks.{i}": 7 * (4 - i // 3) for i in range(9)}
    assert heads == inputs | {"middle_block": 28} | outputs
    down = {f"input_blocks.{i}.0": Downsample for i in (3, 6, 9)}
    assert places == down | {f"output_blocks.{i}.2": Upsample for i in (2, 5, 8)}


def test_preset_fits_the_latents_of_vq_f4() -> None:
    cfg = preset("backbone", "unet2d_ldm_celebahq")
    assert cfg.wired(Clip(3, 1, 64, 64), Slots(), 1) == cfg
    assert cfg.takes() == {"concat"}


# --- what it computes -----------------------------------------------------------------------------


def small(z: Clip = Z, slots: Slots | None = None, outputs: int = 1, **settings) -> UNet2D.Config:
    # 32 channels would give each group of the norms one channel, and hide the time
    return UNet2D.Config(**{"num_heads": 2} | settings).wired(z, slots or Slots(), outputs)


def stirred(cfg: UNet2D.Config) -> UNet2D:
    """A model whose parameters are all away from zero, as after some training."""
    torch.manual_seed(0)
    model = UNet2D(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.03
    return model


def inputs(slots: Slots, z: Clip = Z) -> tuple[Tensor, Tensor, Conditions]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    cond = Conditions()
    if slots.context:
        cond.context = normal(2, 5, slots.context.width)
        cond.context_mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    if slots.vector:
        cond.vector = normal(2, slots.vector)
    if slots.concat:
        cond.concat = normal(2, slots.concat, 1, z.height, z.width)
    return normal(2, z.channels, 1, z.height, z.width), torch.tensor([10.0, 700.5]), cond


@pytest.mark.parametrize("slots", [Slots(), Slots(vector=10), TOLD], ids=["alone", "vector", "all"])
@pytest.mark.parametrize(
    "settings", [{}, {"resblock_updown": True}, {"conv_resample": False}], ids=str
)
def test_output_has_the_size_of_the_latents(slots, settings) -> None:
    model = UNet2D(small(slots=slots, outputs=2, **settings))
    assert model(*inputs(slots)).shape == (2, 8, 1, 4, 6)


def test_it_is_zero_at_first_and_every_parameter_learns_later() -> None:
    model, given = UNet2D(small(slots=TOLD)), inputs(TOLD)
    assert not model(*given).any()
    model = stirred(model.cfg)
    model(*given).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("time", lambda z, t, cond: (z, t + 100, cond)),
        ("vector", lambda z, t, cond: (z, t, replace(cond, vector=cond.vector + 1))),
        ("context", lambda z, t, cond: (z, t, replace(cond, context=cond.context + 1))),
        ("concat", lambda z, t, cond: (z, t, replace(cond, concat=cond.concat + 1))),
    ],
)
def test_every_condition_changes_the_output(name, change) -> None:
    model, given = stirred(small(slots=TOLD)), inputs(TOLD)
    assert (model(*given) - model(*change(*given))).abs().max() > 1e-3, name


def test_masked_context_is_not_seen() -> None:
    model, (z, t, cond) = stirred(small(slots=TOLD)), inputs(TOLD)
    before = model(z, t, cond)
    cond.context = cond.context.masked_fill(~cond.context_mask[..., None], 100.0)
    torch.testing.assert_close(model(z, t, cond), before, rtol=0, atol=1e-5)


def test_heads_of_output_blocks_may_differ_where_the_original_lets_them() -> None:
    def heads(**settings) -> set[int]:
        cfg = small(slots=settings.pop("slots", None), num_heads_upsample=8, **settings)
        layers = UNet2D(cfg).output_blocks.modules()
        return {m.num_heads for m in layers if hasattr(m, "num_heads")}

    assert heads() == {8}
    assert heads(legacy=False) == heads(slots=TOLD) == {2}
    assert heads(num_head_channels=16) == {4}


@pytest.mark.parametrize("slots", [Slots(), TOLD], ids=["attention_blocks", "transformers"])
def test_checkpointing_changes_no_number_with_dropout_and_frozen_weights(slots) -> None:
    results = []
    for on in (False, True):
        model = stirred(small(slots=slots, dropout=0.3, use_checkpoint=on)).train()
        for name, p in model.named_parameters():
            p.requires_grad_("qkv" in name or "to_k" in name or "emb_layers" in name)
        torch.manual_seed(2)
        loss = model(*inputs(slots)).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_group_norms_go_through_the_kernels() -> None:
    model, given = stirred(small(slots=TOLD)), inputs(TOLD)
    with kernels.use("reference"):
        want = model(*given)
    near("reference", model(*given), want)


# --- contract -------------------------------------------------------------------------------------


def test_it_is_wired_to_what_conditioning_offers() -> None:
    alone, told = small(), small(slots=TOLD, outputs=2)
    assert (alone.in_channels, alone.out_channels, alone.context_dim) == (4, 4, 0)
    assert alone.use_spatial_transformer is False and alone.adm_in_channels == 0
    assert (told.in_channels, told.out_channels, told.context_dim) == (6, 8, 12)
    assert told.use_spatial_transformer is True and told.adm_in_channels == 10
    assert told.wired(Z, TOLD, 2) == told


@pytest.mark.parametrize(
    ("z", "field", "rule"),
    [
        (Clip(4, 3, 4, 4), "frames", "1 "),
        (Clip(4, 1, 5, 4), "height", "a multiple of 2"),
        (Clip(4, 1, 4, 7), "width", "a multiple of 2"),
    ],
)
def test_latents_that_do_not_fit_are_refused_by_field(z, field, rule) -> None:
    with pytest.raises(Misfit, match=rule) as error:
        UNet2D.Config().grid(z)
    assert error.value.field == field
    model = UNet2D(small())
    with pytest.raises(Misfit):
        model(torch.zeros(1, *z.__dict__.values()), torch.zeros(1), Conditions())


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_spatial_transformer=True, but False is needed"):
        small(use_spatial_transformer=True)
    with pytest.raises(ConfigError, match="in_channels=4, but 6 is needed"):
        small(slots=TOLD, in_channels=4)
    with pytest.raises(ConfigError, match="unet2d: context is for 3 frames"):
        small(slots=Slots(context=Tokens(8, 2, frames=3)))
    model, (z, t, _) = UNet2D(small()), inputs(Slots())
    for cond, problem in [
        (Conditions(context=torch.zeros(2, 5, 12)), "context_dim=0, but .* bring 12"),
        (Conditions(vector=torch.zeros(2, 3)), "adm_in_channels=0, but .* bring 3"),
        (Conditions(concat=torch.zeros_like(z)), "in_channels=4, but .* bring 8"),
        (Conditions(scalars={"fps": t}), "takes no fps"),
    ]:
        with pytest.raises(ValueError, match=problem):
            model(z, t, cond)


def test_slots_that_settings_exclude_are_not_taken() -> None:
    assert UNet2D.Config().takes() == {"context", "vector", "concat"}
    assert UNet2D.Config(use_spatial_transformer=False).takes() == {"vector", "concat"}
    assert UNet2D.Config(context_dim=0, adm_in_channels=0).takes() == {"concat"}


def test_adapter_targets_are_layers_of_every_attention() -> None:
    for cfg in (small(), small(slots=TOLD)):
        names = [n for n, m in UNet2D(cfg).named_modules() if isinstance(m, nn.Linear | nn.Conv1d)]
        for target in cfg.adapter_targets():
            assert sum(n.endswith(f".{target}") for n in names) >= 4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_channels": 48}, "model_channels=48: want a multiple of 32"),
        ({"channel_mult": ()}, "channel_mult=[]: want at least one level, each >= 1"),
        ({"attention_resolutions": (4,)}, "attention_resolutions=[4]: want some of [1, 2], by fac"),
        ({"num_heads": -1}, "num_heads=-1: want a divisor of all widths with attention, [64]"),
        ({"num_heads_upsample": 3}, "num_heads_upsample=3: want a divisor of all widths with att"),
        ({"num_head_channels": 48}, "num_head_channels=48: want a divisor of all widths with att"),
        ({"dropout": float("nan")}, "dropout=nan: want 0 to 0.99"),
        ({"context_dim": -1}, "context_dim=-1: want >= 0"),
        ({"use_spatial_transformer": False, "context_dim": 8}, "use_spatial_transformer=False: wa"),
        ({"use_spatial_transformer": True, "context_dim": 0}, "use_spatial_transformer=True: want"),
    ],
)
def test_bad_settings_are_named(settings, problem) -> None:
    (found,) = UNet2D.Config(**settings).problems()
    assert found.startswith(problem)


def test_an_incomplete_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.in_channels is null"):
        UNet2D(UNet2D.Config())


# --- clips ----------------------------------------------------------------------------------------

CLIP = Clip(4, 3, 8, 8)


@pytest.mark.parametrize("motion", ["vanilla", "grid"])
@pytest.mark.parametrize("slots", [Slots(), TOLD], ids=["plain", "told"])
@torch.no_grad()
def test_a_network_of_pictures_is_unchanged_on_every_frame_of_a_clip(slots, motion) -> None:
    image = stirred(small(slots=slots))
    video = UNet2D(small(CLIP, slots, motion_module=motion))
    missing, unexpected = video.load_state_dict(image.state_dict(), strict=False)
    assert missing and all(".motion_module." in k for k in missing) and not unexpected
    _, t, cond = inputs(slots)
    g = torch.Generator().manual_seed(2)
    z = torch.randn(2, 4, 3, 8, 8, generator=g)
    if slots.concat:
        cond.concat = torch.randn(2, slots.concat, 3, 8, 8, generator=g)

    def frame(i: int) -> Tensor:
        concat = None if cond.concat is None else cond.concat[:, :, i : i + 1]
        return image(z[:, :, i : i + 1], t, replace(cond, concat=concat))

    # convolutions of other batches: float32 rounding
    want = torch.cat([frame(i) for i in range(3)], 2)
    torch.testing.assert_close(video(z, t, cond), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_frames_of_a_clip_meet_in_motion_modules() -> None:
    model = stirred(small(CLIP, motion_module="vanilla"))
    z, t = torch.randn(2, 4, 3, 8, 8), torch.tensor([10.0, 700.5])
    other = z.clone()
    other[:, :, 2] += 1
    assert not torch.equal(
        model(z, t, Conditions())[:, :, 0], model(other, t, Conditions())[:, :, 0]
    )


def test_blocks_of_a_motion_grid_must_fit_the_smallest_size() -> None:
    with pytest.raises(Misfit, match="height=6: want a multiple of 4"):
        UNet2D.Config(motion_module="grid").grid(Clip(4, 3, 6, 8))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"motion_module": "raft"}, "motion_module='raft': want one of"),
        ({"motion_heads": 0}, "motion_heads=0: want >= 1"),
        ({"motion_module": "vanilla", "motion_heads": 65}, "motion_heads=65: 64 // 65 * 65 is 0"),
        ({"motion_block_size": 0}, "motion_block_size=0: want >= 1"),
    ],
)
def test_a_bad_motion_setting_is_said(settings, problem) -> None:
    (found,) = UNet2D.Config(**settings).problems()
    assert found.startswith(problem)


def test_adapter_targets_reach_motion_modules() -> None:
    cfg = small(CLIP, motion_module="vanilla")
    modules = dict(UNet2D(cfg).named_modules())
    for target in cfg.adapter_targets():
        found = [m for n, m in modules.items() if n.endswith(f".{target}")]
        assert found and all(isinstance(m, nn.Linear | nn.Conv1d) for m in found), target
