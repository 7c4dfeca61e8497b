"""PSNR, SSIM and LPIPS with known answers."""

import pytest
import torch
from skimage.metrics import structural_similarity

from plugins.metric.reconstruction import Reconstruction, psnr, ssim
from sandbox.cli.jobs import check_and_wire
from sandbox.config.wiring import wire
from sandbox.contracts import Clip, ConfigError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.training.first_stage import train_first_stage
from tests.helpers import composed
from tests.inputs import tensor


def clips(seed: int = 0) -> torch.Tensor:
    return tensor(3, 3, 2, 24, 17, seed=seed).mul(0.3).clamp(-1, 1)


def scores(video: torch.Tensor, **settings) -> dict[str, float]:
    metric = Reconstruction(Reconstruction.Config(**settings))
    metric.set_references(clips())
    return metric.score(video, [])


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 8, 8)
    assert psnr(x, x + 0.2).tolist() == pytest.approx([20.0, 20.0])  # 10 log10(4 / 0.04)


def test_ssim_equals_scikit_image():
    x, y = (clips(seed).transpose(1, 2).flatten(0, 1) for seed in (0, 1))
    y = 0.7 * x + 0.3 * y
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    want = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=2, **settings
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(want, abs=1e-6)  # float32 at the end


def test_equal_clips_are_perfect_and_noise_is_worse():
    best = scores(clips(), lpips=None)
    assert best == pytest.approx({"psnr": 106.02, "ssim": 1}, abs=0.01)
    noisy = scores(clips() + 0.2 * tensor(3, 3, 2, 24, 17, seed=5))
    assert noisy["psnr"] < 25 and noisy["ssim"] < 0.9


def test_lpips_is_computed_if_it_is_set():
    assert scores(clips(), lpips="random")["lpips"] == 0
    assert scores(clips(1), lpips="random")["lpips"] > 0


def test_missing_lpips_weights_are_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"metric\.lpips=.*vgg16-397923af.pth"):
        scores(clips(), lpips=str(tmp_path))


def test_train_vae_measures_the_first_stage(tmp_path):
    words = (
        "task=train_vae", "vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]", "logger=null", "steps=1",
        "data.clips_per_epoch=8", "task.clips=2", "task.shown=1", "task.batch_size=2",
        "trainer.threads=1", f"out={tmp_path}", "vae.weights=null", "ema=none",
    )  # fmt: skip
    found = train_first_stage(wire(composed(*words, "metric=reconstruction")).root, None, Rank())
    assert found["scores"].keys() == {"psnr", "ssim"}
    # Jensen: the mean PSNR over frames is at least the PSNR of the mean error.
    assert found["psnr_db"] <= found["scores"]["psnr"] + 1e-4
    assert -1 < found["scores"]["ssim"] < 1


def test_a_missing_lpips_file_is_an_error_before_training():
    line = ("task=train_vae", "vae=kl", "metric=reconstruction", "metric.lpips=/no/where")
    with pytest.raises(ConfigError, match=r"metric\.lpips=/no/where: no such file or folder"):
        check_and_wire(composed(*line))


def test_clips_of_another_size_are_an_error():
    with pytest.raises(ValueError, match="the real clips"):
        scores(clips()[:, :, :1])
    assert list(Reconstruction.Config().accepts(Clip(3, 1, 8, 16))) == ["height=8: want >= 11"]
