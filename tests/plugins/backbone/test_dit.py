"""The latent video transformer: shapes, conditions, and which tokens attend to which."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from plugins._blocks.attention import CrossAttention
from plugins._blocks.embeddings import GridPositions, sinusoids, timestep_embedding
from plugins.backbone.dit import DiT
from sandbox.contracts import Clip, Conditions, ConfigError, SizeError, Slots, Tokens

Z = Clip(4, 3, 4, 6)
EVERYTHING = Slots(context=Tokens(12, 5, masked=True), concat=2, vector=10, scalars={"fps"})


def small(z: Clip = Z, slots: Slots | None = None, outputs: int = 1, **settings) -> DiT.Config:
    slots = slots or Slots()
    scalars = tuple(sorted(slots.scalars))
    sizes = {"width": 16, "num_blocks": 2, "time_features": 8, "scalars": scalars} | settings
    return DiT.Config(**sizes).wired(z, slots, outputs)


def randomised(cfg: DiT.Config) -> DiT:
    """A model without zero parameters, as after some training."""
    torch.manual_seed(0)
    model = DiT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.2
    return model


def inputs(cfg: DiT.Config, z: Clip = Z, batch: int = 2) -> tuple:
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    cond = Conditions(
        scalars={name: 20 + 10 * torch.rand(batch, generator=g) for name in cfg.scalars}
    )
    if cfg.context_dim:
        cond.context = normal(batch, 5, cfg.context_dim)
        cond.context_mask = torch.tensor([[True] * 5, [True, True, False, False, False]])[:batch]
    if cfg.vector_dim:
        cond.vector = normal(batch, cfg.vector_dim)
    if cfg.concat_channels:
        cond.concat = normal(batch, cfg.concat_channels, z.frames, z.height, z.width)
    t = torch.rand(batch, generator=g) * 1000
    return normal(batch, z.channels, z.frames, z.height, z.width), t, cond


def test_the_default_has_the_parameters_of_the_default_run():
    """0.325 M there, with the word table and 48 positions; here three tables of 32 rows."""
    cfg = DiT.Config().wired(Clip(32, 3, 4, 4), Slots(vector=64), 1)
    assert sum(p.numel() for p in DiT(cfg).parameters()) == 326_112


@pytest.mark.parametrize("attention", ["joint", "factorised"])
@pytest.mark.parametrize(("patch", "patch_t", "outputs"), [(1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("slots", [Slots(), EVERYTHING], ids=["unconditional", "everything"])
def test_output_has_the_size_of_the_latents(slots, patch, patch_t, outputs, attention):
    cfg = small(slots=slots, outputs=outputs, patch=patch, patch_t=patch_t, attention=attention)
    out = DiT(cfg)(*inputs(cfg))
    assert out.shape == (2, 4 * outputs, 3, 4, 6)


@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_the_initial_output_is_zero(attention):
    cfg = small(slots=EVERYTHING, attention=attention)
    assert not DiT(cfg)(*inputs(cfg)).any()


@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_every_block_starts_as_the_identity(attention):
    cfg = small(slots=EVERYTHING, attention=attention)
    model, x = DiT(cfg), torch.randn(2, 3, 24, 16)
    cond = inputs(cfg)[2]
    assert torch.equal(model.blocks[0](x, torch.randn(2, 16), cond.context, cond.context_mask), x)


@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_every_parameter_and_input_gets_a_gradient(attention):
    cfg = small(slots=EVERYTHING, attention=attention, max_frames=3, max_height=4, max_width=6)
    model, (z, t, cond) = randomised(cfg), inputs(cfg)
    given = [z, cond.context, cond.concat, cond.vector]
    for x in given:
        x.requires_grad_()
    model(z, t, cond).square().sum().backward()
    # Gradients that are zero up to rounding would be below 1e-6.
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None or grad.abs().max() < 1e-4]
    assert all(x.grad.any() for x in given)


def test_zero_initialised_layers_get_gradients_within_three_steps():
    cfg = small(slots=EVERYTHING, max_frames=3, max_height=4, max_width=6)
    model, (z, t, cond) = DiT(cfg), inputs(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(z, t, cond) - z).square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda z, t, cond: (z, t + 300, cond), "time"),
        (lambda z, t, cond: (z, t, replace(cond, vector=cond.vector + 1)), "vector"),
        (lambda z, t, cond: (z, t, replace(cond, context=cond.context + 1)), "context"),
        (lambda z, t, cond: (z, t, replace(cond, concat=cond.concat + 1)), "concat"),
        (lambda z, t, cond: (z, t, replace(cond, scalars={"fps": torch.tensor([5.0, 5])})), "fps"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_condition_changes_the_output(change, name):
    cfg = small(slots=EVERYTHING)
    model, given = randomised(cfg), inputs(cfg)
    assert not torch.allclose(model(*given), model(*change(*given)), atol=1e-3)


def test_clips_of_a_batch_are_independent():
    cfg = small(slots=EVERYTHING)
    model, (z, t, cond) = randomised(cfg), inputs(cfg)
    before = model(z, t, cond)[0]
    z, cond.context = z.clone(), cond.context.clone()
    z[1] += 1
    cond.context[1] += 1
    torch.testing.assert_close(model(z, t, cond)[0], before, rtol=0, atol=1e-5)


def test_masked_context_has_no_effect():
    cfg = small(slots=EVERYTHING)
    model, (z, t, cond) = randomised(cfg), inputs(cfg)
    before = model(z, t, cond)
    cond.context = cond.context.clone()
    cond.context[~cond.context_mask] = 100.0
    torch.testing.assert_close(model(z, t, cond), before, rtol=0, atol=1e-5)


def test_a_fully_masked_context_gives_finite_outputs():
    cfg = small(slots=EVERYTHING)
    model, (z, t, cond) = randomised(cfg), inputs(cfg)
    cond.context_mask[1] = False
    out = model(z, t, cond)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_context_tokens_have_no_order():
    layer, x, context = CrossAttention(16, 2, 12), torch.randn(2, 7, 16), torch.randn(2, 5, 12)
    order = torch.tensor([4, 2, 0, 1, 3])
    # float32 sums in another order
    torch.testing.assert_close(layer(x, context[:, order]), layer(x, context), rtol=0, atol=1e-5)


def permuted(model: DiT, axis: int, order: list[int]) -> float:
    """Largest difference between permuting an axis of z (2 frames, 3, 4) before and after."""
    z, t, cond = inputs(model.cfg)
    index = torch.tensor(order)
    after = model(z, t, cond).index_select(axis, index)
    return (model(z.index_select(axis, index), t, cond) - after).abs().max().item()


@pytest.mark.parametrize("attention", ["joint", "factorised"])
@pytest.mark.parametrize(("axis", "table"), [(2, "t"), (3, "h"), (4, "w")])
def test_only_the_position_table_of_an_axis_distinguishes_its_positions(axis, table, attention):
    model = randomised(small(attention=attention))
    order = torch.randperm(inputs(model.cfg)[0].shape[axis]).roll(1).tolist()
    order = order[::-1] if order == sorted(order) else order
    assert permuted(model, axis, order) > 1e-2
    torch.nn.init.zeros_(getattr(model.positions, table))
    assert permuted(model, axis, order) < 1e-4  # float32 sums in another order


def inputs_of(
    part: Callable[[Tensor], Tensor], shape: tuple[int, ...], at: tuple[int, int]
) -> Tensor:
    """(T, S) bool: tokens that the output at (frame, position) depends on."""
    x = torch.randn(1, *shape, requires_grad=True)
    (grad,) = torch.autograd.grad(part(x)[0, at[0], at[1]].sum(), x)
    return grad[0].abs().amax(-1) > 0


def test_factorised_attention_covers_a_frame_then_a_position():
    block = randomised(small(attention="factorised")).blocks[0]

    def spatial(x):
        return block.attn(x.flatten(0, 1)).view_as(x)

    frame, position = (torch.zeros(3, 4, dtype=torch.bool) for _ in range(2))
    frame[1], position[:, 2] = True, True
    assert torch.equal(inputs_of(spatial, (3, 4, 16), (1, 2)), frame)
    assert torch.equal(inputs_of(block.temporal, (3, 4, 16), (1, 2)), position)


@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_a_block_connects_all_tokens(attention):
    block = randomised(small(attention=attention)).blocks[0]
    c = torch.randn(1, 16)
    assert inputs_of(lambda x: block(x, c, None, None), (3, 4, 16), (1, 2)).all()


def test_temporal_attention_uses_the_kernels():
    cfg = small(attention="factorised")
    model, given = randomised(cfg), inputs(cfg)
    with kernels.use("reference"):
        want = model(*given)
    torch.testing.assert_close(model(*given), want, rtol=0, atol=1e-5)


def test_a_smaller_grid_uses_the_first_positions():
    positions = GridPositions((3, 4, 5), 6)
    full = positions(3, 4, 5).view(3, 4, 5, 6)
    assert torch.equal(positions(2, 3, 1).view(2, 3, 1, 6), full[:2, :3, :1])


def test_one_model_takes_clips_of_several_sizes_and_images():
    sizes = (Z, Clip(4, 1, 8, 8), Clip(4, 5, 2, 6))
    cfg = DiT.Config(width=16, patch=2)
    for z in sizes:
        cfg = cfg.wired(z, Slots(), 1)
    model = randomised(cfg)
    for z in sizes:
        given = inputs(cfg, z)
        assert model(*given).shape == given[0].shape


def test_wiring_is_idempotent():
    cfg = small(slots=EVERYTHING)
    assert cfg.wired(Z, EVERYTHING, 1) == cfg


def test_a_vector_as_wide_as_the_network_needs_no_layer():
    assert not list(DiT(small(slots=Slots(vector=16))).vector_in.parameters())
    assert DiT(small(slots=Slots(vector=10))).vector_in.weight.shape == (16, 10)


def test_gradient_checkpointing_does_not_change_gradients():
    results = []
    for on in (False, True):
        cfg = small(slots=EVERYTHING, attention="factorised", gradient_checkpointing=on)
        model = randomised(cfg)
        loss = model(*inputs(cfg)).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_bfloat16_is_near_float32(attention):
    cfg = small(slots=EVERYTHING, attention=attention)
    model, (z, t, cond) = randomised(cfg), inputs(cfg)
    want = model(z, t, cond)
    low = [x.bfloat16() for x in (cond.context, cond.concat, cond.vector)]
    cond = Conditions(low[0], cond.context_mask, None, *low[1:], cond.scalars)
    out = model.bfloat16()(z.bfloat16(), t, cond)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    # 8 bits of mantissa, about twenty roundings
    assert (out - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_autocast_to_bfloat16_is_near_float32(attention):
    cfg = small(slots=EVERYTHING, attention=attention)
    model, given = randomised(cfg), inputs(cfg)
    want = model(*given)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*given)
    out.float().sum().backward()
    assert (out - want).norm() < 0.05 * want.norm()  # as above


def test_it_runs_on_the_meta_device():
    cfg = small(slots=EVERYTHING)
    with torch.device("meta"):
        model = DiT(cfg)
        z = torch.empty(2, 4, 3, 4, 6)
        cond = Conditions(
            context=torch.empty(2, 5, 12),
            concat=torch.empty(2, 2, 3, 4, 6),
            vector=torch.empty(2, 10),
            scalars={"fps": torch.empty(2)},
        )
        assert model(z, torch.empty(2), cond).shape == z.shape


def test_adapter_targets_are_linear_layers_of_every_block():
    cfg = small(slots=EVERYTHING, attention="factorised")
    names = [n for n, m in DiT(cfg).named_modules() if isinstance(m, torch.nn.Linear)]
    for target in cfg.adapter_targets():
        assert all(
            any(f"blocks.{i}." in n and n.endswith(f".{target}") for n in names) for i in (0, 1)
        )
    assert cfg.adapter_targets() == ("to_qkv", "to_out", "to_q", "to_kv")
    assert small().adapter_targets() == ("to_qkv", "to_out")


@pytest.mark.parametrize("dim", [2, 3, 7, 33])
@pytest.mark.parametrize("embed", [sinusoids, timestep_embedding])
def test_embeddings_of_odd_width_equal_diffusers(embed, dim):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 500, 999])
    want = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embed(t, dim), want, rtol=0, atol=1e-4)
    assert dim % 2 == 0 or not embed(t, dim)[:, -1].any()


def test_sinusoids_start_at_one_radian_per_unit():
    features = sinusoids(torch.tensor([0.0, 2.0]), 4, max_period=100.0)
    want = [[1, 1, 0, 0], [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]]
    torch.testing.assert_close(features, torch.tensor(want))


def test_frames_are_padded_to_whole_patches():
    assert DiT.Config(patch_t=2).grid(Clip(4, 21, 8, 8)) == Clip(4, 22, 8, 8)


@pytest.mark.parametrize(
    ("settings", "z", "field", "rule"),
    [
        ({"patch": 3}, Clip(4, 3, 4, 6), "height", "a multiple of 3"),
        ({"patch": 4}, Clip(4, 3, 4, 6), "width", "a multiple of 4"),
        ({"max_frames": 2}, Z, "frames", "at most 2 \\(max_frames=2 patches of 1\\)"),
        ({"patch": 2, "max_width": 2}, Z, "width", "at most 4 \\(max_width=2 patches of 2\\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused_by_field(settings, z, field, rule):
    with pytest.raises(SizeError, match=rule) as e:
        DiT.Config(**settings).wired(z, Slots(), 1)
    assert e.value.field == field


def test_stated_numbers_are_checked_against_the_wiring():
    with pytest.raises(ConfigError) as e:
        DiT.Config(in_channels=16, context_dim=8).wired(Z, Slots(vector=16), 1)
    assert e.value.problems == (
        "in_channels=16, but 4 is needed",
        "context_dim=8, but 0 is needed",
    )


def test_scalars_are_needed_where_they_are_named():
    cfg = DiT.Config(scalars=("fps",))
    assert cfg.needs() == {"fps"} and "fps" in cfg.takes()
    assert not DiT.Config().needs() and DiT.Config().takes() == {"context", "vector", "concat"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"width": 65}, "width=65: want a multiple of num_heads=2"),
        ({"width": 0}, "width=0: want >= 1"),
        ({"num_heads": 0}, "num_heads=0: want >= 1"),
        ({"num_blocks": 0}, "num_blocks=0: want >= 1"),
        ({"patch": 0}, "patch=0: want >= 1"),
        ({"max_frames": 0}, "max_frames=0: want >= 1"),
        (
            {"attention": "axial"},
            "attention='axial': want one of ['joint', 'factorised', 'spatial', 'causal']",
        ),
        ({"skips": "unet"}, "skips='unet': want one of ['none', 'uvit']"),
        (
            {"motion_module": "raft"},
            "motion_module='raft': want one of ['none', 'vanilla', 'grid']",
        ),
        (
            {"motion_module": "vanilla"},
            "motion_module='vanilla': attention=joint already mixes frames; want "
            "attention=spatial, or none",
        ),
        (
            {"width": 48, "attention": "spatial", "motion_module": "grid"},
            "width=48: want a multiple of 32, or motion_module=none",
        ),
        (
            {"attention": "spatial", "motion_module": "grid", "motion_heads": 65},
            "motion_heads=65: the motion module on 64 channels is 0 wide; want an even width",
        ),
        ({"motion_block_size": 0}, "motion_block_size=0: want >= 1"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan: want > 0 and <= 64"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01: want at least 1 / width, 0.016"),
        ({"time_features": 1}, "time_features=1: want >= 2"),
        ({"context_dim": -1}, "context_dim=-1: want >= 0"),
        ({"scalars": ("fps", "fps")}, "scalars=['fps', 'fps']: want each name once"),
        (
            {"scalars": ("speed",)},
            "scalars='speed': want one of "
            "['aspect_ratio', 'fps', 'frame_stride', 'height', 'ofs', 'width']",
        ),
    ],
)
def test_bad_settings_are_reported(settings, problem):
    assert list(DiT.Config(**settings).problems()) == [problem]


def test_default_settings_have_no_problems():
    assert not list(DiT.Config().problems())


def test_an_incomplete_config_is_refused():
    with pytest.raises(ValueError, match=r"backbone\.in_channels is null"):
        DiT(DiT.Config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, c: (z[:, :3], c), r"have shape \(2, 3, 3, 4, 6\): want \(B, 4, T, H, W\)"),
        (lambda z, c: (z[:, :, 0], c), r"latents have shape \(2, 4, 4, 6\)"),
        (lambda z, c: (z, replace(c, vector=None)), r"vector_dim=10, but the inputs have 0"),
        (lambda z, c: (z, replace(c, context=None)), r"context_dim=12, but the inputs have 0"),
        (lambda z, c: (z, replace(c, concat=c.concat[:, :1])), r"concat_channels=2, but .* 1"),
        (lambda z, c: (z, replace(c, scalars={})), r"scalars=\['fps'\], but the inputs have \[\]"),
        (lambda z, c: (z, replace(c, image_context=c.context)), r"takes no image_context"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    cfg = small(slots=EVERYTHING)
    z, t, cond = inputs(cfg)
    z, cond = change(z, cond)
    with pytest.raises(ValueError, match=message):
        DiT(cfg)(z, t, cond)


def test_frames_that_are_not_whole_patches_are_refused():
    cfg = small(patch_t=3)
    with pytest.raises(SizeError, match="frames=4: want a multiple of patch_t=3"):
        DiT(cfg)(torch.randn(1, 4, 4, 4, 6), torch.zeros(1), Conditions())


# from images to clips

MOVING = {"attention": "spatial", "width": 32, "motion_heads": 2}


@pytest.mark.parametrize("motion", ["vanilla", "grid"])
@torch.no_grad()
def test_an_image_network_initially_processes_clips_frame_by_frame(motion):
    """The image network has joint attention. Images train temporal position 0 only, which spatial
    attention uses for all frames.
    """
    clips = DiT(small(slots=EVERYTHING, motion_module=motion, skips="uvit", num_blocks=3, **MOVING))
    assert len(clips.skips) == 1
    image = randomised(small(slots=EVERYTHING, width=32, num_blocks=3))
    missing, unexpected = clips.load_state_dict(image.state_dict(), strict=False)
    assert missing and all("skips." in k or ".motion." in k for k in missing) and not unexpected
    z, t, cond = inputs(image.cfg)
    frames = [
        image(z[:, :, i : i + 1], t, replace(cond, concat=cond.concat[:, :, i : i + 1]))
        for i in range(z.shape[2])
    ]
    # matrix products of other sizes: float32 rounding
    torch.testing.assert_close(clips(z, t, cond), torch.cat(frames, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"motion_module": "none", "skips": "none"}])
def test_unused_additions_have_no_weights(settings):
    names = DiT(small(**settings)).state_dict()
    assert not [k for k in names if "motion" in k or "skips" in k]


@pytest.mark.parametrize(("motion", "mixes"), [("none", False), ("vanilla", True), ("grid", True)])
@torch.no_grad()
def test_with_spatial_attention_only_motion_modules_mix_frames(motion, mixes):
    model = randomised(small(motion_module=motion, **MOVING))
    z, t, cond = inputs(model.cfg)
    other = z.clone()
    other[:, :, 2] += 1
    assert torch.equal(model(z, t, cond)[:, :, 0], model(other, t, cond)[:, :, 0]) != mixes


def test_motion_modules_and_skips_start_at_zero_and_get_gradients():
    model = DiT(small(motion_module="vanilla", skips="uvit", num_blocks=3, **MOVING))
    zero = {
        "skips.0.weight",
        "skips.0.bias",
        *(
            f"blocks.{i}.motion.temporal_transformer.proj_out.{p}"
            for i in range(3)
            for p in ("weight", "bias")
        ),
    }
    assert all(not p.any() for n, p in model.named_parameters() if n in zero)
    model = randomised(model.cfg)
    model(*inputs(model.cfg)).square().mean().backward()
    ours = [(n, p) for n, p in model.named_parameters() if "motion" in n or "skips" in n]
    assert all(p.grad is not None and p.grad.any() for _, p in ours)


def test_adapter_targets_of_motion_modules_are_linear_layers_too():
    cfg = small(slots=EVERYTHING, motion_module="vanilla", **MOVING)
    modules = dict(DiT(cfg).named_modules())
    for target in cfg.adapter_targets():
        found = [m for n, m in modules.items() if n.endswith(f".{target}")]
        assert found and all(isinstance(m, torch.nn.Linear) for m in found), target


def test_blocks_of_a_motion_grid_must_fit():
    with pytest.raises(SizeError, match="height=6: want a multiple of 4"):
        small(motion_module="grid", patch=2, z=Clip(4, 3, 8, 8), **MOVING).grid(Clip(4, 3, 6, 8))
