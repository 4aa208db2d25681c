"""The attention side of one lane: plans in, partials out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from cluster.emulation import EmulatedTimes, Padding
from cluster.errors import InvalidRequest, NeedFull
from cluster.fault_points import reach
from cluster.types import WIRE_VERSION
from workers.attention.arena import Arena
from workers.attention.prepared_step import PreparedStep, slices
from workers.attention.store import Store
from workers.attention.straight import StraightAnswers
from workers.attention.turns import Turns
from workers.kernels.select import open_exchange
from workers.kernels.signature import Kernel, LaneSocket, Span
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.plans import PlanDecoder
from workers.lanes.sockets import SocketLink
from workers.partials import Partial, empty


class AttentionPace:
    """The device of this worker, where another one is emulated: attending lasts as long as it would there."""

    def __init__(self, times: EmulatedTimes) -> None:
        self.padding = Padding()
        self._times = times

    def fill(self, spans: Sequence[Span], busy_s: float) -> None:
        """Wait for what is left after `busy_s` of attending over spans."""
        wanted_s = self._times.attend_s(
            (span.row_count, span.visible_end - span.visible_start) for span in spans
        )
        slack_s = self._times.slack_s(sum(span.row_count for span in spans))
        self.padding.until(time.monotonic() + wanted_s - busy_s, slack_s)


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


@dataclass(frozen=True, slots=True)
class _Slice:
    """Consecutive rows of a step that are attended in one turn; rows of their spans count from its first."""

    first: int
    end: int
    spans: tuple[Span, ...]


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
        pace: AttentionPace | None = None,
    ) -> None:
        """`pace`: of the device that is emulated, if one is."""
        self._pace = pace
        self._store = store
        self._arena = arena
        self._kernel = kernel
        self._slice_rows = slice_rows
        self._decoder = PlanDecoder()
        self._steps: dict[int, tuple[int, PreparedStep, tuple[_Slice, ...]]] = {}
        self._on_busy = on_busy
        self._turn = _CountedTurn(store.turns)
        self._straight: StraightAnswers | None = None

    def straight(self, link: SocketLink, incarnation: int) -> StraightAnswers | None:
        """What answers this lane's plain messages straight off its socket, where the kernel can, and no time
        of another device is kept.
        """
        if self._pace is not None:
            return None
        geometry = self._arena.geometry
        layers = [self._arena.layer(index) for index in range(geometry.layers)]
        lane = LaneSocket(link.fileno(), incarnation, WIRE_VERSION, link.spin_s)
        scale = geometry.head_size**-0.5
        exchange = open_exchange(self._kernel, layers, geometry.query_heads, scale, lane)
        if exchange is not None:
            self._straight = StraightAnswers(exchange, self._store.turns, link, self._on_busy)
        return self._straight

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """Append, then attend. Raises errors of the tree; what was appended by then stays uncommitted."""
        self._turn.busy_s = 0.0
        try:
            step, parts = self._step(message)
            with self._turn:
                self._append(step, message)
                reach("append-apply")
                partial = self._attend_at_once(step, parts, message)
            if message.query is None:
                return None
            if partial is None:
                partial = self._attend(step, parts, message.query, message)
            if self._pace is not None:
                with self._turn:  # the emulated device is still at it, so nobody else's turn comes
                    self._pace.fill(step.spans, self._turn.busy_s)
        finally:
            self._on_busy(self._turn.busy_s)
        return PartialReply(
            message.step, message.micro_batch, message.layer, partial.out, partial.lse, self._turn.busy_s
        )

    def _step(self, message: LayerMessage) -> tuple[PreparedStep, tuple[_Slice, ...]]:
        if message.plan is not None:
            self._steps.pop(message.micro_batch, None)
            if self._straight is not None:
                self._straight.end(message.micro_batch)
            rows = self._decoder.decode(message.micro_batch, message.plan)
            with self._turn:
                prepared = PreparedStep(self._store, self._arena, rows)
            parts = _slices(prepared, self._slice_rows)
            self._steps[message.micro_batch] = (message.step, prepared, parts)
            if self._straight is not None and len(parts) == 1:
                self._straight.begin(message.micro_batch, message.step, prepared, parts[0].spans)
        held = self._steps.get(message.micro_batch)
        if held is None or held[0] != message.step:
            raise NeedFull(f"micro-batch {message.micro_batch} has no plan for step {message.step} here")
        return held[1], held[2]

    def _append(self, step: PreparedStep, message: LayerMessage) -> None:
        if message.key is not None and message.value is not None:
            step.append(message.layer - 1, message.key, message.value)

    def _attend_at_once(
        self, step: PreparedStep, parts: Sequence[_Slice], message: LayerMessage
    ) -> Partial | None:
        """All rows in the turn of their append, where they are few enough and there is something to see."""
        query = message.query
        if query is None:
            return None
        self._check_query(step, query, message.layer)
        if len(parts) != 1:
            return None
        found = step.attend(message.layer, query, parts[0].spans, self._kernel, message.window)
        if found.out.device == query.device:
            return found
        # Within the turn: where a GPU attends, the result is waited for only here.
        return Partial(found.out.to(query.device), found.lse.to(query.device))

    def _check_query(self, step: PreparedStep, query: Tensor, layer: int) -> None:
        geometry = self._arena.geometry
        if tuple(query.shape) != (step.rows, geometry.query_heads, geometry.head_size):
            raise InvalidRequest(f"a query of {tuple(query.shape)} where {step.rows} rows are due")
        if not 0 <= layer < geometry.layers:
            raise InvalidRequest(f"layer {layer} of {geometry.layers}")

    def _attend(
        self, step: PreparedStep, parts: Sequence[_Slice], query: Tensor, message: LayerMessage
    ) -> Partial:
        """Slice by slice, each in a turn of its own."""
        geometry = self._arena.geometry
        whole = empty(step.rows, geometry.query_heads, geometry.head_size, query.device)
        for part in parts:
            rows = slice(part.first, part.end)
            with self._turn:
                found = step.attend(message.layer, query[rows], part.spans, self._kernel, message.window)
                # As above.
                whole.out[rows], whole.lse[rows] = found.out, found.lse
        return whole


def _slices(step: PreparedStep, rows_most: int) -> tuple[_Slice, ...]:
    """Those of a step, made once for all its layers."""
    groups = [tuple(group) for group in slices(step.spans, rows_most) if group]
    if len(groups) == 1:
        return (_Slice(0, step.rows, groups[0]),)
    return tuple(
        _Slice(
            group[0].row_start,
            group[-1].row_start + group[-1].row_count,
            tuple(_shifted(span, group[0].row_start) for span in group),
        )
        for group in groups
    )


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
