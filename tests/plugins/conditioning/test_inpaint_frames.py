"""conditioning=inpaint_frames: masks, latents of known frames, prompts, sampling."""

from dataclasses import replace

import pytest
import torch

from plugins._configs.frame_masks import frames_per_latent, places
from plugins.conditioning.inpaint_frames import KINDS, InpaintFrames, packed
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Batch, Clip, ConfigError
from sandbox.data.loader import batches
from sandbox.evaluation.evaluate import generate
from sandbox.evaluation.prompts import data_batch, user_batch
from sandbox.reports.media import write_video
from sandbox.training.build import build_system
from tests.helpers import TINY, composed
from tests.inputs import draws, tensor, video
from tests.training_sessions import record

CLIP = Clip(3, 9, 16, 16)
COUNT = 600
BASE = [o for o in TINY if not o.startswith("conditioning")]
FRAMES = ("conditioning=inpaint_frames",)


def module(**settings) -> InpaintFrames:
    return InpaintFrames(InpaintFrames.Config(frames=9, **settings))


def only(kind: str, **settings) -> InpaintFrames:
    return module(**{name: float(name == kind) for name in KINDS}, **settings)


def known(conditioner: InpaintFrames, frames: int = 9) -> torch.Tensor:
    return conditioner.draw(draws(COUNT), COUNT, frames)


def mixing(pixels: torch.Tensor, name: str) -> torch.Tensor:
    """A first stage in which every latent frame sees all pixel frames."""
    return pixels[:, :1, :, ::4, ::4] + pixels.mean((1, 2), keepdim=True)[..., ::4, ::4]


def concat(conditioner, pixels, z0=None, drop=None, encode=mixing, **fields):
    count = len(pixels if pixels is not None else fields["image"])
    batch = Batch(pixels, ids=[""] * count, **fields)
    grid = Clip(1, 9, 4, 4)
    return conditioner(batch, grid, drop or {}, draws(count), encode, z0).concat


# --- masks ----------------------------------------------------------------------------------------


def test_prediction_knows_any_number_of_first_frames_and_backward_of_last_ones():
    first, last = known(only("prediction")), known(only("backward"))
    assert set(first.sum(1).tolist()) == set(range(1, 9))
    assert (first[:, 1:] <= first[:, :-1]).all()
    assert (last[:, 1:] >= last[:, :-1]).all() and last[:, -1].all() and not last[:, 0].any()


def test_interpolation_knows_both_ends_and_scattered_masks_any_frames():
    both = known(only("interpolation"))
    assert both[:, [0, -1]].all() and not both[:, 4].any()
    assert torch.equal(both, both.flip(1))
    any_ = known(only("scattered"))
    assert 0.3 < any_.float().mean() < 0.6
    assert any_.any(0).all() and (~any_).any(0).all()
    assert any_.float().std(0).min() > 0.4  # no frame is special


def test_at_least_one_frame_is_unknown_and_max_known_bounds_the_ends():
    for kind in KINDS:
        for frames in (2, 3, 9):
            assert not known(only(kind), frames).all(1).any()
    assert set(known(only("prediction", max_known=3)).sum(1).tolist()) == {1, 2, 3}
    assert set(known(only("interpolation", max_known=2)).sum(1).tolist()) == {2, 4}


def test_kinds_are_drawn_by_their_weights():
    drawn = known(module(prediction=3.0, interpolation=0.0, backward=1.0, scattered=0.0))
    starts = drawn[:, 0].float().mean().item()
    assert starts == pytest.approx(0.75, abs=0.06)


def test_dropping_has_its_probability():
    dropped = module(drop_frames=0.3).drop(draws(4000))["frames"]
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)


# --- latents --------------------------------------------------------------------------------------


def test_channels_are_latents_of_the_masked_clip_and_the_mask():
    pixels = video(CLIP, 3)
    found = concat(module(known=(0, 3)), pixels)
    assert found.shape == (3, 2, 9, 4, 4)
    mask = torch.zeros(9).index_fill(0, torch.tensor([0, 3]), 1.0).view(1, 9, 1, 1)
    assert torch.equal(found[:, 1], mask.expand(3, 9, 4, 4))
    assert torch.equal(found[:, :1], mixing(pixels * mask, ""))


