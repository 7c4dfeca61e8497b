"""The EasyAnimateV2 transformer: recorded outputs, published names and sizes, its contract."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import kernels
from plugins._blocks.motion import MotionModule, frame_sinusoids
from plugins._blocks.skips import apply_blocks, long_skips
from plugins.backbone.easyanimate import (
    Block,
    EasyAnimate,
    from_pixart,
    from_published,
    to_published,
)
from sandbox.contracts import Clip, Conditions, Misfit, Slots, Tokens
from tests.golden_easyanimate import GOLDEN, by_rule, facts, near, recorded, stored_weights
from tests.helpers import preset

Z = Clip(4, 3, 4, 8)
MOTION = {"Vanilla": "vanilla", "VanillaGrid": "grid"}
TRANSFORMERS = (
    "transformer_v1_grid_2l",
    "transformer_v2_2l_microcond",
    "transformer_v2_28l",
    "transformer_v2_28l_image_nonsquare",
)


@pytest.fixture(autouse=True)
def eager():
    """Fixtures were recorded with the plain implementation."""
    with kernels.use("eager"):
        yield


def motion_of(kwargs: dict) -> dict:
    return {
        "motion_heads": kwargs["num_attention_heads"],
        "motion_depth": kwargs["num_transformer_block"],
        "motion_attentions": len(kwargs["attention_block_types"]),
        "motion_positions": kwargs["temporal_position_encoding"],
        "motion_max_frames": kwargs["temporal_position_encoding_max_len"],
        "motion_dim_div": kwargs["temporal_attention_dim_div"],
        "motion_block_size": kwargs["block_size"],
    }


def config_of(published: dict) -> EasyAnimate.Config:
    """Our Config for the original config."""
    names = EasyAnimate.Config.__dataclass_fields__
    return EasyAnimate.Config(
        **{k: v for k, v in published.items() if k in names},
        motion_module=MOTION[published["motion_module_type"]],
        **motion_of(published["motion_module_kwargs"]),
        vector_dim=0,
    )


@cache
def golden(name: str) -> EasyAnimate:
    spec = facts(name)
    model = EasyAnimate(config_of(spec["config"])).eval()
    model.load_state_dict(by_rule(model, spec["weight_seed"]))
    return model


def run(name: str) -> tuple[Tensor, dict[int, Tensor], dict[str, Tensor]]:
    """The output for a fixture's inputs, the outputs of all blocks, and the fixture."""
    model, tensors = golden(name), recorded(name)
    scalars = {}
    if "in.resolution" in tensors:
        height, width = tensors["in.resolution"].unbind(1)
        scalars = {
            "height": height,
            "width": width,
            "aspect_ratio": tensors["in.aspect_ratio"][:, 0],
        }
    cond = Conditions(
        tensors["in.encoder_hidden_states"],
        tensors["in.encoder_attention_mask"].bool(),
        scalars=scalars,
    )
    outputs: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, n=n: outputs.update({n: out.flatten(1, 3)}))
        for n, block in enumerate(model.transformer_blocks)
    ]
    with torch.no_grad():
        out = model(tensors["in.hidden_states"], tensors["in.timestep"], cond)
    for hook in hooks:
        hook.remove()
    return out, outputs, tensors


# recorded outputs


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_outputs_equal_the_original(name) -> None:
    out, outputs, tensors = run(name)
    for key, want in tensors.items():
        if key.startswith("out.block"):
            near(key, outputs[int(key.removeprefix("out.block"))], want)
    near("sample", out, tensors["out.sample"])


