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
FAST = "(every_gradient_are_right and dtype1) or frame_major or nan or supported or second"


def interpreted(*arguments: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(CODE), "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, *arguments], env=environment, cwd=CODE.parents[2], check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return ran.stdout


def test_a_subset_of_the_interpreted_tests_passes():
    assert "100%" in interpreted("-k", FAST)


@pytest.mark.slow
def test_all_interpreted_tests_pass():
    assert "100%" in interpreted()
