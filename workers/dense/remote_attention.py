"""Attention of one step over lanes: queries leave, partials come back and are merged.

Per layer and worker one message each way; what they carry and when is told in `workers.lanes.messages`. The
chunk's attention over itself (Lamina's "new tokens") runs here, between sending and receiving.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from torch import Tensor

from cluster.errors import LaneBroken
from cluster.model_spec import ModelSpec
from workers.dense.lane_set import LaneSet, StepAborted, deadline_of
from workers.dense.operators import RowOperators
from workers.dense.step_layout import RowIndex, StepLayout, WorkerPart
from workers.kernels.signature import Kernel
from workers.lanes.messages import LayerMessage, PartialReply
from workers.partials import empty


@dataclass(slots=True)
class AttentionTimes:
    """Seconds of one micro-batch's step, over its layers.

    attention: compute of the slowest worker of each layer; lane: moving bytes on either side, and waiting
    beyond compute and moving; sent: the dense side's part of moving, handing messages over; waited: the dense
    side's, for replies, and for a worker in its own process.
    """

    attention_s: float = 0.0
    lane_s: float = 0.0
    sent_s: float = 0.0
    waited_s: float = 0.0


class StepAttention:
    """`AttentionPort` of one micro-batch during one step.

    Raises `StepAborted` as soon as one worker cannot do its part; lanes then hold replies nobody takes,
    which the next step overwrites.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: StepLayout,
        lanes: LaneSet,
        kernel: Kernel,
        operators: RowOperators,
        step: int,
        micro_batch: int,
    ) -> None:
        self.times = AttentionTimes()
        self._spec = spec
        self._layout = layout
        self._lanes = lanes
        self._kernel = kernel
        self._operators = operators
        self._step = step
        self._micro_batch = micro_batch
        self._scale = spec.head_size**-0.5
        self._allowances_ms = [lanes.allowance_ms(part.predicted_s(spec)) for part in layout.workers]
        self._deadlines_s = [0.0] * len(layout.workers)
        self._query: Tensor | None = None
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._own: tuple[Tensor, Tensor] | None = None
        """out and lse of chunks over themselves; None where a row sees only itself, which the merge does."""
        self._gathered: tuple[Tensor, Tensor] | None = None
        """Of the shards: out [parts x rows, query_heads, head_size], lse [parts x rows, query_heads]."""

    @property
    def asked(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(rows, cached tokens that they see) of each sequence, by worker that is asked about any."""
        return tuple(
            tuple((row.count, row.visible_end - row.visible_first) for row in part.plan if row.sees)
            for part in self._layout.workers
            if part.queries is not None
        )

    @property
    def appended(self) -> tuple[int, ...]:
        """Rows that each worker appends, of those that append any."""
        return tuple(
            sum(len(row.token_ids) for row in part.plan)
            for part in self._layout.workers
            if part.appends is not None
        )

    def send_query(self, layer: int, query: Tensor) -> None:
        """See `AttentionPort`. Carries the keys and values of the layer before along."""
        self._query = query
        fresh, self._fresh = self._fresh, None
        for index, part in enumerate(self._layout.workers):
            message = self._message(index, part, layer, query, fresh)
            if message is not None:
                self._hand_over(part, message)
                self._deadlines_s[index] = deadline_of(message)

    def send_key_value(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See `AttentionPort`. Those of the last layer leave at once, the others with the next query."""
        assert self._query is not None
        self._fresh = (key, value)
        if layer == self._spec.layers - 1:
            for index, part in enumerate(self._layout.workers):
                message = self._message(index, part, layer + 1, None, self._fresh)
                if message is not None:
                    self._hand_over(part, message)
        if not self._layout.are_single_rows:
            window, sizes = self._spec.sliding_windows[layer], self._layout.chunk_sizes
            own = self._kernel.causal(self._query, key, value, sizes, self._scale, window)
            self._own = (own.out, own.lse)

    def receive(self, layer: int) -> Tensor:
        """See `AttentionPort`. Raises StepAborted."""
        waited_s = compute_s = moved_s = 0.0
        for index, part in enumerate(self._layout.workers):
            if part.queries is not None:
                began_s = monotonic()
                reply = self._lanes.receive(
                    part.worker, self._step, self._micro_batch, layer, self._deadlines_s[index]
                )
                waited_s += monotonic() - began_s
                compute_s = max(compute_s, reply.compute_seconds)
                moved_s = max(moved_s, reply.transfer_seconds)
                self._gather(part, reply)
        self.times.waited_s += waited_s
        self.times.attention_s += compute_s
        self.times.lane_s += max(moved_s, waited_s - compute_s)
        return self._merged()

    def _hand_over(self, part: WorkerPart, message: LayerMessage) -> None:
        """Send. A local worker attends during that, and nothing else happens meanwhile."""
        began_s = monotonic()
        self._lanes.send(part.worker, message)
        took_s = monotonic() - began_s
        if self._lanes.is_local(part.worker):
            self.times.waited_s += took_s
        else:
            self.times.sent_s += took_s
            self.times.lane_s += took_s

    def _message(
        self,
        index: int,
        part: WorkerPart,
        layer: int,
        query: Tensor | None,
        fresh: tuple[Tensor, Tensor] | None,
    ) -> LayerMessage | None:
        """What a worker gets for a layer; None where it has no part in it."""
        asks = query is not None and part.queries is not None
        appends = fresh is not None and part.appends is not None
        if layer > 0 and not asks and not appends:
            return None
        plan = None
        if layer == 0:
            # Without a query there is no reply, and so no NeedFull: such a plan goes whole.
            plan = self._lanes.encode(part.worker, self._step, self._micro_batch, part.plan, whole=not asks)
        key, value = fresh if fresh is not None and appends else (None, None)
        return LayerMessage(
            self._step,
            self._micro_batch,
            layer,
            self._allowances_ms[index],
            plan,
            _take(query, part.queries) if asks else None,
            _take(key, part.appends),
            _take(value, part.appends),
            self._spec.sliding_windows[layer] if asks else None,
        )

    def _gather(self, part: WorkerPart, reply: PartialReply) -> None:
        """Put a reply's rows where the merge finds them. The buffers start empty, and each layer
        overwrites the same places, so a row without a shard in some place stays empty there.

        Raises StepAborted for a reply of other rows than were asked about.
        """
        if len(reply.out) != len(part.places):
            answered = f"{len(reply.out)} rows answered where {len(part.places)} were asked about"
            raise StepAborted(part.worker, LaneBroken(answered))
        device = part.places.device
        if self._layout.is_direct:
            self._gathered = (reply.out.to(device), reply.lse.to(device))
            return
        if self._gathered is None:
            places = self._layout.parts_most * self._layout.rows
            nothing = empty(places, self._spec.query_heads, self._spec.head_size, device)
            self._gathered = (nothing.out, nothing.lse)
        out, lse = self._gathered
        out.index_copy_(0, part.places, reply.out.to(device))
        lse.index_copy_(0, part.places, reply.lse.to(device))

    def _merged(self) -> Tensor:
        """Outputs over own part and shards, in the order of their positions but the own first."""
        assert self._query is not None
        if self._layout.are_single_rows:
            assert self._fresh is not None
            return self._operators.merge_own(self._query, *self._fresh, self._scale, self._gathered)
        assert self._own is not None
        return self._operators.merge(self._own, self._gathered, self._query.dtype)


def _take(tensor: Tensor | None, rows: RowIndex | None) -> Tensor | None:
    if tensor is None or rows is None:
        return None
    if isinstance(rows, slice) and rows.stop - rows.start == tensor.shape[0]:
        return tensor  # every row: a view of them costs more than to ask
    return tensor[rows]
