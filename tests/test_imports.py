"""Every module imports, fast: without side effects, and without packages that it may not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
HEAVY = frozenset({"torch", "lightning", "wandb", "numpy", "torchvision", "sklearn", "av", "PIL"})
OPTIONAL = frozenset({"open_clip", "transformers", "sentencepiece", "peft", "deepspeed", "decord",
                      "cv2", "gradio", "diffusers", "webdataset", "submitit", "joblib", "optuna",
                      "ray"})  # fmt: skip
LAZY = frozenset(
    {"wandb", "av", "sklearn", "matplotlib", "triton"}
)  # inside the function that needs them

# What a module must not bring along. The others may bring torch, but nothing of OPTIONAL or LAZY.
LIGHT = {
    "sandbox": HEAVY | {"hydra", "omegaconf"},
    "sandbox.contracts": HEAVY | {"hydra", "omegaconf"},
    "sandbox.registry": HEAVY | {"hydra", "omegaconf"},
    "sandbox.config.composition": HEAVY | {"hydra"},
    "sandbox.config.safety": HEAVY | {"hydra"},
    "sandbox.config.setting_errors": HEAVY | {"hydra"},
    "sandbox.config.wiring": HEAVY | {"hydra"},
    "sandbox.cli.main": HEAVY | {"hydra"},
    "sandbox.cli.help": HEAVY | {"hydra"},
    "sandbox.cli.reference": HEAVY,
    "sandbox.runs.lookup": HEAVY,
    "sandbox.evaluation.prompt_checks": HEAVY,
    "sandbox.runs.run": HEAVY,
    "sandbox.runs.resume": HEAVY,
    "sandbox.config.secrets": HEAVY,
    "sandbox.runs.environment": HEAVY,
    "sandbox.storage.atomic": HEAVY,
    "sandbox.api": HEAVY,
    "kernels": frozenset({"torch", "triton"}),
}  # fmt: skip


def names() -> list[str]:
    found = ["run"]
    for folder in ("sandbox", "plugins", "kernels"):
        for path in sorted((HOME / folder).rglob("*.py")):
            parts = path.relative_to(HOME).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


PROBE = """
import sys, os, json, importlib, threading
sys.path.insert(0, {home!r})
written, out = [], sys.stdout
def watch(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(str(args[0]))
    if event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "subprocess.Popen"):
        written.append(event + " " + str(args[0]))
preload = {preload!r}
for name in preload:
    importlib.import_module(name)
sys.addaudithook(watch)
for name in {names!r}:
    before, was, threads = set(sys.modules), dict(os.environ), threading.active_count()
    written.clear()
    try:
        importlib.import_module(name)
        error = None
    except Exception as e:
        error = repr(e)
    changed = sorted(k for k in {{**was, **os.environ}} if was.get(k) != os.environ.get(k))
    brought = sorted({{m.partition(".")[0] for m in set(sys.modules) - before}})
    more = threading.active_count() - threads
    print(json.dumps([name, error, list(written), changed, more, brought]), file=out)
"""


def imported(modules: list[str], preload: list[str], folder: Path) -> dict[str, list]:
    """Module -> [error, files written, environment changed, threads started, packages brought]."""
    code = PROBE.format(home=str(HOME), names=modules, preload=preload)
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "SANDBOX_PLUGINS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {row[0]: row[1:] for line in done.stdout.splitlines() if (row := json.loads(line))}


@cache
def everything() -> dict[str, list]:
    """Every module in one process, with torch and what always comes with it there before."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return imported(names(), ["torch", "lightning", "torch._dynamo"], Path(folder))


@pytest.mark.parametrize("name", names())
def test_a_module_imports_without_side_effects(name):
    error, written, environment, threads, _ = everything()[name]
    assert error is None
    assert (written, environment, threads) == ([], [], 0)


@pytest.mark.parametrize("name", names())
def test_packages_that_a_module_may_not_need_are_imported_where_they_are_used(name):
    brought = set(everything()[name][4])
    assert not brought & OPTIONAL
    if not name.startswith("kernels.") or not name.endswith("triton"):
        assert not brought & LAZY


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_stays_light(name, tmp_path):
    brought = set(imported([name], [], tmp_path)[name][4])
    assert not brought & (LIGHT[name] | OPTIONAL)