@pytest.mark.parametrize("z0", [None, tensor(40, 1, 9, 4, 4)])
def test_unknown_frames_leak_through_no_first_stage(z0):
    one = video(CLIP, 1).expand(40, -1, -1, -1, -1)
    first = concat(module(), one, z0)
    mask = first[:, 1, :, :1, :1].bool()  # (B, T, 1, 1)
    other = torch.where(mask[:, None], one, video(CLIP, 40, seed=5))
    assert torch.equal(first, concat(module(), other, z0))
    assert not torch.equal(first, concat(module(), one.flip(2), z0))


def test_dropped_clips_have_no_known_frame():
    drop = {"frames": torch.tensor([True, False])}
    found = concat(module(), video(CLIP, 2), tensor(2, 1, 9, 4, 4), drop)
    assert not found[0].any() and found[1, 1].any()


def test_a_latent_frame_has_the_masks_of_its_frames():
    k = torch.tensor([[True] * 6 + [False] * 3])
    assert packed(k, 9, 1).tolist() == [k.tolist()]
    assert packed(k, 3, 3).mT.tolist() == [[[True] * 3, [True] * 3, [False] * 3]]
    causal = packed(k, 3, 4).mT  # the first frame four times, then groups of four
    assert causal.tolist() == [[[True] * 4, [True] * 4, [True, False, False, False]]]
    assert packed(k[:, :1], 1, 4).tolist() == [[[True]] * 4]  # an image


def test_latents_are_padded_as_those_of_the_clip():
    batch = Batch(video(CLIP, 2), ids=["a", "b"])
    found = module(mask_channels=1)(batch, Clip(1, 10, 4, 4), {}, draws(2), mixing, None).concat
    assert found.shape == (2, 2, 10, 4, 4)
    assert torch.equal(found[:, :, 0], found[:, :, 1])


@pytest.mark.parametrize(
    ("frames", "latent", "group"),
    [(9, 9, 1), (9, 3, 4), (49, 13, 4), (8, 2, 4), (16, 4, 4), (17, 5, 4), (1, 1, 1), (9, 2, 8),
     (15, 5, 3), (9, 4, 3)],
)  # fmt: skip
def test_groups_of_frames_are_those_of_usual_first_stages(frames, latent, group):
    assert frames_per_latent(frames, latent) == group


def test_the_number_of_mask_channels_is_derived_or_given():
    assert wired().conditioning.mask_channels == 4  # 9 frames become 3
    root = wired("conditioning.mask_channels=3")
    assert root.conditioning.mask_channels == 3 and root.backbone.concat_channels == 32 + 3
    with pytest.raises(ConfigError, match=r"mask_channels=2: 9 frames become 3 .*want at least 3"):
        wired("conditioning.mask_channels=2")


# --- settings and prompts -------------------------------------------------------------------------


def test_places_count_from_both_ends():
    assert places((-1, 0), 9) == (0, 8)
    for wrong, message in (
        ((9,), r"known=\[9\]: a clip has 9 frames; want -9 to 8"),
        ((0, -9), "names a frame twice"),
        (tuple(range(9)), "all of 9 frames"),
    ):
        with pytest.raises(ConfigError, match=message):
            wire(composed(*BASE, *FRAMES, f"conditioning.known={list(wrong)}"))


def test_a_mix_without_weights_is_an_error():
    cfg = InpaintFrames.Config(**dict.fromkeys(KINDS, 0.0))
    assert any("must be more than 0" in p for p in cfg.problems())


def test_images_are_frames_at_their_places():
    given = video(CLIP, 2)[:, :, [0, 8]]
    full = torch.zeros(2, 3, 9, 16, 16)
    full[:, :, [0, 8]] = given
    of_images = concat(module(known=(0, -1)), None, image=given)
    assert torch.equal(of_images, concat(module(known=(0, -1)), full))
    with pytest.raises(ValueError, match="the batch has 1 images"):
        concat(module(known=(0, -1)), None, image=given[:, :, :1])


