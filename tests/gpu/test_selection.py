"""Which backend serves a GPU, with and without Triton installed; needs no GPU."""

import subprocess
import sys

import pytest

from workers.kernels.select import select

_WITHOUT_TRITON = """
import logging, sys
sys.modules["triton"] = None  # as if it were not installed
logging.basicConfig()
from workers.kernels.select import select
print(*(select("auto", "cuda").name for _ in range(3)))
try:
    select("triton", "cuda")
except ValueError as error:
    print(error)
"""


def test_a_gpu_without_triton_is_served_by_pytorch_with_one_warning() -> None:
    """auto falls back and says so once; asked for by name, a missing package is an error that names it."""
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], capture_output=True, text=True, check=True)
    names, refusal = done.stdout.splitlines()
    assert names == "torch torch torch"
    assert "anabranch[gpu]" in refusal
    assert done.stderr.count("triton is not installed") == 1


def test_triton_serves_gpus_only() -> None:
    """By name on cuda; refused on the CPU, where only tests interpret it."""
    assert select("triton", "cuda").name == "triton"
    with pytest.raises(ValueError, match="triton on cpu"):
        select("triton", "cpu")
