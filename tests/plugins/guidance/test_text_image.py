"""Text and image guidance: passes, formula, and behaviour without an image."""

import pytest
import torch

from plugins.guidance.text_image import TextImage
from sandbox.contracts import FULL, Pass

BOTH = ("text", "image")
T = torch.zeros(2, dtype=torch.int64)


def made(**settings) -> TextImage:
    return TextImage(TextImage.Config(**settings))


def outs(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)))


def test_it_has_a_full_an_image_and_an_unconditional_pass():
    want = (FULL, Pass(frozenset({"text"})), Pass(frozenset(BOTH)))
    assert made().passes(BOTH) == made().cfg.passes(BOTH) == want


def test_each_signal_has_its_scale():
    full, image, uncond = outs(3)
    got = made(guidance_scale=5.0, cfg_img=2.0).combine([full, image, uncond], T, 0, 1)
    torch.testing.assert_close(got, uncond + 2 * (image - uncond) + 5 * (full - image))


def test_without_an_image_it_is_classifier_free_guidance():
    guidance = made(guidance_scale=5.0)
    assert guidance.passes(("text",)) == (FULL, Pass(frozenset({"text"})))
    full, uncond = outs(2)
    torch.testing.assert_close(
        guidance.combine([full, uncond], T, 0, 1), uncond + 5 * (full - uncond)
    )


def test_full_rescaling_restores_the_deviation_of_every_sample():
    found = outs(3)
    got = made(guidance_rescale=1.0).combine(found, T, 0, 1)
    torch.testing.assert_close(got.std((1, 2, 3, 4)), found[0].std((1, 2, 3, 4)))


@pytest.mark.parametrize("name", ["guidance_scale", "cfg_img", "guidance_rescale"])
def test_a_bad_setting_is_named(name):
    (problem,) = TextImage.Config(**{name: -1.0}).problems()
    assert problem.startswith(f"{name}=")
