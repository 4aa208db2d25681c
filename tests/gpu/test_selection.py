"""Which backend serves a GPU, with and without Triton installed; needs no GPU."""

import os
import subprocess
import sys

_WITHOUT_TRITON = """
import logging, sys
sys.modules["triton"] = None  # as if it were not installed
logging.basicConfig()
from workers.kernels.select import select
print(*(select("auto", "cuda").name for _ in range(3)))
for device in ("cuda", "cpu"):
    try:
        select("triton", device)
    except ValueError as error:
        print(error)
"""


def test_a_gpu_without_triton_is_served_by_pytorch_with_one_warning() -> None:
    """auto falls back and says so once; asked for by name, a missing package is an error that names it, and
    the CPU is no place for it.
    """
    compiling = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRITON], env=compiling, capture_output=True, text=True, check=True
    )
    names, missing, misplaced = done.stdout.splitlines()
    assert names == "torch torch torch"
    assert "anabranch[gpu]" in missing
    assert "triton on cpu" in misplaced
    assert done.stderr.count("triton is not installed") == 1
