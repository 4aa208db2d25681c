"""Which attention backend runs, chosen once at start."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

from workers.kernels.reference import ReferenceKernel
from workers.kernels.signature import Exchange, Kernel, LaneSocket, LayerCache
from workers.kernels.torch_flash import TorchKernel

_log = logging.getLogger("anabranch.kernels")


def select(name: str, device: str) -> Kernel:
    """The backend called `name`; "auto" is the fastest that runs on `device` ("cpu" or "cuda").

    "triton" runs on the CPU only where Triton interprets it (TRITON_INTERPRET=1), for tests, in one thread.
    Raises ValueError for a name or a device no backend has, and for one that is not built or installed here.
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
        f"no attention backend is called {name} on {device}; there are auto, cpu, torch, triton, reference"
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


def compiled_kernel() -> Kernel | None:
    """The C++ kernel with this process's defaults, or None where its extension was not built."""
    if not has_compiled_code():
        return None
    from workers.kernels.cpu.kernel import CpuKernel  # only now: it imports the extension

    return CpuKernel()


def open_exchange(
    kernel: Kernel, layers: Sequence[LayerCache], query_heads: int, scale: float, lane: LaneSocket
) -> Exchange | None:
    """What answers a lane's messages over these layers of one arena; None where the kernel cannot."""
    if not has_compiled_code():
        return None
    from workers.kernels.cpu.kernel import CpuKernel  # only now: it imports the extension

    return kernel.exchange(layers, query_heads, scale, lane) if isinstance(kernel, CpuKernel) else None


def has_compiled_code() -> bool:
    """Whether the extension for CPUs was built."""
    try:
        importlib.import_module("workers.kernels.cpu._native")
    except ImportError:
        return False
    return True


def let_threads_spin() -> None:
    """This process has cores of its own: threads of the C++ kernel may wait for work on them."""
    if has_compiled_code():
        from workers.kernels.cpu import _native

        _native.let_threads_spin(may=True)


@functools.cache
def warn_once() -> None:
    """Say, once a process, that attention is slower than it could be."""
    _log.warning(
        "the C++ attention kernel is not built, so PyTorch attends at about half its speed; "
        "install with a C++ compiler (g++ or clang) at hand"
    )
