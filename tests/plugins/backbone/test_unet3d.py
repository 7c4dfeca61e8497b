"""The video UNet against recorded outputs of the original code, its size and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kernels
from plugins._blocks.unet import ResBlock, TemporalConvBlock
from plugins._blocks.unet_attention import (
    SpatialTransformer,
    TemporalAttention,
    TemporalTransformer,
    TextImageAttention,
)
from plugins.backbone.unet3d import UNet3D
from sandbox.contracts import Clip, Conditions, ConfigError, Misfit, Slots, Tokens
from tests.helpers import preset

GOLDEN = Path(__file__).parents[2] / "golden/dynamicrafter"
TEXT = 77  # text tokens, the first ones in the original context
Z = Clip(4, 3, 4, 2)
ALL = Slots(
    context=Tokens(8, 5, masked=True),
    image_context=Tokens(8, 2, frames=3),
    concat=4,
    vector=6,
    scalars=frozenset({"fps"}),
)


# --- recorded outputs -----------------------------------------------------------------------------


def filled(spec: dict) -> dict[str, Tensor]:
    """Weights from the table of the golden folder; see its README."""
    table = load_file(GOLDEN / "weights_table.safetensors")["table"]
    state = {}
    for key, (shape, offset, scale, shift) in spec.items():
        index = (offset + torch.arange(torch.Size(shape).numel())) % len(table)
        state[key] = (table[index] * scale + shift).view(shape)
    return state


def near(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Reruns of the original differ by about 2e-6, other orders of summation by a bit more."""
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert got.shape == want.shape and error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def golden() -> tuple[dict, dict[str, Tensor], UNet3D]:
    spec = json.loads((GOLDEN / "unet3d.json").read_text())
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["config"].items()}
    model = UNet3D(UNet3D.Config(**sizes))
    model.load_state_dict(filled(spec["weights"]))
    tensors = load_file(GOLDEN / "unet3d.safetensors")
    return spec, {k: v.float() for k, v in tensors.items()}, model.eval()


def recorded(tensors: dict[str, Tensor], context: str, fs: bool = True) -> Conditions:
    """Splits the original context: text tokens, then image tokens per frame or for all frames."""
    text, image = tensors[f"in/context_{context}"].tensor_split([TEXT], 1)
    frames = tensors["in/x"].shape[2] if context == "perframe" else 1
    scalars = {"fps": tensors["in/fs"]} if fs else {}
    return Conditions(text, image_context=image.unflatten(1, (frames, -1)), scalars=scalars)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "context", "fs"),
    [
        ("perframe_fs", "perframe", True),
        ("shared_fs", "shared", True),
        ("perframe_default_fs", "perframe", False),
        ("perframe_fs_timesteps_flipped", "perframe", True),
    ],
)
def test_outputs_equal_the_original(golden, name, context, fs) -> None:
    _, tensors, model = golden
    t = tensors["in/timesteps"].flip(0) if "flipped" in name else tensors["in/timesteps"]
    out = model(tensors["in/x"], t, recorded(tensors, context, fs))
    near(name, out, tensors[f"out/{name}"])


