"""No conditions."""

from plugins.conditioning.none import Unconditional
from sandbox.contracts import Batch, Clip, Slots

CLIP = Clip(3, 9, 16, 16)


def test_it_has_no_slots_needs_or_dropout():
    cfg = Unconditional.Config()
    assert cfg.offers(CLIP, CLIP) == Slots()
    assert not cfg.needs() and not cfg.signals() and not cfg.encodes()
    assert Unconditional(cfg).drop(None) == {}


def test_its_conditions_are_empty():
    cond = Unconditional(Unconditional.Config())(Batch(captions=["a"]), CLIP, {}, None, None, None)
    assert not list(cond.tensors())
