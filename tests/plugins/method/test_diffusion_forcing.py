"""Noise levels for each frame: training and sampling."""

import pytest
import torch

from plugins.sampler.pyramid import frame_levels
from sandbox import build, compose
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError
from tests.helpers import composed, sampled, train
from tests.inputs import batch

SMALL = ("backbone.width=16", "backbone.num_blocks=2", "vae.weights=null", "vae.fit_clips=16",
         "data.clips_per_epoch=16", "data.batch_size=4", "steps=2", "sampler.steps=3",
         "logger=null")  # fmt: skip


def step(*words: str) -> torch.Tensor:
    """The losses (B,) of one training step."""
    wiring = wire(composed(*SMALL, *words))
    system, clips = build(wiring.root), batch(wiring, 4)
    for p in system.backbone.parameters():  # the output layer starts at zero
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return system.step(clips, system.draws(clips)).per_sample.detach()


def test_without_independent_clips_it_is_denoising_bit_for_bit():
    shared = step("method=diffusion_forcing", "method.independent=0")
    assert torch.equal(step("method=denoising"), shared)


def test_only_independent_clips_differ_from_denoising():
    denoising, half = step(), step("method=diffusion_forcing", "method.independent=0.5")
    differs = (denoising - half).abs() > 1e-4
    assert 0 < differs.sum() < 4


@pytest.mark.parametrize("backbone", ["dit", "unet3d", "cogvideox"])
@pytest.mark.parametrize("schedule", ["flow", "ddpm"])
def test_it_trains_and_samples(backbone, schedule, tmp_path):
    sizes = {
        "dit": SMALL[:2],
        "unet3d": ("backbone.model_channels=32",),
        "cogvideox": ("backbone.num_layers=1",),
    }
    words = (*sizes[backbone], *SMALL[2:], "method=diffusion_forcing", "sampler=pyramid",
             f"backbone={backbone}", f"schedule={schedule}")  # fmt: skip
    run = train(wire(composed(*words)), tmp_path)
    assert len(run.losses) == 2
    assert sampled(run.system).isfinite().all()


def test_a_delay_of_zero_denoises_all_frames_together():
    assert frame_levels(3, 2, 0).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_a_delay_of_all_steps_denoises_frame_after_frame():
    assert frame_levels(2, 2, 2).tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]]


def test_a_delay_between_makes_a_pyramid():
    assert frame_levels(3, 2, 1).tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0], [2, 2, 1], [2, 2, 2]]


def test_all_frames_together_are_an_euler_run(tmp_path):
    together = train(wire(composed(*SMALL, "sampler=pyramid", "sampler.delay=0")), tmp_path / "a")
    euler = train(wire(composed(*SMALL)), tmp_path / "b")
    torch.testing.assert_close(sampled(together.system), sampled(euler.system))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["backbone=unet2d", "method=diffusion_forcing"], "use backbone=.*dit"),
        (["backbone.patch_t=2", "sampler=pyramid"], "sampler=pyramid gives each frame its own"),
        (["schedule=ddpm", "loss=ldm", "method=diffusion_forcing"], "loss=ldm takes .*loss=mse"),
        (["method=diffusion_forcing", "method.independent=2"], r"method\.independent=2"),
    ],
)
def test_what_does_not_fit_is_refused(words, match):
    with pytest.raises(ConfigError, match=match):
        compose(*words)
