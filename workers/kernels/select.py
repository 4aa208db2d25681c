"""Which attention backend runs, chosen once at start."""

from __future__ import annotations

import functools
import importlib
import logging

from workers.kernels.reference import ReferenceKernel
from workers.kernels.signature import Kernel
from workers.kernels.torch_flash import TorchKernel

_log = logging.getLogger("anabranch.kernels")


def select(name: str, device: str) -> Kernel:
    """The backend called `name`; "auto" is the fastest that runs on `device` ("cpu" or "cuda").

    Raises ValueError for a name or a device no backend has, and for "cpu" where its extension is not built.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"no attention backend runs on {device}")
    if name in ("auto", "cpu") and device == "cpu":
        kernel = compiled_kernel()
        if kernel is not None:
            return kernel
        if name == "cpu":
            raise ValueError("the cpu kernel is not built: install with a C++ compiler at hand")
        warn_once()
    if name in ("auto", "torch"):
        return TorchKernel()
    if name == "reference" and device == "cpu":
        return ReferenceKernel()
    raise ValueError(
        f"no attention backend is called {name} on {device}; there are auto, cpu, torch, reference"
    )


def compiled_kernel() -> Kernel | None:
    """The C++ kernel with this process's defaults, or None where its extension was not built."""
    try:
        importlib.import_module("workers.kernels.cpu._native")
    except ImportError:
        return None
    from workers.kernels.cpu.kernel import CpuKernel  # only now: it imports the extension

    return CpuKernel()


@functools.cache
def warn_once() -> None:
    """Say, once a process, that attention is slower than it could be."""
    _log.warning(
        "the C++ attention kernel is not built, so PyTorch attends at about half its speed; "
        "install with a C++ compiler (g++ or clang) at hand"
    )
