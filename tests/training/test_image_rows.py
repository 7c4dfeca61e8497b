"""Rows of an image logger: known regions are kept, and missing rows are left out."""

from dataclasses import replace

import pytest
import torch

from sandbox import build, compose
from sandbox.config import registry
from sandbox.evaluation.evaluate import first_clips
from sandbox.training.image_rows import NOISE_LEVELS, ROWS, image_rows
from tests.helpers import TINY

CLIPS = 3
TINY_STEPS = 2  # of sampling, in a tiny system
VQ = ("vae=vq", "vae.ch=8", "vae.scale_factor=2", "vae.shift=0.1", "data.frames=1")


def system(*overrides: str):
    given = {o.partition("=")[0] for o in overrides}
    tiny = (o for o in TINY if o.partition("=")[0] not in given)
    return build(compose(*tiny, *overrides)).eval()


@pytest.fixture(scope="module")
def found():
    made = system(*VQ)
    return image_rows(made, tuple(ROWS), CLIPS)


def test_every_row_has_every_clip(found):
    assert set(found) == set(ROWS)
    for row in found.values():
        assert all(x.shape == (CLIPS, 3, 1, 16, 16) for x in row.values())
        assert all(x.abs().max() <= 1 for x in row.values())
    assert len(found["diffusion_row"]) == NOISE_LEVELS + 1
    assert len(found["progressive_row"]) == TINY_STEPS + 1


def test_noise_grows_along_the_diffusion_row():
    """With the identity for a first stage a decoded latent is the latent."""
    made = system("vae=identity", "backbone.patch=4", "data.frames=1", "schedule=ddpm",
                  "sampler=ddim")  # fmt: skip
    first, *noisy = image_rows(made, ("diffusion_row",), CLIPS)["diffusion_row"].values()
    errors = [(x - first).square().mean().item() for x in noisy]
    assert errors == sorted(errors)


def test_the_progressive_row_ends_in_the_sample():
    """Without noise in the last step the last estimate is the sample."""
    made = system("vae=identity", "backbone.patch=4", "data.frames=1", "schedule=ddpm",
                  "sampler=ddim")  # fmt: skip
    chain = replace(registry.default("sampler", "ddpm"), steps=7)
    row = image_rows(made, ("progressive_row",), CLIPS, chain)["progressive_row"]
    assert len(row) == NOISE_LEVELS + 1
    assert not torch.equal(next(iter(row.values())), row["sample"])
    assert torch.equal([*row.values()][-2], row["sample"])


def test_filling_in_keeps_what_is_known_and_no_more():
    """With the identity for a first stage known pixels come back, up to the last step's noise."""
    made = system("vae=identity", "backbone.patch=4", "data.frames=1", "sampler.steps=20")
    real = first_clips(registry.create(made.root.data).split("val"), CLIPS, 0).video
    rows = image_rows(made, ("samples_inpainting", "samples_outpainting"), CLIPS)
    middle = torch.zeros(16, 16, dtype=torch.bool)
    middle[4:12, 4:12] = True
    for name, known in (("samples_inpainting", ~middle), ("samples_outpainting", middle)):
        apart = (rows[name]["filled"] - real).abs().mean((0, 1, 2))
        assert apart[known].mean() < 0.2 < apart[~known].mean(), name


def test_without_a_codebook_nothing_is_quantised():
    made = system()
    rows = image_rows(made, ("samples_x0_quantized", "reconstruction"), 2)
    assert set(rows) == {"reconstruction"}


def test_weights_stay_as_they_are(found):
    made = system(*VQ)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    image_rows(made, ("samples_inpainting",), 2)
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())
