"""Selection of implementations, and that it does not import torch."""

import logging
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import _dispatch

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton would run here")


@pytest.fixture(autouse=True)
def restored_settings(monkeypatch):
    monkeypatch.setattr(_dispatch, "_settings", _dispatch.Settings())
    monkeypatch.setattr(_dispatch, "_logged", set())


def python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_and_configuring_the_package_imports_neither_torch_nor_triton():
    code = "import sys, kernels; kernels.use('eager'); kernels.chosen()\n"
    assert python(code + "print({'torch', 'triton'} & set(sys.modules))").strip() == "set()"


def test_the_package_has_no_version_for_other_libraries_to_probe():
    assert not hasattr(kernels, "__version__")


def test_an_operation_is_the_function_even_if_a_submodule_was_imported_first():
    code = (
        "import kernels.group_norm.reference, kernels\n"
        "from kernels import group_norm, temporal_attention\n"
        "print(kernels.group_norm is group_norm, callable(group_norm))\n"
        "print(callable(temporal_attention))"
    )
    assert python(code).split() == ["True", "True", "True"]


@without_gpu
def test_auto_means_eager_without_a_gpu():
    kernels.use("auto")
    assert kernels.chosen() == {"group_norm": "eager", "temporal_attention": "eager"}


@without_gpu
def test_a_fallback_reason_is_logged_once_and_counted(caplog):
    x = torch.randn(2, 4, 3)
    with caplog.at_level(logging.INFO, logger="kernels"), kernels.use("triton"):
        kernels.group_norm(x, 2)
        kernels.group_norm(x, 2)
    reason = "kernels.group_norm=triton: it needs a CUDA device, and the tensors are on cpu"
    assert [r.message for r in caplog.records] == [f"{reason}; using eager"]
    assert kernels.calls()["fallbacks"][reason] == 2


def test_auto_does_not_log_small_tensors(caplog):
    with caplog.at_level(logging.INFO, logger="kernels"), kernels.use("auto", strict=True):
        kernels.group_norm(torch.randn(2, 4, 3), 2)
    assert not caplog.records


@without_gpu
def test_strict_raises_if_a_large_tensor_would_use_eager(monkeypatch):
    monkeypatch.setitem(_dispatch.CROSSOVER, "group_norm", 20)
    with kernels.use("auto", strict=True), pytest.raises(ValueError, match="needs a CUDA device"):
        kernels.group_norm(torch.randn(2, 4, 3), 2)


def test_calls_are_counted_by_implementation():
    before = kernels.calls()["group_norm"].get("reference", 0)
    kernels.group_norm(torch.randn(2, 4, 3), 2, impl="reference")
    assert kernels.calls()["group_norm"]["reference"] == before + 1


def test_each_operation_can_be_set_alone():
    kernels.use("eager", group_norm="reference")
    assert kernels.chosen() == {"group_norm": "reference", "temporal_attention": "eager"}


def test_an_operation_that_is_not_named_keeps_its_setting():
    kernels.use(group_norm="reference")
    kernels.use(temporal_attention="reference")
    assert kernels.chosen() == {"group_norm": "reference", "temporal_attention": "reference"}


def test_a_with_block_restores_the_settings_also_after_an_error():
    kernels.use("eager")
    with pytest.raises(KeyError), kernels.use("reference"):
        assert set(kernels.chosen().values()) == {"reference"}
        raise KeyError
    assert set(kernels.chosen().values()) == {"eager"}


def test_the_setting_decides_which_implementation_runs():
    x = torch.randn(2, 4, 3)
    before = kernels.calls()["group_norm"]
    kernels.group_norm(x, 2, impl="eager")
    with kernels.use("reference"):
        kernels.group_norm(x, 2)
    kernels.group_norm(x, 2, impl="reference")
    ran = {k: n - before.get(k, 0) for k, n in kernels.calls()["group_norm"].items()}
    assert ran["reference"] == 2 and ran["eager"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.use("fast"), "kernels.group_norm='fast': want one of \\['auto', 'eager'"),
        (lambda: kernels.use(layer_norm="eager"), "kernels.layer_norm: no such operation; want"),
        (lambda: kernels.group_norm(torch.ones(2, 2, 2), 1, impl="fast"), "'fast': want one of"),
    ],
)
def test_an_unknown_implementation_is_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@without_gpu
def test_triton_without_a_gpu_is_rejected_with_a_fix():
    fix = "needs a CUDA device.*; use kernels=auto or kernels=eager"
    with pytest.raises(ValueError, match=fix):
        kernels.group_norm(torch.ones(2, 2, 2), 1, impl="triton")
    with pytest.raises(ValueError, match=fix):
        kernels.use("triton", strict=True)


def test_a_rejected_setting_changes_nothing():
    kernels.use("eager")
    with pytest.raises(ValueError, match="temporal_attention"):
        kernels.use("reference", temporal_attention="fast")
    assert set(kernels.chosen().values()) == {"eager"}
