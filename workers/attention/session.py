"""The attention side of one lane: plans in, partials out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor

from cluster.errors import InvalidRequest, NeedFull
from workers.attention.arena import Arena
from workers.attention.prepared_step import PreparedStep, slices
from workers.attention.store import Store
from workers.attention.turns import Turns
from workers.kernels.signature import Kernel, Span
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.plans import PlanDecoder
from workers.partials import Partial, empty


class _CountedTurn:
    """The store's turn; what is done in it counts as a message's own time, waiting for it does not.

    A class: a generator as a context costs ten microseconds where attention has emptied the caches.
    """

    def __init__(self, turns: Turns) -> None:
        self.busy_s = 0.0
        self._turns = turns
        self._began_s = 0.0

    def __enter__(self) -> None:
        self._turns.__enter__()
        self._began_s = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.busy_s += time.monotonic() - self._began_s
        self._turns.__exit__(kind, error, trace)


class AttendSession:
    """Serves the messages of one lane in order (a `LaneHandler`); several lanes share store and arena.

    A micro-batch stands at one step; a message of another step without its plan is answered NeedFull.
    Each slice of at most `slice_rows` query rows takes its own turn of the store's fair lock, so that a
    long chunk of one lane does not keep the decoding rows of another waiting; an append shares the turn of a
    message's only slice.
    """

    def __init__(
        self,
        store: Store,
        arena: Arena,
        kernel: Kernel,
        slice_rows: int,
        on_busy: Callable[[float], None],
    ) -> None:
        self._store = store
        self._arena = arena
        self._kernel = kernel
        self._slice_rows = slice_rows
        self._decoder = PlanDecoder()
        self._steps: dict[int, tuple[int, PreparedStep, list[list[Span]]]] = {}
        self._on_busy = on_busy
        self._turn = _CountedTurn(store.turns)

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """Append, then attend. Raises errors of the tree; what was appended by then stays uncommitted."""
        self._turn.busy_s = 0.0
        try:
            step, groups = self._step(message)
            with self._turn:
                self._append(step, message)
                partial = self._attend_at_once(step, groups, message)
            if message.query is None:
                return None
            if partial is None:
                partial = self._attend(step, groups, message.query, message)
        finally:
            self._on_busy(self._turn.busy_s)
        return PartialReply(
            message.step, message.micro_batch, message.layer, partial.out, partial.lse, self._turn.busy_s
        )

    def _step(self, message: LayerMessage) -> tuple[PreparedStep, list[list[Span]]]:
        if message.plan is not None:
            self._steps.pop(message.micro_batch, None)
            rows = self._decoder.decode(message.micro_batch, message.plan)
            with self._turn:
                prepared = PreparedStep(self._store, self._arena, rows)
            groups = slices(prepared.spans, self._slice_rows)
            self._steps[message.micro_batch] = (message.step, prepared, groups)
        held = self._steps.get(message.micro_batch)
        if held is None or held[0] != message.step:
            raise NeedFull(f"micro-batch {message.micro_batch} has no plan for step {message.step} here")
        return held[1], held[2]

    def _append(self, step: PreparedStep, message: LayerMessage) -> None:
        if message.key is not None and message.value is not None:
            step.append(message.layer - 1, message.key, message.value)

    def _attend_at_once(
        self, step: PreparedStep, groups: Sequence[Sequence[Span]], message: LayerMessage
    ) -> Partial | None:
        """All rows in the turn of their append, where they are few enough and there is something to see."""
        query = message.query
        if query is None:
            return None
        self._check_query(step, query, message.layer)
        if len(groups) != 1 or not groups[0]:
            return None
        part = step.attend(message.layer, query, groups[0], self._kernel, message.window)
        if part.out.device == query.device:
            return part
        # Within the turn: where a GPU attends, the result is waited for only here.
        return Partial(part.out.to(query.device), part.lse.to(query.device))

    def _check_query(self, step: PreparedStep, query: Tensor, layer: int) -> None:
        geometry = self._arena.geometry
        if tuple(query.shape) != (step.rows, geometry.query_heads, geometry.head_size):
            raise InvalidRequest(f"a query of {tuple(query.shape)} where {step.rows} rows are due")
        if not 0 <= layer < geometry.layers:
            raise InvalidRequest(f"layer {layer} of {geometry.layers}")

    def _attend(
        self, step: PreparedStep, groups: Sequence[Sequence[Span]], query: Tensor, message: LayerMessage
    ) -> Partial:
        """Slice by slice, each in a turn of its own."""
        geometry = self._arena.geometry
        whole = empty(step.rows, geometry.query_heads, geometry.head_size, query.device)
        for group in groups:
            if group:
                self._attend_slice(step, group, query, message, whole)
        return whole

    def _attend_slice(
        self, step: PreparedStep, group: Sequence[Span], query: Tensor, message: LayerMessage, whole: Partial
    ) -> None:
        """Attend some rows, consecutive in the step, into their part of the whole."""
        first, last = group[0].row_start, group[-1].row_start + group[-1].row_count
        local = [_shifted(span, first) for span in group]
        with self._turn:
            part = step.attend(message.layer, query[first:last], local, self._kernel, message.window)
            # As above.
            whole.out[first:last] = part.out
            whole.lse[first:last] = part.lse


def _shifted(span: Span, rows: int) -> Span:
    if rows == 0:
        return span
    return Span(
        row_start=span.row_start - rows,
        row_count=span.row_count,
        query_position=span.query_position,
        blocks=span.blocks,
        first_position=span.first_position,
        visible_start=span.visible_start,
        visible_end=span.visible_end,
    )
