"""Which attention backend runs, chosen once at start."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

from workers.kernels.reference import ReferenceKernel
from workers.kernels.signature import Kernel
from workers.kernels.torch_flash import TorchKernel

_log = logging.getLogger("anabranch.kernels")


def select(name: str, device: str) -> Kernel:
    """The backend called `name`; "auto" is the fastest that runs on `device` ("cpu" or "cuda").

    "triton" runs on the CPU only where Triton interprets it (TRITON_INTERPRET=1), for tests, in one thread.
    Raises ValueError for a name or a device no backend has, and for "triton" where that is not installed.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"no attention backend runs on {device}")
    runs_interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name in ("auto", "triton") and (device == "cuda" or runs_interpreted):
        if importlib.util.find_spec("triton") is not None:
            return _triton_kernel()
        if name == "triton":
            raise ValueError("the triton kernel needs the package triton: pip install 'anabranch[gpu]'")
        _warn_without_triton()
    if name in ("auto", "torch"):
        return TorchKernel()
    if name == "reference" and device == "cpu":
        return ReferenceKernel()
    raise ValueError(
        f"no attention backend is called {name} on {device}; there are auto, torch, triton, reference"
    )


def _triton_kernel() -> Kernel:
    from workers.kernels.triton.kernel import TritonKernel  # only now: machines without a GPU lack triton

    return TritonKernel()


@functools.cache
def _warn_without_triton() -> None:
    _log.warning(
        "triton is not installed, so PyTorch attends on the GPU, slower and through copies of the cache: "
        "pip install 'anabranch[gpu]'"
    )
