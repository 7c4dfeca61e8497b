"""A plugin that breaks its interface is named with its file, and is never a bug of the sandbox.

Each row changes one method of a copy of a plugin that works.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sandbox.cli.errors import BUG, report
from sandbox.config.paths import PLUGINS
from sandbox.config.plugin_faults import naming_plugins, plugin_fault
from sandbox.config.wiring import wire
from sandbox.contracts import PluginError, PluginFault, SandboxError
from sandbox.evaluation.evaluate import evaluate
from tests.helpers import TINY, composed, train

SOURCES = {
    "backbone": "dit",
    "loss": "mse",
    "schedule": "flow",
    "sampler": "ddim",
    "guidance": "cfg",
    "conditioning": "words",
    "vae": "identity",
    "metric": "brightness",
    "optimizer": "adamw",
    "data": "moving_digits",
    "callbacks": "val_loss",
}
RETURNS = [  # group, method, what it returns, words of the error
    # channels and shapes
    ("backbone", "forward", "own[:, :3]", "forward", "outputs * C"),
    ("backbone", "forward", "own.repeat(1, 2, 1, 1, 1)", "forward", "outputs * C"),
    ("backbone", "forward", "own[:, :, :1]", "forward", "outputs * C"),
    ("vae", "encode", "type(own)(own.mean.repeat(1, 2, 1, 1, 1))", "encode", "Config.latents"),
    ("vae", "encode", "own.mean", "encode", "Posterior"),
    ("vae", "decode", "own[:, :1]", "decode", "3, T, H, W"),
    ("vae", "decode", "own[0]", "decode", "3, T, H, W"),
    ("conditioning", "forward", "replace(own, vector=own.vector[:, :4])", "vector", "width 8"),
    ("sampler", "__call__", "own[:, :, :1]", "__call__", "shape"),
    ("schedule", "noised", "own.flatten(1)", "noised", "shape"),
    # types
    ("loss", "__call__", "own.total", "__call__", "Terms"),
    ("loss", "__call__", "(own.total, own.log)", "a tuple of 2", "Terms"),
    ("loss", "__call__", "replace(own, total=own.per_sample)", "total", "shape ()"),
    ("loss", "__call__", "replace(own, per_sample=own.total)", "per_sample", "shape (2,)"),
    ("loss", "__call__", "replace(own, log={'x': 1.0})", "log['x']", "shape ()"),
    ("loss", "__call__", "None", "None", "Terms"),
    ("backbone", "forward", "(own, None)", "a tuple of 2", "Tensor"),
    ("conditioning", "forward", "own.vector", "Tensor", "Conditions"),
    ("schedule", "draw_t", "0.5", "type float", "Tensor"),
    ("schedule", "inputs", "own[0]", "Tensor", "tuple[Tensor, Tensor]"),
    ("schedule", "denoised", "own.z0", "Tensor", "Denoised"),
    ("schedule", "times", "own.tolist()", "a list of", "Tensor"),
    ("guidance", "passes", "None", "None", "frozenset"),
    ("guidance", "combine", "[own]", "a list of 1", "Tensor"),
    ("metric", "score", "0.5", "type float", "dict[str, float]"),
    ("metric", "score", "{'x': 'good'}", "a dict with 'x'", "dict[str, float]"),
    ("metric", "baselines", "None", "None", "dict[str, Tensor]"),
    ("optimizer", "build", "None", "None", "torch.optim.Optimizer"),
    ("optimizer", "build", "[own]", "a list of 1", "torch.optim.Optimizer"),
    ("data", "split", "[1, 2, 3]", "a list of 3", "Items"),
    ("data", "split", "None", "None", "Items"),
    # the questions before a run
    ("backbone", "Config.takes", "None", "Config.takes", "frozenset[str]"),
    ("backbone", "Config.grid", "(1, 2)", "a tuple of 2", "Clip"),
    ("vae", "Config.latents", "None", "Config.latents", "Clip"),
    ("conditioning", "Config.needs", "'captions'", "type str", "frozenset[str]"),
    ("conditioning", "Config.offers", "{'vector': 8}", "a dict with 'vector'", "Slots"),
    ("data", "Config.clips", "None", "Config.clips", "tuple[Clip, ...]"),
    ("data", "Config.provides", "None", "Config.provides", "frozenset[str]"),
    ("loss", "Config.accepts", "None", "Config.accepts", "Iterator[str]"),
    ("sampler", "Config.problems", "'none'", "Config.problems", "Iterator[str]"),
]
RAISES = [  # group, method, what it does; an unexpected error of the plugin's code
    ("backbone", "forward", "return own[:, 99:].mean(7)"),
    ("loss", "__call__", "raise KeyError('x')"),
    ("loss", "__call__", "raise SystemExit(0)"),
    ("schedule", "draw_t", "return 1 / 0"),
    ("vae", "encode", "return own.nothing"),
    ("metric", "score", "return undefined_name"),
    ("callbacks", "on_train_batch_end", "raise RuntimeError('x')"),
    ("data", "Config.problems", "return [][1]"),
    ("backbone", "Config.wired", "raise ValueError('x')"),
]


def write(folder: Path, group: str, method: str, body: str) -> Path:
    """A copy of the plugin of a group, called mine, in which `method` runs `body` instead."""
    name = SOURCES[group]
    text = (PLUGINS / group / f"{name}.py").read_text()
    text = text.replace(f'@register("{group}", "{name}")', f'@register("{group}", "mine")')
    name, start = method.rpartition(".")[2], method.startswith("Config.")
    indent = "        " if start else "    "
    head = re.compile(rf"^{indent}def ", re.M)
    at = re.compile(rf"^{indent}def {name}\(", re.M)
    text, found = at.subn(f"{indent}def _own(", text, count=1)
    own = "self._own" if found else f"super().{name}"
    lines = [f"def {name}(self, *a, **k):", f"    own = {own}(*a, **k)", f"    {body}", ""]
    at = head.search(text, text.index("class Config" if start else '"mine")')).start()
    text = text[:at] + "".join(f"{indent}{line}\n" for line in lines) + text[at:]
    text = re.sub(r"^(from dataclasses import )", r"\1replace, ", text, count=1, flags=re.M)
    path = folder / group / "mine.py"
    path.parent.mkdir()
    path.write_text(text)
    return path


def error_of(folder: Path, group: str) -> SandboxError:
    """The error of a run with the plugin: training, then evaluation."""
    own = [] if group == "callbacks" else [f"{group}=mine"]
    more = {"callbacks": ["callbacks=[mine]"], "vae": ["backbone.width=8"]}.get(group, [])
    words = [w for w in TINY if group != "data" or not w.startswith("data.clips_per_epoch")]
    with pytest.raises(SandboxError) as e, naming_plugins():
        system = train(wire(composed(*words, *own, *more)), folder / "out").system.eval()
        evaluate(system, 2, untrained=False)
    return e.value


@pytest.mark.parametrize(("group", "method", "value", "got", "want"), RETURNS)
def test_a_wrong_value_names_the_file_and_the_interface(
    plugin_folder, tmp_path, capsys, group, method, value, got, want
):
    path = write(plugin_folder, group, method, f"return {value}")
    e = error_of(tmp_path, group)
    assert isinstance(e, PluginError), e
    report(e)
    said = capsys.readouterr().err
    assert f"{group}=mine: " in said and str(path) in said and BUG not in said
    assert got in said and want in said
    assert "in sandbox.contracts" in said or group == "optimizer"
    assert len(said) < 500 and "Traceback" not in said


@pytest.mark.parametrize(("group", "method", "body"), RAISES)
def test_an_error_of_a_plugins_code_names_its_line(
    plugin_folder, tmp_path, capsys, group, method, body
):
    path = write(plugin_folder, group, method, body)
    line = 1 + next(i for i, t in enumerate(path.read_text().splitlines()) if body in t)
    e = error_of(tmp_path, group)
    assert isinstance(e, PluginFault) and e.exit_code == 1, e
    report(e)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: {group}=mine: {path}:{line} raised ") and BUG not in last


def test_a_method_that_is_missing_or_takes_other_arguments_is_named(plugin_folder, tmp_path):
    path = write(plugin_folder, "optimizer", "build", "return own")
    text = path.read_text()
    edits = (
        ("def build(", "def built(", "has no 'build'"),
        ("def build(self, *a, **k)", "def build(self, a, *, k)", "takes 2 positional arguments"),
        ("def __init__(self, cfg: Config)", "def __init__(self, a, b)", "'b'"),
    )
    for second, (old, new, words) in enumerate(edits):
        path.write_text(text.replace(old, new, 1))
        os.utime(path, (second, second))  # Python compares seconds and sizes of edited files
        composed("optimizer=mine")  # reads it again
        e = error_of(tmp_path, "optimizer")
        assert isinstance(e, PluginError) and words in str(e) and str(path) in str(e), e


def test_an_error_whose_last_frame_is_ours_stays_a_bug():
    try:
        wire(None)  # type: ignore[arg-type]
    except AttributeError as e:
        assert plugin_fault(e) is None
