"""The image UNet against recorded outputs of the original code, its size and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kernels
from plugins._blocks.embeddings import timestep_embedding
from plugins._blocks.unet import AttentionBlock, Downsample, ResBlock, Upsample
from plugins.backbone.unet2d import UNet2D
from sandbox.contracts import Clip, Conditions, ConfigError, SizeError, Slots, Tokens
from tests.helpers import recipe

GOLDEN = Path(__file__).parents[2] / "golden"
Z = Clip(4, 1, 4, 6)
ALL = Slots(context=Tokens(12, 5, masked=True), concat=2, vector=10)


# --- recorded outputs -----------------------------------------------------------------------------


def filled(spec: dict) -> dict[str, Tensor]:
    """Weights from the table of the golden folder; see its README."""
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
    """Reruns of the original differ by about 2e-6, other orders of summation by a bit more."""
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert got.shape == want.shape and error < tolerance, f"{name}: relative error {error:.1e}"


def facts(name: str) -> tuple[dict, dict[str, Tensor]]:
    tensors = load_file(GOLDEN / f"ldm/{name}.safetensors")
    return json.loads((GOLDEN / f"ldm/{name}.json").read_text()), tensors


def image_inputs(x: Tensor, **given: Tensor | None) -> tuple[Tensor, Conditions]:
    return x[:, :, None], Conditions(**given)


def test_outputs_and_gradients_equal_the_original() -> None:
    spec, tensors = facts("unet2d")
    model, t = recorded(spec["config"], spec["weights"]), tensors["in/timesteps"]
    z, cond = image_inputs(tensors["in/x"])
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
    z, cond = image_inputs(tensors["in/x"], context=tensors.get(f"in/{name}/context"))
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
    # scaled by 0.01, the inputs show the eps of the group norm
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
        return UNet2D(recipe("ldm_celebahq_vq4").backbone)


def test_preset_has_the_published_names_and_shapes(published) -> None:
    want = json.loads((GOLDEN / "ldm/unet2d_celebahq_keys.json").read_text())
    state = published.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == want
    assert len(state) == 368 and sum(v.numel() for v in state.values()) == 274_056_163


def test_preset_has_the_published_heads_and_resampling(published) -> None:
    """Names and shapes do not show them."""
    heads, resamplers = {}, {}
    for name, layer in published.named_modules():
        if isinstance(layer, AttentionBlock):
            heads[name.removesuffix(".1")] = layer.num_heads
        if isinstance(layer, Downsample | Upsample):
            resamplers[name] = type(layer)
    inputs = {f"input_blocks.{i}": 7 * (1 + i // 3) for i in (4, 5, 7, 8, 10, 11)}
    outputs = {f"output_blocks.{i}": 7 * (4 - i // 3) for i in range(9)}
    assert heads == inputs | {"middle_block": 28} | outputs
    down = {f"input_blocks.{i}.0": Downsample for i in (3, 6, 9)}
    assert resamplers == down | {f"output_blocks.{i}.2": Upsample for i in (2, 5, 8)}


def test_preset_fits_the_latents_of_vq_f4() -> None:
    cfg = recipe("ldm_celebahq_vq4").backbone
    assert cfg.wired(Clip(3, 1, 64, 64), Slots(), 1) == cfg
    assert cfg.takes() == {"concat"}


# --- function ------------------------------------------------------------------------------------


def small(z: Clip = Z, slots: Slots | None = None, outputs: int = 1, **settings) -> UNet2D.Config:
    # With 32 channels each group of a norm would have one channel, which hides the time.
    return UNet2D.Config(**{"num_heads": 2} | settings).wired(z, slots or Slots(), outputs)


def randomised(cfg: UNet2D.Config) -> UNet2D:
    """A model without zero parameters, as after some training."""
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


@pytest.mark.parametrize("slots", [Slots(), Slots(vector=10), ALL], ids=["none", "vector", "all"])
@pytest.mark.parametrize(
    "settings", [{}, {"resblock_updown": True}, {"conv_resample": False}], ids=str
)
def test_output_has_the_size_of_the_latents(slots, settings) -> None:
    model = UNet2D(small(slots=slots, outputs=2, **settings))
    assert model(*inputs(slots)).shape == (2, 8, 1, 4, 6)


def test_the_initial_output_is_zero_and_later_every_parameter_gets_a_gradient() -> None:
    model, given = UNet2D(small(slots=ALL)), inputs(ALL)
    assert not model(*given).any()
    model = randomised(model.cfg)
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
    model, given = randomised(small(slots=ALL)), inputs(ALL)
    assert (model(*given) - model(*change(*given))).abs().max() > 1e-3, name


def test_masked_context_has_no_effect() -> None:
    model, (z, t, cond) = randomised(small(slots=ALL)), inputs(ALL)
    before = model(z, t, cond)
    cond.context = cond.context.masked_fill(~cond.context_mask[..., None], 100.0)
    torch.testing.assert_close(model(z, t, cond), before, rtol=0, atol=1e-5)


def test_num_heads_upsample_applies_as_published() -> None:
    def heads(**settings) -> set[int]:
        cfg = small(slots=settings.pop("slots", None), num_heads_upsample=8, **settings)
        layers = UNet2D(cfg).output_blocks.modules()
        return {m.num_heads for m in layers if hasattr(m, "num_heads")}

    assert heads() == {8}
    assert heads(legacy=False) == heads(slots=ALL) == {2}
    assert heads(num_head_channels=16) == {4}


@pytest.mark.parametrize("slots", [Slots(), ALL], ids=["attention_blocks", "transformers"])
def test_checkpointing_with_dropout_and_frozen_weights_does_not_change_gradients(slots) -> None:
    results = []
    for on in (False, True):
        model = randomised(small(slots=slots, dropout=0.3, use_checkpoint=on)).train()
        for name, p in model.named_parameters():
            p.requires_grad_("qkv" in name or "to_k" in name or "emb_layers" in name)
        torch.manual_seed(2)
        loss = model(*inputs(slots)).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_group_norms_use_the_kernels() -> None:
    model, given = randomised(small(slots=ALL)), inputs(ALL)
    with kernels.use("reference"):
        want = model(*given)
    near("reference", model(*given), want)


# --- contract -------------------------------------------------------------------------------------


def test_wiring_follows_the_conditioning() -> None:
    plain, wired = small(), small(slots=ALL, outputs=2)
    assert (plain.in_channels, plain.out_channels, plain.context_dim) == (4, 4, 0)
    assert plain.use_spatial_transformer is False and plain.adm_in_channels == 0
    assert (wired.in_channels, wired.out_channels, wired.context_dim) == (6, 8, 12)
    assert wired.use_spatial_transformer is True and wired.adm_in_channels == 10
    assert wired.wired(Z, ALL, 2) == wired


@pytest.mark.parametrize(
    ("z", "field", "rule"),
    [
        (Clip(4, 3, 4, 4), "frames", "1 "),
        (Clip(4, 1, 5, 4), "height", "a multiple of 2"),
        (Clip(4, 1, 4, 7), "width", "a multiple of 2"),
    ],
)
def test_latents_that_do_not_fit_are_refused_by_field(z, field, rule) -> None:
    with pytest.raises(SizeError, match=rule) as error:
        UNet2D.Config().grid(z)
    assert error.value.field == field
    model = UNet2D(small())
    with pytest.raises(SizeError):
        model(torch.zeros(1, *z.__dict__.values()), torch.zeros(1), Conditions())


def test_unsupported_conditions_are_refused() -> None:
    with pytest.raises(ConfigError, match="use_spatial_transformer=True, but False is needed"):
        small(use_spatial_transformer=True)
    with pytest.raises(ConfigError, match="in_channels=4, but 6 is needed"):
        small(slots=ALL, in_channels=4)
    with pytest.raises(ConfigError, match="unet2d: context has tokens for 3 frames"):
        small(slots=Slots(context=Tokens(8, 2, frames=3)))
    model, (z, t, _) = UNet2D(small()), inputs(Slots())
    for cond, problem in [
        (Conditions(context=torch.zeros(2, 5, 12)), "context_dim=0, but the inputs have 12"),
        (Conditions(vector=torch.zeros(2, 3)), "adm_in_channels=0, but the inputs have 3"),
        (Conditions(concat=torch.zeros_like(z)), "in_channels=4, but the inputs have 8"),
        (Conditions(scalars={"fps": t}), "takes no fps"),
    ]:
        with pytest.raises(ValueError, match=problem):
            model(z, t, cond)


def test_slots_that_settings_exclude_are_not_taken() -> None:
    assert UNet2D.Config().takes() == {"context", "vector", "concat"}
    assert UNet2D.Config(use_spatial_transformer=False).takes() == {"vector", "concat"}
    assert UNet2D.Config(context_dim=0, adm_in_channels=0).takes() == {"concat"}


def test_adapter_targets_are_layers_of_every_attention() -> None:
    for cfg in (small(), small(slots=ALL)):
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
def test_bad_settings_are_reported(settings, problem) -> None:
    (found,) = UNet2D.Config(**settings).problems()
    assert found.startswith(problem)


def test_an_incomplete_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.in_channels is null"):
        UNet2D(UNet2D.Config())


# --- clips ----------------------------------------------------------------------------------------

CLIP = Clip(4, 3, 8, 8)


@pytest.mark.parametrize("motion", ["vanilla", "grid"])
@pytest.mark.parametrize("slots", [Slots(), ALL], ids=["unconditional", "conditioned"])
@torch.no_grad()
def test_an_image_network_initially_processes_every_frame_separately(slots, motion) -> None:
    image = randomised(small(slots=slots))
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

    # float32 rounding of other batch sizes
    want = torch.cat([frame(i) for i in range(3)], 2)
    torch.testing.assert_close(video(z, t, cond), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_motion_modules_mix_frames() -> None:
    model = randomised(small(CLIP, motion_module="vanilla"))
    z, t = torch.randn(2, 4, 3, 8, 8), torch.tensor([10.0, 700.5])
    other = z.clone()
    other[:, :, 2] += 1
    assert not torch.equal(
        model(z, t, Conditions())[:, :, 0], model(other, t, Conditions())[:, :, 0]
    )


def test_blocks_of_a_motion_grid_must_fit_the_smallest_size() -> None:
    with pytest.raises(SizeError, match="height=6: want a multiple of 4"):
        UNet2D.Config(motion_module="grid").grid(Clip(4, 3, 6, 8))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"motion_module": "raft"}, "motion_module='raft': want one of"),
        ({"motion_heads": 0}, "motion_heads=0: want >= 1"),
        ({"motion_module": "vanilla", "motion_heads": 65}, "motion_heads=65: the motion mod"),
        ({"motion_block_size": 0}, "motion_block_size=0: want >= 1"),
    ],
)
def test_a_bad_motion_setting_is_reported(settings, problem) -> None:
    (found,) = UNet2D.Config(**settings).problems()
    assert found.startswith(problem)


def test_adapter_targets_reach_motion_modules() -> None:
    cfg = small(CLIP, motion_module="vanilla")
    modules = dict(UNet2D(cfg).named_modules())
    for target in cfg.adapter_targets():
        found = [m for n, m in modules.items() if n.endswith(f".{target}")]
        assert found and all(isinstance(m, nn.Linear | nn.Conv1d) for m in found), target
