"""The C++ kernel behind the signature: packs a step's spans once, then one call a layer."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workers.kernels.checks import check_spans
from workers.kernels.cpu import _native
from workers.kernels.cpu.layout import PackedCache, PackedLayout, packed_cache
from workers.kernels.signature import AttendResult, LayerCache, SlotOptions, Span
from workers.kernels.torch_flash import TorchKernel

_PLANS_MOST = 32
"""Steps remembered: those of some lanes and micro-batches, each with a few slices."""


class CpuKernel:
    """Reads the cache at the speed of memory. What PyTorch does as well or only it does goes to PyTorch:
    chunks over themselves, biases, positions and masses.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, level: str | None = None) -> None:
        """`threads`: of each call, PyTorch's number where None. `level`: an instruction set of
        `levels()`, the best where None. Raises ValueError for a level this machine has not.
        """
        self.layout = PackedLayout()
        self._threads = threads
        self._level = level or levels()[0]
        if self._level not in levels():
            raise ValueError(f"no instruction set {self._level} here; there are {len(levels())}: {levels()}")
        self._plans = _Plans()
        self._torch = TorchKernel()

    def attend(
        self,
        query: Tensor,
        spans: Sequence[Span],
        cache: LayerCache,
        scale: float,
        window: int | None = None,
        options: Sequence[SlotOptions] | None = None,
    ) -> AttendResult:
        """See `signature.Kernel.attend`."""
        packed = packed_cache(cache)
        if options is not None:
            return self._attend_unpacked(query, spans, packed, scale, window, options)
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} sees nothing")
        out = torch.empty(query.shape, dtype=torch.float32)
        lse = torch.empty(query.shape[:2])
        _native.attend(
            self._plans.of(spans),
            packed.native,
            query.contiguous(),
            out,
            lse,
            scale,
            window or 0,
            self._threads or torch.get_num_threads(),
            self._level,
        )
        return AttendResult(out, lse, (None,) * len(spans))

    def causal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunks: Sequence[int],
        scale: float,
        window: int | None,
    ) -> AttendResult:
        """See `signature.Kernel.causal`."""
        return self._torch.causal(query, key, value, chunks, scale, window)

    def _attend_unpacked(
        self,
        query: Tensor,
        spans: Sequence[Span],
        cache: PackedCache,
        scale: float,
        window: int | None,
        options: Sequence[SlotOptions] | None,
    ) -> AttendResult:
        """With PyTorch, over token-major copies of the blocks that the spans name."""
        check_spans(spans, query.shape[0], cache.blocks, cache.block_tokens)
        named = sorted({block for span in spans for block in span.blocks})
        place = {block: index for index, block in enumerate(named)}
        slots = torch.tensor(named, dtype=torch.int64)[:, None] * cache.block_tokens
        slots = (slots + torch.arange(cache.block_tokens)).flatten()
        key, value = (rows.to(query) for rows in self.layout.read(cache, slots))
        sizes = (len(named), cache.block_tokens, *key.shape[1:])
        copied = LayerCache(key.view(sizes), value.view(sizes))
        moved = [replace(span, blocks=[place[block] for block in span.blocks]) for span in spans]
        return self._torch.attend(query, moved, copied, scale, window, options)


def levels() -> tuple[str, ...]:
    """The instruction sets this machine has code for, best first."""
    return tuple(_native.levels())


class _Plans:
    """Spans packed for C++, remembered because every layer of a step asks for the same ones.

    Found by the identity of the spans, or of their tuple, so that none is looked at; they are kept so that no
    other can take their place. Only spans whose blocks cannot change are remembered.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[int | tuple[int, ...], tuple[tuple[Span, ...], _native.Plan]] = OrderedDict()

    def of(self, spans: Sequence[Span]) -> _native.Plan:
        """The plan of these spans. Raises ValueError when they contradict themselves."""
        key = id(spans) if isinstance(spans, tuple) else tuple(map(id, spans))
        known = self._kept.get(key)
        if known is not None:
            return known[1]
        plan = _pack(spans)
        if all(isinstance(span.blocks, tuple) for span in spans):
            self._kept[key] = (tuple(spans), plan)
            while len(self._kept) > _PLANS_MOST:
                # Another thread may take the last one first: then there is nothing left to drop.
                with contextlib.suppress(KeyError):
                    self._kept.popitem(last=False)
        return plan


def _pack(spans: Sequence[Span]) -> _native.Plan:
    fields = [
        (
            span.row_start,
            span.row_count,
            span.query_position,
            span.first_position,
            span.visible_start,
            span.visible_end,
            len(span.blocks),
        )
        for span in spans
    ]
    table = [block for span in spans for block in span.blocks]
    packed = torch.tensor(fields, dtype=torch.int64).view(-1, 7)
    return _native.Plan(packed, torch.tensor(table, dtype=torch.int64))
