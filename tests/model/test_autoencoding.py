"""Training a first stage: what a step reports and draws, and the losses of group reconstruction."""

import pytest
import torch
from torch import Tensor

from plugins._blocks.posterior import Gaussian, PointPosterior, Reconstruction
from plugins.reconstruction.codebook import L1Codebook
from plugins.reconstruction.kl import L1KL
from plugins.vae.identity import Identity
from plugins.vae.kl import AutoencoderKL
from plugins.vae.vq import VQModel
from sandbox.config.root import Root
from sandbox.contracts import Batch
from sandbox.model.autoencoding import Autoencoding, psnr, reconstruct_clips

SMALL = {"ch": 8, "ch_mult": (1, 1), "num_groups": 4, "embed_dim": 3, "z_channels": 3}
SYSTEMS = [(AutoencoderKL, L1KL, "kl_loss"), (VQModel, L1Codebook, "quant_loss")]


def system(stage=AutoencoderKL, loss=L1KL) -> Autoencoding:
    torch.manual_seed(0)
    return Autoencoding(Root(), stage(stage.Config(**SMALL)), loss(loss.Config()), group=4)


def clips(number: int = 4) -> Batch:
    video = torch.rand(number, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(video=video, position=torch.arange(number), ids=[str(i) for i in range(number)])


@pytest.mark.parametrize(("stage", "loss", "term"), SYSTEMS)
def test_step_reaches_every_parameter_and_reports_detached_numbers(stage, loss, term) -> None:
    made = system(stage, loss)
    made.training_step(clips()).backward()
    missing = [n for n, p in made.named_parameters() if p.grad is None]
    assert not missing
    assert {"loss", "psnr", "rec_loss", term} <= set(made.metrics)
    assert all(v.ndim == 0 and not v.requires_grad for v in made.metrics.values())


@pytest.mark.parametrize(("stage", "loss", "term"), SYSTEMS)
def test_training_lowers_the_loss(stage, loss, term) -> None:
    made, batch = system(stage, loss), clips()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        losses.append(made.training_step(batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_same_batch_gives_the_same_loss_in_any_company() -> None:
    made, batch = system(), clips(4)
    half = Batch(video=batch.video[2:], position=batch.position[2:], ids=batch.ids[2:])
    whole = made.step(batch, made.draws(batch)).per_sample[2:]
    # convolutions of another batch size: float32 rounding
    torch.testing.assert_close(
        made.step(half, made.draws(half)).per_sample, whole, rtol=1e-5, atol=0
    )


def test_kl_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = L1KL(L1KL.Config(kl_weight=0.1, l1_weight=2.0, l2_weight=3.0))
    target, posterior = torch.zeros(2, 3, 1, 2, 2), Gaussian(torch.full((2, 4, 1, 1, 1), 0.5))
    terms = loss(Reconstruction(target, target + 0.5, posterior))
    # per latent number 0.5 (m^2 + e^v - 1 - v); two of them over the 12 pixel values of a clip
    kl = 2 * 0.5 * (0.25 + torch.e**0.5 - 1 - 0.5) / 12
    want = 2 * 0.5 + 3 * 0.25 + 0.1 * kl
    assert terms.per_sample.tolist() == pytest.approx([want] * 2, rel=1e-6)
    assert terms.total.item() == pytest.approx(want, rel=1e-6)


def test_codebook_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = L1Codebook(L1Codebook.Config(codebook_weight=0.5, l1_weight=1.0, l2_weight=0.0))
    target = torch.zeros(2, 3, 1, 2, 2)
    out = Reconstruction(target, target + 0.5, PointPosterior(target), torch.tensor([1.0, 2.0]))
    assert loss(out).per_sample.tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    ("loss", "fits", "not_fit"),
    [
        (L1KL, AutoencoderKL, (VQModel, Identity)),
        (L1Codebook, VQModel, (AutoencoderKL, Identity)),
    ],
)
def test_losses_refuse_first_stages_without_their_regularizer(loss, fits, not_fit) -> None:
    assert not list(loss.Config().accepts(fits.Config()))
    assert all(len(list(loss.Config().accepts(s.Config()))) == 1 for s in not_fit)


def test_bad_weights_are_named() -> None:
    for loss, weight in ((L1KL, "kl_weight"), (L1Codebook, "codebook_weight")):
        cfg = loss.Config(**{weight: float("nan"), "l1_weight": -1.0, "l2_weight": float("inf")})
        assert {p.split("=")[0] for p in cfg.problems()} == {weight, "l1_weight", "l2_weight"}


def test_psnr_is_counted_per_clip_with_peak_2() -> None:
    x = torch.zeros(2, 3, 1, 4, 4)
    y: Tensor = torch.stack([x[0] + 0.2, x[1]])
    # 4 / 0.04 is 20 dB; equal clips stop at the error 1e-10
    assert psnr(x, y).tolist() == pytest.approx([20.0, 106.0206], abs=1e-3)


def test_ceiling_goes_through_the_scaled_posterior_mean() -> None:
    stage, x = Identity(Identity.Config(scale_factor=2.0)), torch.randn(1, 3, 1, 4, 4)
    assert torch.equal(reconstruct_clips(stage, x), x)
