"""The Triton kernels without a GPU: runs `interpreted.py` in a separate process.

Triton reads TRITON_INTERPRET at import, and this process has already imported it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CODE = Path(__file__).with_name("interpreted.py")


@pytest.mark.slow
def test_all_interpreted_tests_pass():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(CODE), "-n0", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command, env=environment, cwd=CODE.parents[2], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "100%" in ran.stdout
