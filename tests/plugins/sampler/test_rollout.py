"""Causal attention with cached keys, and sampling of videos that are longer than those trained."""

from dataclasses import replace

import pytest
import torch

from plugins._blocks.frame_cache import FrameCache
from plugins.backbone.dit import DiT
from sandbox.config.wiring import wire
from sandbox.contracts import Conditions, ConfigError
from sandbox.model.latent_diffusion import prompts_batch
from tests.helpers import composed, sampled, train

CAUSAL = DiT.Config(
    width=16, num_blocks=3, num_heads=2, attention="causal", max_frames=3, in_channels=2,
    out_channels=2, context_dim=0, vector_dim=0, concat_channels=0, time_features=8, max_height=4,
    max_width=4,
)  # fmt: skip
SMALL = ("backbone.width=16", "backbone.num_blocks=2", "backbone.attention=causal",
         "vae.weights=null", "vae.fit_clips=16", "data.clips_per_epoch=16", "data.batch_size=4",
         "method=diffusion_forcing", "sampler=rollout", "sampler.steps=2", "steps=2",
         "logger=null")  # fmt: skip


@pytest.fixture
def net() -> DiT:
    """A network in float64 without zero layers, whose frames see two frames before them."""
    made = DiT(CAUSAL).double().eval()
    g = torch.Generator().manual_seed(0)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    return made


def frames(count: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, count, 4, 4, generator=g, dtype=torch.float64)


@torch.no_grad()
def test_a_frame_sees_itself_and_the_frames_of_its_window(net):
    z, t = frames(9), torch.full((2, 9), 400.0)
    before = net(z, t, Conditions())
    changed = z.clone()
    changed[:, :, 4] += 1
    moved = (net(changed, t, Conditions()) - before).abs().amax((0, 1, 3, 4)) > 1e-9
    # Three blocks with a window of three frames: six later frames at most.
    assert moved.tolist() == [False] * 4 + [True] * 5
    one = DiT(replace(CAUSAL, num_blocks=1)).double()
    for p in one.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    moved = (one(changed, t, Conditions()) - one(z, t, Conditions())).abs().amax((0, 1, 3, 4))
    assert (moved > 1e-9).tolist() == [False] * 4 + [True] * 3 + [False] * 2


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_cached_frames_equal_a_full_pass_at_every_chunk(net, chunk):
    clean, past = frames(20), FrameCache()
    for first in range(0, 20, chunk):
        part = frames(chunk, seed=first + 1)  # the noisy chunk after clean frames
        t = torch.full((2, chunk), 700.0)
        cached = net(part, t, Conditions(past=past.of(["full"])))
        z = torch.cat((clean[:, :, :first], part), 2)
        times = torch.cat((torch.zeros(2, first), t), 1)
        full = net(z, times, Conditions())[:, :, first:]
        assert (cached - full).abs().max() <= 1e-12
        with past.writing(chunk):
            own = clean[:, :, first : first + chunk]
            net(own, torch.zeros(2, chunk), Conditions(past=past.of(["full"])))
    assert past.frames == 20


@torch.no_grad()
def test_memory_is_flat_over_the_length(net):
    past, held = FrameCache(), []
    for i in range(60):
        with past.writing(1):
            net(frames(1, i), torch.zeros(2, 1), Conditions(past=past.of(["full"])))
        held.append(past.elements())
    assert len({*held[1:]}) == 1  # two frames in each of three blocks
    assert held[-1] == 3 * 2 * (2 * 2 * 16 * 16)


@torch.no_grad()
def test_passes_have_caches_of_their_own(net):
    together, apart = FrameCache(), FrameCache()
    for i in range(4):
        a, b = frames(1, i), frames(1, 100 + i)
        t = torch.zeros(2, 1)
        with together.writing(1):
            both = net(torch.cat((a, b)), t.repeat(2, 1), Conditions(past=together.of("ab")))
        with apart.writing(1):
            alone = [net(x, t, Conditions(past=apart.of(p))) for x, p in ((a, "a"), (b, "b"))]
        assert torch.allclose(both, torch.cat(alone), atol=1e-12)


def test_one_chunk_is_full_sequence_sampling(tmp_path):
    words = [w for w in SMALL if not w.startswith("sampler")]
    euler = train(wire(composed(*words, "sampler=euler", "sampler.steps=2")), tmp_path / "a")
    rolled = train(wire(composed(*SMALL, "sampler.chunk=16")), tmp_path / "b")
    assert torch.allclose(sampled(euler.system), sampled(rolled.system), atol=1e-5)


def test_a_longer_video_than_trained_is_sampled(tmp_path):
    system = train(wire(composed(*SMALL, "sampler.chunk=2")), tmp_path).system.eval()
    clip = system.wiring.clips[0]
    long = replace(clip, frames=5 * clip.frames)
    video = system.sample(prompts_batch(["a red 3 moving left"]), long)
    assert video.shape[2] == 5 * clip.frames and video.isfinite().all()


BAD = {
    "joint": (("backbone.attention=joint",), "use backbone=dit backbone.attention=causal"),
    "other": (("backbone=unet3d", "backbone.model_channels=32"), "frames see later ones"),
    "patches": (("backbone.patch_t=2",), "patch_t=2: want 1 with attention=causal"),
    "odd": (("backbone.width=6", "backbone.num_heads=2"), "even number of channels per head"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_needs_a_causal_network(name):
    changed, message = BAD[name]
    names = {w.partition("=")[0] for w in changed}
    words = [w for w in SMALL if w.partition("=")[0] not in names]
    if name == "other":
        words = [w for w in words if not w.startswith("backbone.")]
    with pytest.raises(ConfigError, match=message):
        wire(composed(*words, *changed))
