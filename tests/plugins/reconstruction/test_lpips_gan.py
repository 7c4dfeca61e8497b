"""The published first-stage loss: terms, discriminator updates, resume, LPIPS."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from plugins._blocks import lpips
from plugins._blocks.discriminator3d import Discriminator3D
from plugins._blocks.lpips import LPIPS, from_torchvision
from plugins._blocks.patchgan import NLayerDiscriminator
from plugins._blocks.posterior import Gaussian, PointPosterior, Reconstruction
from plugins.reconstruction.lpips_gan import LPIPSWithDiscriminator
from sandbox.cli.jobs import check_and_wire
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, Preempted, StorageError
from sandbox.model.autoencoding import Autoencoding
from sandbox.model.components import build
from sandbox.runs.resume import open_root
from sandbox.training.loop import fit
from sandbox.training.setup import start
from tests.golden_easyanimate import GOLDEN, by_rule, facts, near, recorded
from tests.helpers import composed, words
from tests.training_sessions import StopAfter, differing

SETTINGS = (
    "task=train_vae", "vae=vq", "vae.ch=8", "vae.ch_mult=[1,1]", "vae.num_groups=4",
    "vae.n_embed=8", *words("ldm_celebahq_vq4_first_stage", "optimizer"), "vae.weights=null",
    "reconstruction=lpips_gan", "reconstruction.disc_ndf=4",
    "reconstruction.disc_start=2", "task.batch_size=2", "data.clips_per_epoch=13", "logger=null",
    "trainer.accumulate=2", "trainer.threads=1", "steps=4", "checkpoint.every=2",
)  # fmt: skip


def loss(**settings) -> LPIPSWithDiscriminator:
    torch.manual_seed(0)
    return LPIPSWithDiscriminator(LPIPSWithDiscriminator.Config(disc_ndf=4, **settings))


def made(codebook: bool = False) -> tuple[Reconstruction, nn.Parameter]:
    """A training pass whose last layer has one element."""
    weight = nn.Parameter(torch.ones(1, 1))
    x = torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = Gaussian(torch.full((2, 4, 1, 1, 1), 0.5))
    if codebook:
        own = {"codebook_loss": torch.tensor([1.0, 2.0])}
        return Reconstruction(
            x, 0.5 * weight * x, PointPosterior(x), last_layer=weight, **own
        ), weight
    return Reconstruction(x, 0.5 * weight * x, posterior, last_layer=weight), weight


def test_codebook_form_averages_and_kl_form_sums_over_a_frame():
    out, _ = made(codebook=True)
    error = (out.video - out.target).abs()
    terms = loss(disc_start=9, codebook_weight=0.5)(out, 0)
    assert terms.total.item() == pytest.approx(error.mean().item() + 0.5 * 1.5, rel=1e-5)
    out, _ = made()
    terms = loss(disc_start=9, kl_weight=0.1, logvar_init=1.0)(out, 0)
    want = (error / torch.e + 1).flatten(1).sum(1).mean() + 0.1 * out.posterior.kl().mean()
    assert terms.total.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("codebook", "own"), [(True, {"quant_loss"}), (False, {"kl_loss", "logvar"})]
)
def test_logged_names_are_the_published_ones(codebook, own):
    terms = loss(perceptual_weight=0.0)(made(codebook)[0], 0)
    common = {"total_loss", "nll_loss", "rec_loss", "g_loss", "d_weight", "disc_factor"}
    assert set(terms.log) == common | own
    terms_d = loss().discriminate(made(codebook)[0], 0)
    assert set(terms_d.log) == {"disc_loss", "logits_real", "logits_fake"}
    assert not any(v.requires_grad for v in (terms.log | terms_d.log).values())


def test_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    part, (out, weight) = loss(disc_weight=0.75), made()
    terms = part(out, 0)
    nll = (out.video - out.target).abs().flatten(1).sum(1).mean()
    g_loss = -part.discriminator(out.video[:, :, 0]).mean()
    of_nll, of_g = (
        torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (nll, g_loss)
    )
    assert terms.log["d_weight"].item() == pytest.approx(
        0.75 * min(1e4, (of_nll / (of_g + 1e-4)).item()), rel=1e-4
    )


def test_discriminator_counts_from_disc_start():
    part, (out, _) = loss(disc_start=5), made()
    before, after = (part(out, step) for step in (4, 5))
    assert before.log["disc_factor"] == 0
    added = after.log["d_weight"] * after.log["g_loss"]
    # float32 sums of some hundred
    assert (after.total - before.total).item() == pytest.approx(added.item(), rel=1e-2, abs=1e-3)
    assert part.discriminate(out, 4).total == 0
    assert part.discriminate(out, 5).total > 0


@pytest.mark.parametrize(("kind", "want"), [("hinge", 1.0), ("vanilla", 0.693147)])
def test_an_uninformative_discriminator_has_the_chance_loss(kind, want):
    part = loss(disc_loss=kind)
    for p in part.discriminator.main[-1].parameters():
        nn.init.zeros_(p)
    assert part.discriminate(made()[0], 0).total.item() == pytest.approx(want, rel=1e-5)


def test_the_generator_loss_gives_the_discriminator_no_gradient():
    part, (out, weight) = loss(), made()
    part(out, 0).total.backward()
    assert weight.grad is not None
    assert not any(p.requires_grad or p.grad is not None for p in part.parameters())


def test_a_clip_discriminator_adds_to_that_of_frames():
    part, (out, weight) = loss(disc3d_channels=(32,)), made()
    terms = part(out, 0)
    of_frames = part.discriminator(out.video[:, :, 0]).mean()
    of_clips = part.discriminator.discriminator3d(out.video).mean()
    torch.testing.assert_close(terms.log["g_loss"], -(of_frames + of_clips).detach())
    terms.total.backward()
    assert weight.grad is not None and not any(p.grad is not None for p in part.parameters())
    for p in (
        *part.discriminator.main[-1].parameters(),
        *part.discriminator.discriminator3d.conv_out.parameters(),
    ):
        nn.init.zeros_(p)
    terms_d = part.discriminate(out, 0)
    assert terms_d.total.item() == pytest.approx(2.0)  # hinge losses of chance, summed
    assert {"logits_real_3d", "logits_fake_3d"} < set(terms_d.log)


@torch.no_grad()
def test_the_discriminator_of_clips_equals_the_original():
    spec, tensors = facts("discriminator3d"), recorded("discriminator3d")
    discriminator = Discriminator3D(tuple(spec["block_out_channels"]))
    discriminator.load_state_dict(by_rule(discriminator, spec["weight_seed"]), strict=False)
    near("logits", discriminator(tensors["in.x"]), tensors["out.logits"])


def test_the_discriminator_of_clips_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = Discriminator3D().state_dict()
    manifest = json.loads((GOLDEN / "easyanimate_vae_discriminator3d.json").read_text())
    assert {k: list(v.shape) for k, v in state.items()} == {k: s for k, (s, _) in manifest.items()}


def session(out, stop=None, **changes):
    """Trains, or stops after step `stop`; returns the final state."""
    root = replace(wire(composed(*SETTINGS)).root, out=str(out), **changes)
    with open_root(root) as run:
        system = Autoencoding(root, build("vae", root), build("reconstruction", root), 4)
        rank = StopAfter(-1 if stop is None else stop)
        try:
            with start(system, run, rank=rank) as training:
                rank.of(training)
                try:
                    fit(training)
                finally:
                    state = deepcopy(training.state())
        except Preempted:
            assert stop is not None
    return state, training


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    full, _ = session(tmp_path / "full")
    session(tmp_path / "parts", stop=2)
    resumed, training = session(tmp_path / "parts")
    assert training.step == 4
    assert not differing(full, resumed)


def test_the_discriminator_trains_on_its_own_loss_from_disc_start(tmp_path):
    early, _ = session(tmp_path, stop=2)
    late, training = session(tmp_path)
    moved = differing(early["opponent"]["weights"], late["opponent"]["weights"])
    assert ".main.0.weight" in moved
    assert not [k for k in late["weights"] if "discriminator" in k and "running" not in k
                and "num_batches" not in k]  # fmt: skip
    assert not [k for k in late["ema"]["average"] if "discriminator" in k]
    fresh = build("reconstruction", training.root).discriminator
    assert torch.equal(early["opponent"]["weights"]["main.0.weight"], fresh.main[0].weight)


def test_patch_gan_has_the_published_names_and_receptive_field():
    with torch.device("meta"):
        made = NLayerDiscriminator(64, 3)
        assert made(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    shapes = {k: tuple(v.shape) for k, v in made.state_dict().items() if v.ndim == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ConfigError, match="disc_num_layers"):
        NLayerDiscriminator(4, 3)(torch.zeros(1, 3, 23, 64))
    assert NLayerDiscriminator(4, 3)(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)


def test_lpips_is_zero_for_equal_images_and_grows_with_the_difference():
    torch.manual_seed(0)
    distance = LPIPS("random").train()
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16)
    near, far = (distance(x, x + scale * noise) for scale in (0.01, 0.3))
    assert distance(x, x).tolist() == [0, 0]
    assert (near > 0).all()
    assert (near < far).all()


def test_lpips_reads_the_two_published_files(tmp_path):
    torch.manual_seed(0)
    source = LPIPS("random").state_dict()
    vgg = {f"features.{k.split('.', 2)[2]}": v for k, v in source.items() if k.startswith("net.")}
    assert from_torchvision(vgg).keys() == {k for k in source if k.startswith("net.")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16-397923af.pth")
    torch.save({k: v for k, v in source.items() if k.startswith("lin")}, tmp_path / "vgg.pth")
    read = LPIPS(str(tmp_path)).state_dict()
    assert all(torch.equal(v, read[k]) for k, v in source.items())
    assert len(source) == 33  # 13 convolutions with biases, 5 linear layers, shift and scale


def test_lpips_without_its_files_says_which(tmp_path):
    with pytest.raises(StorageError, match=r"vgg16-397923af\.pth"):
        LPIPS(str(tmp_path / "nowhere"))


def test_bad_settings_are_named():
    cfg = LPIPSWithDiscriminator.Config(
        disc_loss="wasserstein", disc_num_layers=0, disc_start=-1, kl_weight=float("nan"), lpips=""
    )
    found = {p.split("=")[0] for p in cfg.problems()}
    assert found == {"disc_loss", "disc_num_layers", "disc_start", "kl_weight", "lpips"}


def test_a_first_stage_without_a_trained_last_layer_is_refused():
    loss = LPIPSWithDiscriminator(LPIPSWithDiscriminator.Config())
    number = torch.zeros((), requires_grad=True)
    with pytest.raises(ConfigError, match=r"decoder\.conv_out.*reconstruction=kl"):
        loss.adaptive_weight(number, number, None)
    with pytest.raises(ConfigError, match=r"decoder\.conv_out, which trainable= freezes"):
        loss.adaptive_weight(number, number, torch.zeros(1))


def test_a_failed_download_of_lpips_names_size_and_fix(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(lpips.URLS, lpips.VGG_FILE, (tmp_path / "none").as_uri())
    with pytest.raises(StorageError, match=r"vgg16-397923af\.pth \(528 MB\).*lpips=FOLDER"):
        LPIPSWithDiscriminator(LPIPSWithDiscriminator.Config(perceptual_weight=1.0))


def test_a_missing_lpips_folder_is_reported_before_a_run():
    words = ("experiment=ldm_celebahq_vq4_first_stage_tiny", "reconstruction.lpips=./none")
    check_and_wire(composed(*words))  # perceptual_weight is 0 in the tiny recipe
    with pytest.raises(ConfigError, match=r"reconstruction\.lpips=\./none: no such file"):
        check_and_wire(composed(*words, "reconstruction.perceptual_weight=1"))
