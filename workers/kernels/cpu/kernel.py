"""The C++ kernel behind the signature: packs a step's spans once, then one call a layer."""

from __future__ import annotations

import contextlib
import functools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.kernels.checks import check_causal, check_spans
from workers.kernels.cpu import _native
from workers.kernels.cpu.layout import TYPES, PackedCache, PackedLayout, packed_cache
from workers.kernels.signature import AttendResult, CacheShape, LaneSocket, LayerCache, SlotOptions, Span
from workers.kernels.torch_flash import TorchKernel

_PLANS_MOST = 32
"""Steps remembered: those of some lanes and micro-batches, each with a few slices."""
_OWN_BLOCK_TOKENS = 64
"""Of chunks that are packed to attend over themselves: what the kernel walks over at once."""


class CpuKernel:
    """Reads the cache at the speed of memory. Biases, positions and masses go to PyTorch."""

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
        self._own = _OwnCaches()
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
        out, lse = self._walk(self._plans.of(spans), packed, query, scale, window)
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
        """See `signature.Kernel.causal`. Keys and values are packed first, as a cache is."""
        check_causal(query, key, value, chunks, window)
        plan, slots, blocks = _over_themselves(tuple(chunks))
        cache = self._own.cache(blocks, key)
        self.layout.append(cache, slots, key, value)
        return AttendResult(*self._walk(plan, cache, query, scale, window), ())

    def exchange(
        self, layers: Sequence[LayerCache], query_heads: int, scale: float, lane: LaneSocket
    ) -> CpuExchange:
        """Serve a lane over the layers of one arena."""
        return CpuExchange(
            self._plans,
            [packed_cache(layer).native for layer in layers],
            lane.descriptor,
            lane.incarnation,
            lane.wire_version,
            query_heads,
            scale,
            self._threads or torch.get_num_threads(),
            lane.spin_s,
            self._level,
        )

    def _walk(
        self, plan: _native.Plan, cache: PackedCache, query: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse of a plan. Addresses are passed: DLPack costs more than memory for a small result."""
        if query.ndim != 3 or query.dtype not in TYPES or not query.is_cpu:
            raise ValueError(f"a query {list(query.shape)} of {query.dtype} on {query.device}")
        query = query.contiguous()
        rows, heads, size = query.shape
        out, lse = torch.empty((rows, heads, size)), torch.empty((rows, heads))
        _native.attend(
            *(plan, cache.native, query.data_ptr(), TYPES[query.dtype], rows, heads, size),
            *(out.data_ptr(), lse.data_ptr(), scale, window or 0),
            *(self._threads or torch.get_num_threads(), self._level),
        )
        return out, lse

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


class CpuExchange(_native.Exchange):
    """See `signature.Exchange`."""

    def __init__(self, plans: _Plans, *terms: Any) -> None:
        super().__init__(*terms)
        self._plans = plans

    def begin(self, micro_batch: int, step: int, spans: Sequence[Span], rows: int, slots: Tensor) -> None:
        """See `signature.Exchange.begin`."""
        self.begin_plan(micro_batch, step, self._plans.of(spans), rows, slots)


class _OwnCaches(threading.local):
    """Where a thread packs chunks; it grows, and is used again for the next layer."""

    def __init__(self) -> None:
        self._kept: PackedCache | None = None

    def cache(self, blocks: int, rows: Tensor) -> PackedCache:
        """Room for so many blocks of rows like these, [rows, kv_heads, head_size]."""
        _, kv_heads, head_size = rows.shape
        kept = self._kept
        sizes = None if kept is None else (kept.dtype, kept.kv_heads, kept.head_size)
        if kept is None or kept.blocks < blocks or sizes != (rows.dtype, kv_heads, head_size):
            shape = CacheShape(1, max(16, 2 * blocks), _OWN_BLOCK_TOKENS, kv_heads, head_size, rows.dtype)
            kept = self._kept = packed_cache(PackedLayout().allocate(shape, torch.device("cpu"))[0])
        return kept


@functools.lru_cache(maxsize=_PLANS_MOST)
def _over_themselves(chunks: tuple[int, ...]) -> tuple[_native.Plan, Tensor, int]:
    """The plan of chunks of these sizes over themselves, the slots of all rows, and how many blocks they
    take: each chunk begins with one. Remembered, because every layer of a step asks for the same.
    """
    fields, slots = [], []
    row = block = 0
    for count in chunks:
        needed = -(-count // _OWN_BLOCK_TOKENS)
        fields.append((row, count, 0, 0, 0, count, needed))
        slots.append(torch.arange(count) + block * _OWN_BLOCK_TOKENS)
        row, block = row + count, block + needed
    table = torch.tensor(fields, dtype=torch.int64).view(-1, 7)
    plan = _native.Plan(table, torch.arange(block), causal=True)
    return plan, torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64), block


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
    table = array("q")  # takes a thousand blocks in the time a tensor takes a few
    for span in spans:
        table.extend(span.blocks)
    blocks = torch.frombuffer(table, dtype=torch.int64) if table else torch.empty(0, dtype=torch.int64)
    return _native.Plan(torch.tensor(fields, dtype=torch.int64).view(-1, 7), blocks, causal=False)
