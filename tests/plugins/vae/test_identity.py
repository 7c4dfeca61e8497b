"""Pixels as latents."""

import torch

from plugins.vae.identity import Identity
from sandbox.contracts import Clip


def test_latents_are_the_pixels() -> None:
    model, x = Identity(Identity.Config()), torch.randn(2, 3, 5, 7, 9)
    z = model.scaled(model.encode(x).sample(torch.randn_like(x)))
    assert torch.equal(z, x) and torch.equal(model.decode(z), x)
    assert Identity.Config().latents(Clip(3, 5, 7, 9)) == Clip(3, 5, 7, 9)


def test_decoding_inverts_the_scale() -> None:
    model, x = Identity(Identity.Config(scale_factor=0.5, shift=1.0)), torch.randn(1, 3, 1, 4, 4)
    z = model.scaled(x)
    assert torch.equal(z, (x - 1) / 2)
    # rounding of a subtraction and its inverse
    torch.testing.assert_close(model.decode(z), x, rtol=1e-6, atol=1e-6)


def test_nothing_is_fitted_or_stored() -> None:
    assert Identity.Config().fitted() == "none"
    assert not Identity(Identity.Config()).state_dict()


def test_bad_scales_are_reported() -> None:
    cfg = Identity.Config(scale_factor=float("nan"), shift=float("inf"))
    assert [p.split("=")[0] for p in cfg.problems()] == ["scale_factor", "shift"]
