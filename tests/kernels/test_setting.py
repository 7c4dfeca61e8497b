"""The config group `kernels`, beside the table of implementations that it stands for."""

from dataclasses import fields

import pytest

import kernels
from kernels import _dispatch
from plugins.kernels import auto
from plugins.kernels.auto import Kernels


@pytest.fixture(autouse=True)
def settings_as_before(monkeypatch):
    monkeypatch.setattr(_dispatch, "_settings", _dispatch.Settings())


def test_there_is_a_field_for_every_operation():
    assert {f.name for f in fields(Kernels.Config)} == {"plugin", "strict", *_dispatch.OPS}


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_a_choice_is_refused_before_the_run_exactly_where_it_would_fail_in_it(op):
    for choice in (*auto.CHOICES, "fast"):
        for strict in (False, True):
            cfg = Kernels.Config(**dict.fromkeys(_dispatch.OPS, "eager") | {op: choice})
            cfg.strict = strict
            try:
                Kernels(cfg).apply()
                works = True
            except ValueError:
                works = False
            assert works == (not list(cfg.problems())), (choice, strict)


def test_apply_sets_every_operation():
    Kernels(Kernels.Config(group_norm="reference", temporal_attention="eager")).apply()
    assert kernels.chosen() == {"group_norm": "reference", "temporal_attention": "eager"}


def test_triton_is_refused_with_its_cure():
    problems = list(Kernels.Config(group_norm="triton").problems())
    want = "group_norm=triton: it has no Triton implementation; use kernels=auto or eager"
    assert problems == [want]
