"""The dispersive loss on hidden features."""

import pytest
import torch

from plugins.method.dispersive import dispersion
from sandbox import build, compose
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError
from tests.helpers import composed
from tests.inputs import batch

SMALL = ("backbone.width=16", "backbone.num_blocks=2", "vae.weights=null", "vae.fit_clips=16",
         "data.clips_per_epoch=16", "data.batch_size=4")  # fmt: skip


def test_it_is_the_mean_over_all_pairs():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    pairs = [(a - b).square().mean() / 0.7 for a in x for b in x]
    want = torch.stack([torch.exp(-d) for d in pairs]).mean().log()
    torch.testing.assert_close(dispersion(x, 0.7), want)


def test_equal_features_have_no_dispersion():
    torch.testing.assert_close(dispersion(torch.ones(4, 8), 0.5), torch.tensor(0.0))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_step_adds_the_term_and_its_gradient(checkpointing):
    """Activation checkpointing changes neither the features nor their gradients."""
    words = (*SMALL, f"backbone.gradient_checkpointing={checkpointing}")
    grads = {}
    for weight in ("0.0", "0.5"):
        method = ("method=dispersive", f"method.weight={weight}")
        wiring = wire(composed(*words, *method))
        system, clips = build(wiring.root).train(), batch(wiring, 4)
        terms = system.step(clips, system.draws(clips))
        terms.total.backward()
        grads[weight] = system.backbone.patch_in.weight.grad
        plain = terms.total - float(weight) * terms.log["dispersive"]
        torch.testing.assert_close(plain, terms.log["loss"])
    assert not grads["0.0"].any()  # the output layer starts at zero
    assert grads["0.5"].abs().max() > 0


def test_an_unknown_module_is_refused_with_the_nearest():
    root = composed(*SMALL, "method=dispersive", "method.module=block.0")
    with pytest.raises(ConfigError, match=r"no module block\.0; did you mean 'blocks\.0'"):
        build(wire(root).root)


def test_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"method\.module='': want"):
        compose("method=dispersive", "method.module=''")
