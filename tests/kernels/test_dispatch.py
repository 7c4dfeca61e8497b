"""Which implementation runs an operation, and that asking costs no import of torch."""

import logging
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import _dispatch


@pytest.fixture(autouse=True)
def settings_as_before(monkeypatch):
    monkeypatch.setattr(_dispatch, "_settings", _dispatch.Settings())
    monkeypatch.setattr(_dispatch, "_said", set())


def python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_the_package_and_asking_imports_neither_torch_nor_triton():
    code = "import sys, kernels; kernels.use('eager'); kernels.chosen()\n"
    assert python(code + "print({'torch', 'triton'} & set(sys.modules))").strip() == "set()"


def test_the_package_has_no_version_for_other_libraries_to_probe():
    assert not hasattr(kernels, "__version__")


def test_an_operation_is_the_function_whatever_part_of_its_folder_was_imported_first():
    code = (
        "import kernels.group_norm.reference, kernels\n"
        "from kernels import group_norm, temporal_attention\n"
        "print(kernels.group_norm is group_norm, callable(group_norm))\n"
        "print(callable(temporal_attention))"
    )
    assert python(code).split() == ["True", "True", "True"]


def test_auto_runs_eager_where_triton_is_not_there():
    kernels.use("auto")
    assert kernels.chosen() == {"group_norm": "eager", "temporal_attention": "eager"}


def test_auto_says_once_what_it_chose(caplog):
    with caplog.at_level(logging.INFO, logger="kernels"):
        kernels.use("auto")
        kernels.use("auto")
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "kernels.group_norm=auto runs eager",
        "kernels.temporal_attention=auto runs eager",
    ]


def test_each_operation_can_be_set_alone():
    kernels.use("eager", group_norm="reference")
    assert kernels.chosen() == {"group_norm": "reference", "temporal_attention": "eager"}


def test_a_setting_that_is_not_named_is_kept():
    kernels.use(group_norm="reference")
    kernels.use(temporal_attention="reference")
    assert kernels.chosen() == {"group_norm": "reference", "temporal_attention": "reference"}


def test_a_with_block_restores_the_settings_also_after_an_error():
    kernels.use("eager")
    with pytest.raises(KeyError), kernels.use("reference"):
        assert set(kernels.chosen().values()) == {"reference"}
        raise KeyError
    assert set(kernels.chosen().values()) == {"eager"}


def test_the_setting_decides_which_function_runs(monkeypatch):
    ran = []

    def noted(x, *_args, **_kwargs):
        ran.append(x.shape)
        return x

    monkeypatch.setitem(_dispatch._functions, ("group_norm", "reference"), noted)
    x = torch.randn(2, 4, 3)
    kernels.group_norm(x, 2)
    with kernels.use("reference"):
        kernels.group_norm(x, 2)
    kernels.group_norm(x, 2, impl="reference")
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.use("triton"), "kernels.group_norm=triton: there is no Triton"),
        (lambda: kernels.use("fast"), "kernels.group_norm='fast': want one of \\['auto', 'eager'"),
        (lambda: kernels.use(layer_norm="eager"), "kernels.layer_norm: no such operation; want"),
        (lambda: kernels.use("auto", strict=True), "kernels.strict forbids"),
        (lambda: kernels.group_norm(torch.ones(2, 2, 2), 1, impl="triton"), "use kernels=auto or"),
    ],
)
def test_an_implementation_that_is_not_there_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_setting_changes_nothing():
    kernels.use("eager")
    with pytest.raises(ValueError, match="temporal_attention"):
        kernels.use("reference", temporal_attention="triton")
    assert set(kernels.chosen().values()) == {"eager"}


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_every_implementation_of_the_table_is_there(op):
    for name in _dispatch.OPS[op]:
        assert callable(_dispatch.implementation(op, name))