@pytest.mark.parametrize("name", ["motion_vanilla", "motion_grid2"])
@torch.no_grad()
def test_motion_modules_equal_the_original(name) -> None:
    spec, tensors = facts(name), recorded(name)
    kwargs = spec["motion_module_kwargs"]
    module = MotionModule(
        spec["in_channels"], kwargs["num_attention_heads"], block_size=kwargs["block_size"]
    )
    module.load_state_dict(stored_weights(name))
    out = module(tensors["in.hidden_states"].permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
    near(name, out, tensors["out.hidden_states"])


@torch.no_grad()
def test_a_block_equals_the_original() -> None:
    spec, tensors = facts("block_vanilla"), recorded("block_vanilla")
    sizes = {k: v for k, v in spec["config"].items() if k.endswith(("_heads", "head_dim"))}
    block = Block(EasyAnimate.Config(**sizes, caption_channels=32, motion_max_frames=32))
    block.load_state_dict(stored_weights("block_vanilla"))
    clip = (spec["num_frames"], spec["height"], spec["width"])
    x, text = tensors["in.hidden_states"].unflatten(1, clip), tensors["in.encoder_hidden_states"]
    bias = tensors["in.encoder_attention_bias"].squeeze(1)
    out = block(x, tensors["in.timestep_6d"], text, bias)
    near("block", out.flatten(1, 3), tensors["out.hidden_states"])


# published names and sizes


@pytest.mark.parametrize("name", ["easyanimate_v2", "easyanimate_v1"])
def test_presets_have_the_published_names_and_shapes(name) -> None:
    cfg = preset("backbone", name).wired(Clip(4, 48, 64, 64), Slots(Tokens(4096, 120, True)), 2)
    with torch.device("meta"):
        model = EasyAnimate(cfg)
    manifest = json.loads((GOLDEN / "easyanimate_v2_transformer.json").read_text())
    want = {k: tuple(shape) for k, (shape, _) in manifest.items()}
    if name == "easyanimate_v1":
        want = {k: v for k, v in want.items() if "long_connect_fc" not in k}
    state = to_published(model.state_dict())
    assert {k: tuple(v.shape) for k, v in state.items()} == want
    if name == "easyanimate_v2":
        assert sum(p.numel() for p in model.parameters()) == 1_446_296_864


def test_published_files_round_trip() -> None:
    model = EasyAnimate(small())
    ours = model.state_dict()
    published = to_published(ours, max_frames=16)
    tables = [v for k, v in published.items() if k.endswith("pos_encoder.pe")]
    assert len(tables) == 8 and torch.equal(tables[0], frame_sinusoids(16, 64)[None])
    back = from_published(published)
    assert back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)
    model.load_state_dict(published)  # loading accepts the tables too


def test_other_unknown_names_are_refused() -> None:
    model = EasyAnimate(small())
    state = to_published(model.state_dict(), 16)
    key = next(k for k in state if k.endswith("pos_encoder.pe"))
    with pytest.raises(RuntimeError, match=r"pos_encoder\.other"):
        model.load_state_dict(state | {key.replace(".pe", ".other"): torch.zeros(1)})


# an image network


def image_network() -> EasyAnimate:
    torch.manual_seed(1)
    return EasyAnimate(small(enable_uvit=False, motion_module="none", out_channels=4))


@torch.no_grad()
def test_an_image_network_initially_processes_every_frame_separately() -> None:
    image, video = image_network(), EasyAnimate(small(out_channels=4))
    state, unused = from_pixart(image.state_dict(), video.state_dict())
    video.load_state_dict(state)
    z, t, cond = inputs()
    frames = [image(frame[:, :, None], t, cond) for frame in z.unbind(2)]
    assert not unused
    torch.testing.assert_close(video(z, t, cond), torch.cat(frames, 2), atol=1e-5, rtol=1e-5)


def test_new_input_channels_are_zero_and_a_larger_output_repeats() -> None:
    image, video = image_network(), EasyAnimate(small(in_channels=9, out_channels=8))
    old = image.state_dict()
    state, _ = from_pixart(old, video.state_dict())
    patches = state["pos_embed.proj.weight"]
    assert torch.equal(patches[:, :4], old["pos_embed.proj.weight"]) and not patches[:, 4:].any()
    assert torch.equal(state["proj_out.weight"], old["proj_out.weight"].repeat(2, 1))
    assert torch.equal(state["proj_out.bias"], old["proj_out.bias"].repeat(2))


def test_weights_that_do_not_fit_are_returned_as_unused() -> None:
    video = EasyAnimate(small()).state_dict()
    other = {"caption_projection.linear_1.weight": torch.ones(64, 7), "unknown": torch.ones(1)}
    state, unused = from_pixart(other, video)
    assert unused == list(other)
    assert all(state[k] is video[k] for k in video)


# the contract


def small(**settings) -> EasyAnimate.Config:
    sizes = {"in_channels": 4, "out_channels": 8, "caption_channels": 12, "vector_dim": 0}
    return EasyAnimate.Config(**({"patch_size": 2} | sizes | settings))


def inputs(cfg: EasyAnimate.Config | None = None, z: Clip = Z) -> tuple[Tensor, Tensor, Conditions]:
    g = torch.Generator().manual_seed(2)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    cond = Conditions(torch.randn(2, 5, 12, generator=g), mask)
    latents = torch.randn(2, z.channels, z.frames, z.height, z.width, generator=g)
    return latents, torch.tensor([10.0, 700.5]), cond


