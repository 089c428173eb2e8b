"""The same tests, with the Triton kernels run by Triton's interpreter, in a process of their own.

The interpreter is chosen when triton is imported, so the variable must be set before, and for nobody else.
It computes with NumPy, which warns of log(0) = -inf where a row of a tile is masked; on a device that is no
event. Triton 3.6 also converts arrays of one entry to numbers, which NumPy 2.3 deprecates.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_oracle import INTERPRETED

pytest.importorskip("triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
@pytest.mark.parametrize("part", ("forward", "gradients", "agro_loss", "coefficients", "epilogue", "sparse"))
def test_triton_kernels_interpreted(part):
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        "-W",
        "ignore:Conversion of an array:DeprecationWarning",
        str(folder / f"test_kernels_{part}.py"),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 5, done.stdout[-2000:]
