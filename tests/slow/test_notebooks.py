"""Each notebook runs from top to bottom, with one optimizer step instead of hundreds."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from tests.test_notebooks import NOTEBOOKS

pytestmark = pytest.mark.slow

HOME = NOTEBOOKS[0].parent.parent
# The kernels notebook runs first because it decides how Triton is imported.
ORDER = sorted(NOTEBOOKS, key=lambda path: (path.stem != "05_kernels", path.stem))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One process for all notebooks, because imports take longer than a notebook."""
    own = {"SANDBOX_STEPS": "1", "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    # IPC instead of TCP: another process may take a free port before the kernel binds it.
    with TemporaryDirectory() as folder:  # sockets need a short path
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")), env=os.environ | own)
        yield manager
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", ORDER, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, kernel):
    book = nbformat.read(path, 4)
    forget = nbformat.v4.new_code_cell("%reset -f")  # clears the variables of the previous notebook
    book.cells.insert(0, forget)
    NotebookClient(book, km=kernel, timeout=600).execute(cleanup_kc=False)
    outputs = [o for cell in book.cells for o in cell.get("outputs", ())]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
