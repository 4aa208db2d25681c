"""Which attention backend runs, chosen once at start."""

from __future__ import annotations

from workers.kernels.reference import ReferenceKernel
from workers.kernels.signature import Kernel
from workers.kernels.torch_flash import TorchKernel


def select(name: str, device: str) -> Kernel:
    """The backend called `name`; "auto" is the fastest that runs on `device` ("cpu" or "cuda").

    Raises ValueError for a name or a device no backend has.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"no attention backend runs on {device}")
    if name in ("auto", "torch"):
        return TorchKernel()
    if name == "reference" and device == "cpu":
        return ReferenceKernel()
    raise ValueError(f"no attention backend is called {name} on {device}; there are auto, torch, reference")
