"""The config group `kernels` agrees with the table of implementations."""

from dataclasses import fields

import pytest
import torch

import kernels
from kernels import _dispatch
from plugins.kernels import auto
from plugins.kernels.auto import Kernels
from sandbox.contracts import ConfigError


@pytest.fixture(autouse=True)
def restored_settings(monkeypatch):
    monkeypatch.setattr(_dispatch, "_settings", _dispatch.Settings())


def test_there_is_a_field_for_every_operation():
    assert {f.name for f in fields(Kernels.Config)} == {"plugin", "strict", *_dispatch.OPS}


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_an_unknown_choice_is_rejected_before_the_run(op):
    cfg = Kernels.Config(**{op: "fast"})
    assert list(cfg.problems()) == [f"{op}='fast': want one of {list(auto.CHOICES)}"]


def test_the_choices_are_the_implementations():
    for op in _dispatch.OPS:
        assert set(auto.CHOICES) == set(kernels.implementations(op))


def test_apply_sets_every_operation():
    Kernels(Kernels.Config(group_norm="reference", temporal_attention="eager")).apply()
    assert kernels.chosen() == {"group_norm": "reference", "temporal_attention": "eager"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton would run here")
def test_strict_triton_without_a_gpu_is_a_config_error():
    cfg = Kernels.Config(group_norm="triton", temporal_attention="triton", strict=True)
    want = "kernels.group_norm=triton needs a CUDA device; use kernels=auto or kernels=eager"
    with pytest.raises(ConfigError, match=want):
        Kernels(cfg).apply()


def test_the_report_has_the_selection_and_the_calls():
    setting = Kernels(Kernels.Config(group_norm="reference"))
    setting.apply()
    kernels.group_norm(torch.randn(2, 4, 3), 2)
    report = setting.report()
    assert report["chosen"]["group_norm"] == "reference"
    assert report["calls"]["group_norm"]["reference"] > 0