def test_all_gradients_equal_the_original(golden) -> None:
    spec, tensors, model = golden
    model.zero_grad()
    out = model(tensors["in/x"], tensors["in/timesteps"], recorded(tensors, "perframe"))
    loss = (out - tensors["in/grad_target"]).square().mean()
    assert loss.item() == pytest.approx(spec["grad_check"]["loss_value"], rel=1e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    # below 1e-6: zero up to rounding
    assert norms == pytest.approx(spec["grad_check"]["grad_l2"], rel=1e-3, abs=1e-6)


def over_frames(block: TemporalTransformer):
    """Applies the block to (B, C, T, H, W)."""

    def run(x: Tensor) -> Tensor:
        b, _, t = x.shape[:3]
        return block(x.transpose(1, 2).flatten(0, 1), t).unflatten(0, (b, t)).transpose(1, 2)

    return run


HEADS = (64, 4, 8)
BLOCKS = {  # name: the block, and how to call it with the recorded inputs
    "resblock_tconv": (
        lambda: ResBlock(64, 24, 64, temporal_conv=TemporalConvBlock(64)),
        lambda block: lambda x, emb: block(x, emb, 4),
    ),
    "temporal_conv": (lambda: TemporalConvBlock(64), lambda block: block),
    "tt_linear": (lambda: TemporalTransformer(*HEADS, use_linear=True), over_frames),
    "tt_conv1d": (lambda: TemporalTransformer(*HEADS), over_frames),
    "tt_relpos": (
        lambda: TemporalTransformer(*HEADS, use_linear=True, max_distance=5),
        over_frames,
    ),
    "tt_causal": (lambda: TemporalTransformer(*HEADS, use_linear=True, causal=True), over_frames),
    "spatial_ip": (
        lambda: SpatialTransformer(
            *HEADS, context_dim=12, use_linear=True, image_cross_attention=True
        ),
        lambda block: lambda x, c: block(x, c[:, :TEXT], image=c[:, TEXT:]),
    ),
    "spatial_noip": (
        lambda: SpatialTransformer(*HEADS, context_dim=12),
        lambda block: lambda x, c: block(x, c[:, :TEXT]),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_and_their_gradients_equal_the_original(name) -> None:
    spec = json.loads((GOLDEN / "blocks.json").read_text())
    tensors = load_file(GOLDEN / "blocks.safetensors")
    facts = spec["blocks"][name]
    make, run = BLOCKS[name]
    block = make().eval()
    block.load_state_dict(filled(spec["weights"][name]))
    x, *others = (tensors[key] for key in facts["inputs"].values())
    out = run(block)(x, *others)
    near(name, out, tensors[facts["output"]])
    # scaled by 0.01, the inputs show the eps of the group norm
    small = run(block)(x * 0.01, *others)
    near(f"{name}_smallx", small, tensors[facts["output"] + "_smallx"])
    out.pow(3).mean().backward()
    norms = {n: p.grad.norm().item() for n, p in block.named_parameters()}
    assert norms == pytest.approx(facts["grad_l2_of_mean_cube"], rel=1e-3, abs=1e-6)


# --- the published size ---------------------------------------------------------------------------


def empty(name: str) -> UNet3D:
    with torch.device("meta"):
        return UNet3D(preset("backbone", name))


@pytest.fixture(scope="module")
def published() -> UNet3D:
    return empty("unet3d_dynamicrafter_512")


def test_preset_has_the_published_names_and_shapes(published) -> None:
    want = json.loads((GOLDEN / "unet3d_512_keys.json").read_text())
    state = published.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == want
    assert len(state) == 1516 and sum(v.numel() for v in state.values()) == 1_438_854_980


def test_preset_has_the_published_parts(published) -> None:
    def count(part: type[nn.Module]) -> int:
        found = [m for n, m in published.named_modules() if isinstance(m, part) and "init" not in n]
        return sum(p.numel() for m in found for p in m.parameters())

    assert count(SpatialTransformer) == 299_188_160
    assert count(TemporalTransformer) == 272_850_880
    assert count(TemporalConvBlock) == 266_891_520
    assert sum(p.numel() for p in published.init_attn.parameters()) == 5_580_736


def test_preset_has_the_published_heads(published) -> None:
    """Names and shapes do not show them."""
    heads = {
        name.partition(".transformer_blocks")[0]: m.num_heads
        for name, m in published.named_modules()
        if hasattr(m, "num_heads")
    }
    widths = {name: published.get_submodule(name).norm.num_channels for name in heads}
    assert heads.pop("init_attn.0") == 8
    assert len(heads) == 32 and all(widths[name] == 64 * n for name, n in heads.items())


def test_the_first_temporal_attention_is_never_causal() -> None:
    """As published; it has relative positions if the others have them."""
    cfg = small(**EVERYTHING)
    with torch.device("meta"):
        model = UNet3D(cfg)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TemporalAttention)}
    assert all(m.has_positions for m in layers.values())
    assert all(m.causal != name.startswith("init_attn") for name, m in layers.items())


def test_presets_of_other_sizes_differ_as_published(published) -> None:
    large, small = (preset("backbone", f"unet3d_dynamicrafter_{n}") for n in (1024, 256))
    assert large == published.cfg
    names = set(empty("unet3d_dynamicrafter_256").state_dict()) - set(published.state_dict())
    assert len(names) == 16 and all(name.endswith(".attn2.alpha") for name in names)
    assert small.default_fs == 3


def test_presets_match_the_conditioning_of_dynamicrafter(published) -> None:
    slots = Slots(Tokens(1024, 77), Tokens(1024, 16, frames=16), 4, scalars=frozenset({"fps"}))
    assert published.cfg.wired(Clip(4, 16, 40, 64), slots, 1) == published.cfg
    assert published.cfg.wired(Clip(4, 16, 72, 128), slots, 1) == published.cfg
    want = {"context", "image_context", "concat", "fps", "frame_stride"}
    assert published.cfg.takes() == want


# --- function ------------------------------------------------------------------------------------


def small(z: Clip = Z, slots: Slots | None = None, outputs: int = 1, **settings) -> UNet3D.Config:
    # With 32 channels each group of a norm would have one channel, which hides the time.
    slots = slots or Slots()
    settings = {"num_heads": 2, "fs_condition": bool(slots.scalars)} | settings
    return UNet3D.Config(**settings).wired(z, slots, outputs)


def randomised(cfg: UNet3D.Config) -> UNet3D:
    """A model without zero parameters, as after some training."""
    torch.manual_seed(0)
    model = UNet3D(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.03
    return model.eval()


def inputs(slots: Slots, z: Clip = Z) -> tuple[Tensor, Tensor, Conditions]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    cond = Conditions(scalars={name: torch.tensor([8.0, 24.0]) for name in slots.scalars})
    if slots.context:
        cond.context = normal(2, 5, slots.context.width)
        cond.context_mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    if slots.image_context:
        cond.image_context = normal(2, z.frames, 2, slots.image_context.width)
    if slots.vector:
        cond.vector = normal(2, slots.vector)
    if slots.concat:
        cond.concat = normal(2, slots.concat, z.frames, z.height, z.width)
    shape = (2, z.channels, z.frames, z.height, z.width)
    return normal(*shape), torch.tensor([10.0, 700.5]), cond


EVERYTHING = {
    "temporal_conv": True,
    "tempspatial_aware": True,
    "addition_attention": True,
    "num_head_channels": 16,
    "image_cross_attention_scale_learnable": True,
    "use_causal_attention": True,
    "use_linear": True,
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["small", "everything"])
@pytest.mark.parametrize("slots", [Slots(), Slots(vector=6), ALL], ids=["none", "vector", "all"])
def test_output_has_the_size_of_the_latents(slots, settings) -> None:
    model = UNet3D(small(slots=slots, outputs=2, **settings))
    assert model(*inputs(slots)).shape == (2, 8, 3, 4, 2)


def test_the_initial_output_is_zero_and_later_every_parameter_gets_a_gradient() -> None:
    model, given = UNet3D(small(slots=ALL, **EVERYTHING)), inputs(ALL)
    assert not model(*given).any()
    model = randomised(model.cfg)
    model(*given).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("time", lambda z, t, cond: (z, t + 100, cond)),
        ("vector", lambda z, t, cond: (z, t, replace(cond, vector=cond.vector + 1))),
        ("text", lambda z, t, cond: (z, t, replace(cond, context=cond.context + 1))),
        ("image", lambda z, t, cond: (z, t, replace(cond, image_context=cond.image_context + 1))),
        ("concat", lambda z, t, cond: (z, t, replace(cond, concat=cond.concat + 1))),
        ("fps", lambda z, t, cond: (z, t, replace(cond, scalars={"fps": t}))),
    ],
)
def test_every_condition_changes_the_output(name, change) -> None:
    model, given = randomised(small(slots=ALL)), inputs(ALL)
    assert (model(*given) - model(*change(*given))).abs().max() > 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_any_number_of_frames_works(frames) -> None:
    """Even above `temporal_length`, with relative positions and a causal mask."""
    cfg = small(slots=ALL, **EVERYTHING)
    z = replace(Z, frames=frames)
    slots = replace(ALL, image_context=Tokens(8, 2, frames=frames))
    assert cfg.temporal_length == 3 and cfg.wired(z, slots, 1) == cfg
    assert randomised(cfg)(*inputs(slots, z)).isfinite().all()


