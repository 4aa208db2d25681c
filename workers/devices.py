"""The device a role computes on, as its configuration names it."""

from __future__ import annotations

import torch

from cluster.errors import ConfigError


def open_device(name: str, key: str) -> torch.device:
    """The device called `name` ("cpu" or "cuda") by the configuration's `key`, ready for float32 as promised.

    Raises ConfigError when this process sees no such device.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"{key}: cuda, but this process sees no CUDA device")
        # Some images turn TF32 on by an environment variable: ten bits of mantissa change tokens.
        torch.set_float32_matmul_precision("highest")
    return torch.device(name)
