"""Import rules: run.py -> sandbox -> contracts <- plugins -> kernels, and the packages of sandbox/.

Imports are parsed, not followed; those under TYPE_CHECKING do not count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
OURS = ("sandbox", "plugins", "kernels", "tests", "benchmarks", "run", "conf")
STDLIB = sys.stdlib_module_names


# Packages of sandbox/, lowest first: each imports from itself and from those before it.
LAYERS = (
    "contracts",
    "config",
    "storage",
    "distributed",
    "runs",
    "data",
    "model",
    "weights",
    "reports",
    "evaluation",
    "training",
    "pipelines",
    "plan",
    "cli",
    "ui",
    "tasks",
    "templates",
)
TOP = {"__init__", "api", "registry", "testing"}  # modules at the top: the public import paths


def modules(folder: str) -> list[str]:
    """Paths of the Python files below a folder of the checkout."""
    return sorted(str(p.relative_to(HOME)) for p in (HOME / folder).rglob("*.py"))


def imported(path: str) -> set[str]:
    """Full names of what a file imports, anywhere in it, but not under TYPE_CHECKING."""
    tree = ast.parse((HOME / path).read_text(encoding="utf-8"))
    skipped = {id(n) for block in _for_types(tree) for n in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            found |= {_full(node.module or "", a.name) for a in node.names}
    return found


def _for_types(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield node


def _full(module: str, name: str) -> str:
    """`from sandbox import config` imports a module, not a name of sandbox."""
    place = HOME / module.replace(".", "/") / name
    return f"{module}.{name}" if place.is_dir() or place.with_suffix(".py").is_file() else module


def third_party(names: set[str]) -> set[str]:
    tops = {n.partition(".")[0] for n in names}
    return {t for t in tops if t not in STDLIB and t not in OURS and t != "__future__"}


def ours(names: set[str]) -> set[str]:
    return {n for n in names if n.partition(".")[0] in OURS}


def below(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


@pytest.mark.parametrize("path", modules("sandbox"))
def test_the_frame_knows_no_concrete_plugin_and_no_kernel(path):
    assert {n for n in ours(imported(path)) if not below(n, "sandbox")} == set()


def test_the_command_is_the_frames_main_and_nothing_else():
    assert imported("run.py") == {"sandbox.cli.main"}


@pytest.mark.parametrize("path", modules("sandbox/contracts"))
def test_contracts_know_nothing_of_the_project_and_no_package(path):
    names = imported(path)
    assert {n for n in ours(names) if not below(n, "sandbox.contracts")} == set()
    assert third_party(names) == set()


@pytest.mark.parametrize("path", modules("kernels"))
def test_kernels_know_no_more_than_torch_triton_and_einops(path):
    names = imported(path)
    assert {n for n in ours(names) if not below(n, "kernels")} == set()
    allowed = {
        "torch",
        "triton",
        "einops",
        *(["numpy", "matplotlib"] if "benchmark" in path else []),
    }
    assert third_party(names) <= allowed


@pytest.mark.parametrize("path", [p for p in modules("plugins") if "/_" not in p])
def test_a_plugin_knows_contracts_kernels_and_shared_blocks_only(path):
    allowed = (
        "sandbox.contracts",
        "sandbox.registry",
        "kernels",
        "plugins._blocks",
        "plugins._configs",
    )
    if path.startswith("plugins/trainer/"):  # trainers read the tensors that the engine writes
        allowed = (*allowed, "sandbox.model.sharding")
    assert {n for n in ours(imported(path)) if not below(n, *allowed)} == set()


@pytest.mark.parametrize("path", modules("plugins/_blocks"))
def test_shared_blocks_know_contracts_kernels_and_one_another_only(path):
    allowed = ("sandbox.contracts", "kernels", "plugins._blocks")
    if path.endswith("video_io.py"):  # prompts and data plugins read images in one way
        allowed = (*allowed, "sandbox.data.image_files", "sandbox.data.video_files")
    if path.endswith("state_dicts.py"):  # all weight files are read and checked in one way
        modules = ("weight_files", "weight_check", "weight_contents")
        allowed = (*allowed, "sandbox.storage", *(f"sandbox.storage.{name}" for name in modules))
    if path.endswith("processes.py"):  # trainers read the tensors that the engine writes
        allowed = (*allowed, "sandbox.model.sharding")
    assert {n for n in ours(imported(path)) if not below(n, *allowed)} == set()


@pytest.mark.parametrize("path", modules("plugins/_configs"))
def test_shared_configs_know_contracts_and_no_package(path):
    names = imported(path)
    assert ours(names) == {"sandbox.contracts"} and third_party(names) == set()


@pytest.mark.parametrize("path", modules("plugins"))
def test_a_file_of_plugins_is_in_a_group_under_its_own_name(path):
    from sandbox.config.root import GROUPS

    parts = Path(path).relative_to("plugins").parts
    assert len(parts) >= 2 and (parts[0] in GROUPS or parts[0] in ("_blocks", "_configs"))


@pytest.mark.parametrize("path", [p for f in ("sandbox", "plugins", "kernels") for p in modules(f)])
def test_the_program_does_not_import_its_judges(path):
    """diffusers is a test dependency; pytest and our tests are no part of the program."""
    names = imported(path)
    if "/templates/" not in path:
        assert not third_party(names) & {"diffusers", "pytest"}
        assert not {n for n in names if below(n, "tests", "benchmarks")}
