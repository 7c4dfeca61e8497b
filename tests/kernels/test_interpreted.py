"""The Triton kernels on a machine without a GPU: `interpreted.py` in a process of its own.

Triton decides when it is imported whether it interprets, and this process has imported it.
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
    told = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(CODE), "-n0", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command, env=told, cwd=CODE.parents[2], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "100%" in ran.stdout
