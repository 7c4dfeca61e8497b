"""Notebooks are committed as they were written: no outputs, and nothing but what users may call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

import sandbox

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PUBLIC = {
    *("sandbox", "sandbox.api", "sandbox.contracts", "sandbox.registry", "kernels"),
    *("matplotlib.pyplot", "numpy", "torch", "torch.nn.functional"),
    *("collections.abc", "dataclasses", "os", "pathlib", "time", "typing"),
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path: Path) -> ast.Module:
    """All cells of code as one module."""
    cells = nbformat.read(path, 4).cells
    return ast.parse("\n".join(c.source for c in cells if c.cell_type == "code"), path.name)


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name), the name empty for a plain import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or ".", alias.name) for alias in node.names)


def test_there_are_seven_in_order():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"0{n}_" for n in range(1, 8)]


@each_notebook
def test_a_notebook_is_committed_without_outputs(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)  # each cell has an id of its own
    assert book.metadata.keys() == {"kernelspec", "language_info"}
    assert book.cells[0].source.startswith("# ")
    for cell in book.cells:
        assert cell.source.isascii() and not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@each_notebook
def test_a_notebook_calls_only_what_is_public(path):
    found = list(imported(code(path)))
    assert {module for module, _ in found} - PUBLIC == set()
    assert {name for module, name in found if module == "sandbox"} <= {*sandbox.__all__}


@each_notebook
def test_only_the_last_notebooks_define_plugins(path):
    classes = [node.name for node in ast.walk(code(path)) if isinstance(node, ast.ClassDef)]
    plugins = {"06_your_own_plugin": "Mixer", "07_a_training_method": "Contrastive"}
    assert classes == ([plugins[path.stem], "Config"] if path.stem in plugins else [])


@each_notebook
def test_a_notebook_takes_its_steps_from_the_environment(path):
    assert "SANDBOX_STEPS" in {n.value for n in ast.walk(code(path)) if isinstance(n, ast.Constant)}