def wired(*overrides: str):
    return wire(composed(*BASE, *FRAMES, *overrides)).root


def test_known_frames_of_prompts_are_those_of_validation_clips():
    root = wired("conditioning.known=[0,1,-1]")
    clips = next(batches(registry.create(root.data).split("val"), 3, root.seed))
    batch = data_batch(root, (), 3)
    assert torch.equal(batch.image, clips.video[:, :, [0, 1, 8]])
    assert batch.captions == [""] * 3


def test_known_frames_come_from_files(tmp_path):
    root = wired("conditioning.known=[0,1,-1]")
    grey = torch.linspace(-1, 1, 9).view(1, 9, 1, 1).expand(3, 9, 16, 16)
    write_video(tmp_path / "clip.mp4", grey, 8.0)
    write_video(tmp_path / "known.mp4", grey[:, [0, 1, 8]], 8.0)
    write_video(tmp_path / "short.mp4", grey[:, :5], 8.0)
    paths = [str(tmp_path / f"{name}.mp4") for name in ("clip", "known")]
    batch = user_batch(root, [], videos=paths)
    assert batch.image.shape == (2, 3, 3, 16, 16)
    want = grey[0, [0, 1, 8], 0, 0]
    assert torch.allclose(batch.image.mean((1, 3, 4)), want.expand(2, 3), atol=0.05)
    with pytest.raises(ConfigError, match="has 5 frames: want the 3 known ones, or the 9 of a"):
        user_batch(root, [], videos=[str(tmp_path / "short.mp4")])
    with pytest.raises(ConfigError, match=r"task.images=\[a.png\]: .* does not use this image"):
        user_batch(root, [], images=["a.png"])
    (tmp_path / "no.mp4").write_text("x")
    with pytest.raises(ConfigError, match=r"task.videos\[0\]=.*no.mp4: cannot be decoded"):
        user_batch(root, [], videos=[str(tmp_path / "no.mp4")])


@pytest.mark.parametrize("known", [(0,), (0, -1)])
def test_the_ends_are_images_of_prompts(known):
    assert InpaintFrames.Config(known=known).images() == ("start", "end")[: len(known)]


# --- systems --------------------------------------------------------------------------------------


def test_a_run_trains_and_samples_depend_on_known_frames_alone(tmp_path):
    root = wired("guidance=cfg", "steps=3", "callbacks=[val_loss]", "callbacks.val_loss.every=3",
                 "callbacks.val_loss.times=2")  # fmt: skip
    assert 3 in record(root, tmp_path).states
    system = build_system(wire(root)).eval()
    for layer in (system.backbone.patch_out, system.backbone.modulation):  # they begin with zeros
        torch.nn.init.normal_(layer.weight)
    clips = next(batches(registry.create(root.data).split("val"), 2, root.seed))
    full = generate(system, clips)
    images = replace(clips, video=None, image=clips.video[:, :, :1])
    assert torch.allclose(full, generate(system, images), atol=1e-5)
    other = replace(images, image=-images.image)
    assert not torch.allclose(full, generate(system, other), atol=1e-3)


@pytest.mark.parametrize("vae", ["identity", "slice", "cogvideox"])
def test_first_stages_with_and_without_temporal_compression_train(vae):
    frames = {"slice": 9, "cogvideox": 9, "identity": 9}[vae]
    own = [o for o in BASE if not o.startswith("vae")]
    weights = () if vae == "identity" else ("vae.weights=null",)
    wiring = wire(composed(*own, *FRAMES, f"vae={vae}", *weights, f"data.frames={frames}"))
    system = build_system(wiring)
    batch = next(batches(registry.create(wiring.root.data).split("val"), 2, 0))
    terms = system.step(batch, system.draws(batch))
    assert terms.total.isfinite()
    terms.total.backward()
    assert system.backbone.patch_in.weight.grad is not None