@torch.no_grad()
def test_a_frame_attends_to_its_own_image_tokens() -> None:
    model = randomised(small(slots=ALL, temporal_attention=False))
    z, t, cond = inputs(ALL)
    before = model(z, t, cond)
    cond.image_context = cond.image_context.clone()
    cond.image_context[:, 1] += 1
    changed = (model(z, t, cond) - before).abs().amax((0, 1, 3, 4))
    assert changed[1] > 1e-3 and changed[0] == changed[2] == 0


@torch.no_grad()
def test_shared_tokens_equal_repeated_tokens() -> None:
    model, (z, t, cond) = randomised(small(slots=ALL)), inputs(ALL)
    cond.image_context = cond.image_context[:, :1]
    want = model(z, t, cond)
    repeated = replace(
        cond,
        image_context=cond.image_context.expand(-1, 3, -1, -1),
        context=cond.context[:, None].expand(-1, 3, -1, -1),
    )
    near("repeated", model(z, t, repeated), want)


@torch.no_grad()
def test_image_tokens_for_another_number_of_frames_are_refused() -> None:
    slots = replace(ALL, image_context=Tokens(8, 2, frames=16))
    with pytest.raises(ConfigError, match="for 16 frames, but the latents have 3"):
        small(slots=slots)
    model, (z, t, cond) = UNet3D(small(slots=ALL)), inputs(ALL)
    cond.image_context = torch.zeros(2, 16, 2, 8)
    with pytest.raises(ValueError, match="image_context has tokens for 16 frames, but z_t has 3"):
        model(z, t, cond)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"use_relative_position": True}, {"temporal_conv": True}])