def randomised(cfg: EasyAnimate.Config) -> EasyAnimate:
    """A model without zero parameters, as after some training."""
    torch.manual_seed(0)
    model = EasyAnimate(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.1
    return model


@torch.no_grad()
def test_masked_text_has_no_effect() -> None:
    model, (z, t, cond) = randomised(small()), inputs()
    other = cond.context.clone()
    other[1, 2:] += 1
    assert torch.equal(model(z, t, cond), model(z, t, replace(cond, context=other)))


@pytest.mark.parametrize(("kind", "mixes"), [("none", False), ("vanilla", True), ("grid", True)])
@torch.no_grad()
def test_only_motion_modules_mix_frames(kind, mixes) -> None:
    model, (z, t, cond) = randomised(small(motion_module=kind)), inputs()
    other = z.clone()
    other[:, :, 2] += 1
    assert torch.equal(model(z, t, cond)[:, :, 0], model(other, t, cond)[:, :, 0]) != mixes


@torch.no_grad()
def test_a_grid_attends_to_its_block_only() -> None:
    module = MotionModule(32, block_size=2).requires_grad_(False)
    module.temporal_transformer.proj_out.weight.normal_()
    module.temporal_transformer.norm = torch.nn.Identity()  # the norm covers the full frame
    x = torch.randn(1, 2, 4, 4, 32)
    other = x.clone()
    other[:, 1, 1, 1] += 1
    changed = (module(x) != module(other)).any(-1)[0, 0]
    want = torch.zeros(4, 4, dtype=torch.bool)
    want[:2, :2] = True
    assert torch.equal(changed, want)


@torch.no_grad()
def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for on in (False, True):
        model = randomised(small(gradient_checkpointing=on))
        with torch.enable_grad():
            model(*inputs()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 28, 29])
def test_skips_pair_blocks_from_both_ends(depth) -> None:
    with torch.device("meta"):
        count = len(long_skips(depth, 4))
    used = []

    def skip(n: int):
        return lambda kept: used.append((int(kept[0]), n)) or torch.zeros_like(kept)

    def block(i: int):
        return lambda x: torch.full_like(x, i)

    apply_blocks([block(i) for i in range(depth)], [skip(n) for n in range(count)], torch.zeros(1))
    assert used == [(count - 1 - n, n) for n in range(count)]
    assert count == (13 if depth == 28 else (depth - 1) // 2)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"motion_module": "raft"}, "motion_module='raft': want one of"),
        ({"num_layers": 0}, "num_layers=0: want >= 1"),
        ({"sample_size": 1, "patch_size": 2}, "sample_size=1: want >= 2"),
        (
            {"num_attention_heads": 3, "attention_head_dim": 5},
            "attention_head_dim=5: 3 heads make a width of 15",
        ),
        (
            {"attention_head_dim": 10},
            "attention_head_dim=10: 4 heads make a width of 40: want a multiple of",
        ),
        ({"sample_size": 128}, "attention_head_dim=16: 4 heads make a width of 64: want a mul"),
        ({"motion_heads": 65}, "motion_heads=65: the motion module on 64 channels is 0 wide"),
        ({"norm_eps": float("nan")}, "norm_eps=nan: want"),
        ({"vector_dim": -1}, "vector_dim=-1: want >= 0"),
    ],
)
def test_a_bad_setting_is_reported(settings, problem) -> None:
    problems = list(EasyAnimate.Config(**settings).problems())
    assert any(p.startswith(problem) for p in problems), problems


def test_defaults_have_no_problems() -> None:
    assert not list(EasyAnimate.Config().problems())


@pytest.mark.parametrize(
    ("settings", "z", "rule"),
    [
        ({}, Clip(4, 3, 5, 4), "height=5: want a multiple of 2"),
        ({"motion_module": "grid"}, Clip(4, 3, 4, 6), "width=6: want a multiple of 4"),
        ({"motion_max_frames": 2}, Z, "frames=3: want at most motion_max_frames=2"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(settings, z, rule) -> None:
    with pytest.raises(Misfit) as error:
        small(**settings).grid(z)
    assert str(error.value) == rule


def test_the_largest_size_needs_micro_conditions() -> None:
    cfg = small(sample_size=128)
    assert cfg.needs() == {"height", "width", "aspect_ratio"}
    assert not small().needs()


def test_inputs_that_do_not_match_the_settings_are_refused() -> None:
    z, t, cond = inputs()
    model = EasyAnimate(small())
    for wrong, message in (
        (replace(cond, context=None), "caption_channels=12, but the inputs have 0"),
        (replace(cond, vector=torch.zeros(2, 3)), "vector_dim=0, but the inputs have 3"),
        (replace(cond, scalars={"fps": torch.ones(2)}), r"\['fps'\]: want \[\]"),
        (replace(cond, image_context=torch.zeros(2, 1, 1, 3)), "takes no image_context"),
        (replace(cond, concat=torch.zeros(2, 1, 3, 4, 8)), "latents have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(z, t, wrong)
