"""Patch PCA: exactness, optimality, the causal first frame, and determinism of the fit."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from plugins.vae.pca import PatchPCA
from sandbox.contracts import Clip, Misfit

COLOURS = np.array(
    [[1, 0.1, 0.1], [1, 0.9, 0.1], [0.1, 0.9, 0.1], [0.1, 0.9, 1], [0.15, 0.25, 1], [1, 0.1, 0.9]]
)


def moving_digits(number: int, seed: int, held_out: bool = False) -> Tensor:
    """Coloured digits that move by a pixel a frame: (number, 3, 9, 16, 16) in [-1, 1]."""
    images = load_digits().images / 16
    order = np.random.RandomState(0).permutation(len(images))
    images = images[order[1497:] if held_out else order[:1497]]
    rng, out = np.random.default_rng(seed), np.zeros((number, 3, 9, 16, 16), np.float32)
    for clip in out:
        image, colour = images[rng.integers(len(images))], COLOURS[rng.integers(6)]
        across, backwards, lane = rng.integers(2), rng.integers(2), rng.integers(2, 7)
        for t in range(9):
            along = 8 - t if backwards else t
            y, x = (lane, along) if across else (along, lane)
            clip[:, t, y : y + 8, x : x + 8] = colour[:, None, None] * image
    return torch.from_numpy(out * 2 - 1)


def through(model: PatchPCA, x: Tensor) -> Tensor:
    return model.decode(model.scaled(model.encode(x).mean))


def fitted(x: Tensor, **settings: int) -> PatchPCA:
    model = PatchPCA(PatchPCA.Config(**settings))
    model.fit(x)
    return model


def test_default_keeps_24_db_of_moving_digits() -> None:
    model, x = fitted(moving_digits(1024, 0)), moving_digits(192, 1, held_out=True)
    error = (through(model, x).clamp(-1, 1) - x).square().mean()
    # measured 24.3 dB; other clips move it by about 0.1
    assert 10 * torch.log10(4 / error) == pytest.approx(24.3, abs=0.3)


def test_all_components_reconstruct_exactly() -> None:
    x = torch.rand(16, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = fitted(x, components=12, patch=2, group=1)
    # float32 products of 12 numbers
    torch.testing.assert_close(through(model, x), x, rtol=0, atol=1e-5)


def test_reconstruction_error_is_the_variance_of_the_dropped_components() -> None:
    x = torch.randn(64, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = x.view(64, 3, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 12).double()
    variances = torch.linalg.eigvalsh(torch.cov(patches.mT, correction=0))  # ascending
    error = (through(fitted(x, components=5, patch=2), x) - x).double().square().sum() / len(
        patches
    )
    # float32 projections
    assert error.item() == pytest.approx(variances[:7].sum().item(), rel=1e-5)


def test_scale_is_half_way_to_whitening() -> None:
    x = moving_digits(64, 0)
    model = fitted(x, components=8)
    sd = model.encode(x).mean[:, :, 0].transpose(0, 1).flatten(1).double().std(1, correction=0)
    want = (sd * sd.square().mean().sqrt()).rsqrt().float()
    torch.testing.assert_close(model.first.scale, want, rtol=1e-5, atol=0)  # float32 projections


def test_first_frame_does_not_depend_on_the_others() -> None:
    x = moving_digits(8, 0)
    model = fitted(x)
    alone, first = model.encode(x[:, :, :1]).mean, model.encode(x).mean[:, :, :1]
    # matrix products of other sizes are summed in another order on some processors
    torch.testing.assert_close(alone, first, rtol=1e-5, atol=1e-5)
    assert through(model, x[:, :, :1]).shape == (8, 3, 1, 16, 16)


def test_latents_have_the_size_that_the_config_promises() -> None:
    cfg = PatchPCA.Config(components=7, patch=2, group=3)
    z = PatchPCA(cfg).encode(torch.zeros(2, 3, 7, 6, 4)).mean
    assert Clip(*z.shape[1:]) == cfg.latents(Clip(3, 7, 6, 4)) == Clip(7, 3, 3, 2)


def test_fit_in_batches_equals_fit_at_once_and_stops_at_fit_clips() -> None:
    x = moving_digits(24, 0)
    whole, parts = fitted(x[:20]), PatchPCA(PatchPCA.Config(fit_clips=20))
    parts.fit(iter(x.split(8)))
    # moments are summed in another order in float64, then stored in float32
    z = parts.scaled(parts.encode(x).mean)
    torch.testing.assert_close(z, whole.scaled(whole.encode(x).mean), rtol=1e-4, atol=1e-4)


def test_components_have_a_sign_of_their_own() -> None:
    model = fitted(moving_digits(32, 0))
    for basis in (model.first.basis, model.rest.basis):
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


def test_clips_without_any_change_stay_finite() -> None:
    x = torch.full((4, 3, 5, 8, 8), -1.0)
    model = fitted(x)
    assert torch.equal(through(model, x), x)


def test_fit_survives_the_state_dict() -> None:
    x, other = moving_digits(16, 0), PatchPCA(PatchPCA.Config())
    model = fitted(x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(through(other, x), through(model, x))


def test_fit_without_clips_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one clip"):
        PatchPCA(PatchPCA.Config()).fit([])


@pytest.mark.parametrize(
    ("field", "clip"),
    [
        ("frames", (3, 8, 16, 16)),
        ("frames", (3, 0, 16, 16)),
        ("height", (3, 9, 18, 16)),
        ("width", (3, 9, 16, 2)),
        ("channels", (1, 9, 16, 16)),
    ],
)
def test_clips_that_do_not_fit_are_misfits(field, clip) -> None:
    with pytest.raises(Misfit) as error:
        PatchPCA.Config().latents(Clip(*clip))
    assert error.value.field == field


def test_more_components_than_a_patch_has_numbers_is_a_problem() -> None:
    (problem,) = PatchPCA.Config(components=13, patch=2).problems()
    assert problem == "components=13: want 1 to 12"


def test_every_bad_setting_is_named() -> None:
    cfg = PatchPCA.Config(components=0, patch=4, group=0, fit_clips=0)
    assert {p.split("=")[0] for p in cfg.problems()} == {"components", "group", "fit_clips"}