def test_frames_have_an_order(settings) -> None:
    """From relative positions or convolutions; without both, shuffling commutes."""
    off = {"use_relative_position": False, "temporal_conv": False}
    order = torch.tensor([1, 2, 0])

    def shuffled(cfg: UNet3D.Config) -> float:
        model, (z, t, cond) = randomised(cfg), inputs(Slots())
        return (model(z[:, :, order], t, cond) - model(z, t, cond)[:, :, order]).abs().max().item()

    assert shuffled(small(**off)) < 1e-5  # float32 sums in another order
    assert shuffled(small(**off | settings)) > 1e-3


@torch.no_grad()
def test_default_fs_replaces_a_missing_fps() -> None:
    model, (z, t, cond) = randomised(small(slots=ALL, default_fs=7)), inputs(ALL)
    sevens = torch.full((2,), 7.0)
    want = model(z, t, replace(cond, scalars={"fps": sevens}))
    assert torch.equal(model(z, t, replace(cond, scalars={})), want)
    assert torch.equal(model(z, t, replace(cond, scalars={"frame_stride": sevens})), want)


@torch.no_grad()
def test_masked_context_has_no_effect() -> None:
    model, (z, t, cond) = randomised(small(slots=ALL)), inputs(ALL)
    before = model(z, t, cond)
    cond.context = cond.context.masked_fill(~cond.context_mask[..., None], 100.0)
    torch.testing.assert_close(model(z, t, cond), before, rtol=0, atol=1e-5)


