"""The token-major layout on a GPU, written to by one launch for keys and values."""

from __future__ import annotations

from torch import Tensor

from workers.kernels.signature import LayerCache
from workers.kernels.token_major import TokenMajorLayout
from workers.kernels.triton.append import append


class TritonLayout(TokenMajorLayout):
    """The same bytes as its base, so PyTorch's kernel reads its caches too."""

    def append(self, cache: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """See `signature.CacheLayout.append`."""
        device = cache.key.device
        append(cache, slots.to(device), key.to(device), value.to(device))