def test_checkpointing_with_dropout_and_frozen_weights_does_not_change_gradients() -> None:
    results = []
    for on in (False, True):
        cfg = small(slots=ALL, **EVERYTHING, dropout=0.3, use_checkpoint=on)
        model = randomised(cfg).train()
        for name, p in model.named_parameters():
            p.requires_grad_("to_k" in name or "temopral" in name or "emb_layers" in name)
        torch.manual_seed(2)
        loss = model(*inputs(ALL)).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_norms_and_temporal_attention_use_the_kernels() -> None:
    model = randomised(small(slots=ALL, **EVERYTHING, use_relative_position=False))
    given = inputs(ALL)
    with kernels.use("reference"):
        want = model(*given)
    near("reference", model(*given), want)


# --- temporal attention ---------------------------------------------------------------------------


def frames(count: int) -> Tensor:
    return torch.randn(2, count, 3, 16, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_zero_relative_positions_have_no_effect(causal) -> None:
    layer = TemporalAttention(16, 2, 8, causal, max_distance=4)
    plain = TemporalAttention(16, 2, 8, causal)
    for name in ("relative_position_k", "relative_position_v"):
        nn.init.zeros_(getattr(layer, name).embeddings_table)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "relative" not in k})
    near("plain", layer(frames(5)), plain(frames(5)))


@torch.no_grad()
@pytest.mark.parametrize("max_distance", [0, 2])
def test_causal_attention_does_not_use_later_frames(max_distance) -> None:
    layer, x = TemporalAttention(16, 2, 8, True, max_distance), frames(5)
    later = x.clone()
    later[:, 3:] += 1
    changed = (layer(later) - layer(x)).abs().amax((0, 2, 3))
    assert changed[:3].max() < 1e-6 < 1e-3 < changed[3:].min()  # float32 rounding


@torch.no_grad()
def test_distances_beyond_the_limit_share_the_last_position() -> None:
    positions = TemporalAttention(16, 2, 8, max_distance=2).relative_position_k
    table = positions.embeddings_table
    assert torch.equal(positions(5)[0], table[[2, 3, 4, 4, 4]])
    assert torch.equal(positions(5)[4], table[[0, 0, 0, 1, 2]])


@torch.no_grad()
def test_a_learnable_scale_starts_at_one_and_can_double_the_image_part() -> None:
    layer = TextImageAttention(16, 2, 8, 12, learnable_scale=True)
    plain = TextImageAttention(16, 2, 8, 12, learnable_scale=False)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "alpha"})
    x, text, image = torch.randn(2, 5, 16), torch.randn(2, 4, 12), torch.randn(2, 3, 12)
    want = plain(x, text, None, image)
    assert torch.equal(layer(x, text, None, image), want)
    layer.alpha.fill_(20.0)
    plain.to_v_ip.weight.mul_(2)
    near("doubled", layer(x, text, None, image), plain(x, text, None, image))


# --- contract -------------------------------------------------------------------------------------


def test_wiring_follows_the_conditioning() -> None:
    plain, wired = small(), small(slots=ALL, outputs=2)
    assert (plain.in_channels, plain.out_channels, plain.context_dim) == (4, 4, 0)
    assert plain.image_cross_attention is False and plain.adm_in_channels == 0
    assert (wired.in_channels, wired.out_channels, wired.context_dim) == (8, 8, 8)
    assert wired.image_cross_attention is True and wired.adm_in_channels == 6
    assert wired.temporal_length == 3 and wired.wired(Z, ALL, 2) == wired


def test_slots_that_settings_exclude_are_not_taken() -> None:
    every = {"context", "image_context", "vector", "concat"}
    assert UNet3D.Config().takes() == every
    assert UNet3D.Config(fs_condition=True).takes() == every | {"fps", "frame_stride"}
    assert UNet3D.Config(context_dim=0, adm_in_channels=0).takes() == {"concat"}
    assert UNet3D.Config(image_cross_attention=False).takes() == every - {"image_context"}


@pytest.mark.parametrize(
    ("slots", "settings", "problem"),
    [
        (Slots(concat=4), {"in_channels": 4}, "in_channels=4, but 8 is needed"),
        (Slots(), {"image_cross_attention": True}, "image_cross_attention=True, but False is nee"),
        (Slots(image_context=Tokens(8, 2)), {}, "unet3d: image_context without context"),
        (Slots(Tokens(8, 2), Tokens(6, 2)), {}, "unet3d: image_context is 6 wide and context 8"),
        (Slots(Tokens(8, 2, frames=2)), {}, "unet3d: context has tokens for 2 frames, but the"),
        (Slots(scalars=frozenset({"fps", "frame_stride"})), {}, "fs_condition=True: want fps or"),
    ],
)
def test_wiring_refuses_what_does_not_fit(slots, settings, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        small(slots=slots, **settings)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"context": torch.zeros(2, 5, 12)}, "context_dim=0, but the inputs have 12"),
        ({"vector": torch.zeros(2, 3)}, "adm_in_channels=0, but the inputs have 3"),
        ({"concat": torch.zeros(2, 4, 3, 4, 2)}, "in_channels=4, but the inputs have 8"),
        (
            {"image_context": torch.zeros(2, 1, 2, 8)},
            "image_cross_attention=False, but .* an",
        ),
        ({"scalars": {"fps": torch.zeros(2)}}, "scalars \\['fps'\\]: want none"),
    ],
)
def test_forward_refuses_inputs_that_do_not_match(given, problem) -> None:
    model, (z, t, _) = UNet3D(small()), inputs(Slots())
    with pytest.raises(ValueError, match=problem):
        model(z, t, Conditions(**given))


@pytest.mark.parametrize(("field", "z"), [("height", (4, 3, 5, 4)), ("width", (4, 3, 4, 7))])
def test_latents_that_do_not_fit_are_refused_by_field(field, z) -> None:
    with pytest.raises(Misfit, match="a multiple of 2") as error:
        UNet3D.Config().grid(Clip(*z))
    assert error.value.field == field


def test_adapter_targets_are_layers_of_every_attention() -> None:
    cfg = small(slots=ALL)
    names = [n for n, m in UNet3D(cfg).named_modules() if isinstance(m, nn.Linear)]
    for target in cfg.adapter_targets():
        assert sum(n.endswith(f".{target}") for n in names) >= 4
    assert "to_k_ip" in cfg.adapter_targets() and "to_k_ip" not in small().adapter_targets()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_channels": 0}, "model_channels=0: want a multiple of 32"),
        ({"channel_mult": (1, 0)}, "channel_mult=[1, 0]: want at least one level, each >= 1"),
        ({"attention_resolutions": (4,)}, "attention_resolutions=[4]: want some of [1, 2], by fac"),
        ({"num_heads": 5}, "num_heads=5: want a divisor of all widths with attention, [64]"),
        ({"num_head_channels": 0}, "num_head_channels=0: want a divisor of all widths with atte"),
        ({"temporal_dropout": 1.0}, "temporal_dropout=1.0: want 0 to 0.99"),
        ({"temporal_length": 0}, "temporal_length=0: want >= 1"),
        ({"temporal_selfatt_only": False}, "temporal_selfatt_only=False: want one of [True]"),
        ({"addition_attention": True}, "addition_attention=True: want num_head_channels > 0"),
        ({"image_cross_attention": True, "context_dim": 0}, "image_cross_attention=True: want con"),
    ],
)
def test_bad_settings_are_reported(settings, problem) -> None:
    (found,) = UNet3D.Config(**settings).problems()
    assert found.startswith(problem)


def test_an_incomplete_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.out_channels is null"):
        UNet3D(UNet3D.Config(in_channels=4))
    with pytest.raises(ValueError, match=r"backbone\.temporal_length is null"):
        UNet3D(UNet3D.Config(in_channels=4, out_channels=4))
