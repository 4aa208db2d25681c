"""Moves shards between attention workers while their sequences go on. Used by the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from cluster.errors import AnabranchError
from cluster.telemetry import logger
from cluster.types import Epoch, SequenceKey, ShardId, WorkerId
from workers.dense.rooms import PullWanted
from workers.dense.sequences import LiveSequence, Placed
from workers.dense.submissions import Door

_log = logger("dense.mover")

_RETRY_S = 0.5
"""Pause after a move that failed, before others begin by themselves; also after a piece in vain."""

_MOVES_MOST = 2
"""Shards under way at once, so that steps are not disturbed; without those whose sequences wait for room."""

_MOVES_IN_ALL_MOST = 8
"""With those."""


@dataclass(slots=True, eq=False)
class _Move:
    """One shard, or its beginning, on its way.

    copying: pieces of what is certain are pulled, one at a time; the sequence decodes on
       |
    frozen: the sequence takes no step and asks for no room; what is left, less than a piece, is pulled
       |    (not where only the beginning moves: nothing of it is still being written)
    switched: the map names the copy, the source's shard or its beginning is freed, the sequence goes on
    """

    sequence: LiveSequence
    source: tuple[WorkerId, Epoch, ShardId]
    target: tuple[WorkerId, Epoch]
    end: int | None = None
    """Where the part that moves ends; None where all does."""
    copy: Placed | None = None
    waits: bool = False
    """A piece is being pulled."""
    is_last: bool = False
    """The piece that was pulled frozen: whatever came, the switch follows."""
    in_vain: tuple[int, float] | None = None
    """The last piece brought nothing: the tokens computed by then, and until when nothing is pulled unless
    there are more.
    """


class Mover:
    """Carries out moves at step boundaries; empties attention workers that drain.

    Committed KV never changes, so pieces are copied beside decoding. Only the last one stops its sequence,
    for as long as it takes. What the source had not committed by then is computed again: a token, as a rule.
    """

    def __init__(self, door: Door, piece_tokens: int, shards_most: int) -> None:
        """`shards_most`: a sequence that has so many is not split further, for each part that moves adds a
        shard, and it must be able to grow.
        """
        self._door = door
        self._piece_tokens = piece_tokens
        self._shards_most = shards_most
        self._moves: list[_Move] = []
        self._retry_s = 0.0

    def start(self, key: SequenceKey, source: WorkerId, target: WorkerId, tokens: int | None = None) -> None:
        """Begin to move the first shard that a sequence has on `source`, or the whole blocks of its first
        `tokens`; nothing where it has none, or is on the way already, or either side is a dense worker's own
        arena.
        """
        members = self._door.pool.members
        sequence, epoch = self._door.table.live(key), members.remote_epoch(target)
        if sequence is None or epoch is None or source == target or self.is_moving(sequence):
            return
        if tokens is not None and self._is_busy():
            return  # a part is an order of the controller's, which plans it anew; drains go first
        for placed in sequence.shards:
            if placed.shard.worker == source and members.remote_epoch(source) == placed.shard.epoch:
                end = self._part_end(placed, tokens)
                may_split = end is None or len(sequence.shards) < self._shards_most
                if end != placed.shard.first and may_split:
                    self._moves.append(_Move(sequence, placed.identity, (target, epoch), end))
                return

    def _part_end(self, placed: Placed, tokens: int | None) -> int | None:
        """Where the first whole blocks of `tokens` end; None for all of the shard."""
        first, end = placed.shard.first, placed.shard.end
        size = self._door.geometry.block_tokens
        return None if tokens is None or first + tokens >= end else first + tokens // size * size

    def is_moving(self, sequence: LiveSequence) -> bool:
        """Whether a shard of it is on its way."""
        return any(move.sequence is sequence for move in self._moves)

    def tick(self) -> None:
        """Take every move as far as it goes without waiting; begin to empty workers that drain."""
        if not self._is_busy() and self._door.clock() >= self._retry_s:
            self._evacuate()
        for move in [move for move in self._moves if not move.waits]:
            self._advance(move)

    def _is_busy(self) -> bool:
        """Whether as many shards as may be are on their way."""
        waiting = sum(self._waits_for_room(move.sequence) for move in self._moves)
        return len(self._moves) - waiting >= _MOVES_MOST or len(self._moves) >= _MOVES_IN_ALL_MOST

    def _waits_for_room(self, sequence: LiveSequence) -> bool:
        """Whether it asked for room and has no answer, which may be long: its move cannot end meanwhile."""
        return self._door.table.is_live(sequence) and self._door.scheduler.is_asking(sequence.key)

    def _evacuate(self) -> None:
        """Sequences that wait for room, and those of which a move failed, come after all others."""
        members = self._door.pool.members
        for worker in members.draining():
            for sequence in sorted(self._door.table.holding_at(worker), key=self._lateness):
                if self._is_busy():
                    return
                target = members.roomiest(apart_from=worker, blocks=self._blocks_at(sequence, worker))
                if target is not None:
                    self.start(sequence.key, worker, target)

    def _lateness(self, sequence: LiveSequence) -> tuple[bool, int]:
        return self._waits_for_room(sequence), sequence.moves_failed

    def _blocks_at(self, sequence: LiveSequence, worker: WorkerId) -> int:
        """Blocks of a sequence's first shard on a worker: a target has room for all of it, or is none."""
        shard = next(placed.shard for placed in sequence.shards if placed.shard.worker == worker)
        return self._door.geometry.blocks_for(shard.end - shard.first)

    def _advance(self, move: _Move) -> None:
        placed = self._placed(move)
        if placed is None:
            self._give_up(move)
            return
        if self._is_in_vain(move):
            return
        key, scheduler = move.sequence.key, self._door.scheduler
        done = placed.shard.first if move.copy is None else move.copy.shard.end
        certain = scheduler.computed_of(key, (placed.shard.first, move.end or placed.shard.end))
        if certain - done > self._piece_tokens:
            self._pull(move, placed, done, done + self._piece_tokens)
            return
        if scheduler.is_asking(key):
            return  # the answer may concern this very shard; until it comes, which may be long, steps go on
        if move.end is not None:
            self._advance_part(move, placed, done, certain)
            return
        scheduler.freeze(key)
        if certain > done and not move.is_last:
            move.is_last = True
            self._pull(move, placed, done, certain)
        else:
            self._switch(move, placed)

    def _advance_part(self, move: _Move, placed: Placed, done: int, certain: int) -> None:
        """The last piece of a beginning that moves; then the map names both parts."""
        if certain > done:
            self._pull(move, placed, done, certain)
        elif done == move.end and move.copy is not None:
            sequence, source = move.sequence, placed.shard.worker
            rest = placed.trimmed_before(done, self._door.geometry.block_tokens)
            sequence.exchange(placed, move.copy, rest)
            self._door.scheduler.split(sequence.key, done)
            self._door.pool.trim(sequence.key, [source], done)
            self._settle(move, placed, done)

    def _placed(self, move: _Move) -> Placed | None:
        """The shard to move as its sequence has it now; None when either is gone."""
        if not self._door.table.is_live(move.sequence) or not self._door.leads_to(*move.target):
            return None
        return next((placed for placed in move.sequence.shards if placed.identity == move.source), None)

    def _pull(self, move: _Move, placed: Placed, first: int, end: int) -> None:
        sequence = move.sequence
        sequence.chain.grow(sequence.token_ids[:end])
        start = first if move.copy is None else move.copy.shard.first
        wanted = PullWanted(
            sequence.key,
            sequence.generation,
            first,
            tuple(sequence.token_ids[first:end]),
            sequence.chain.prefix(start),
            placed,
            move.target,
            begins=move.copy is None,
        )
        move.waits = True
        self._door.pool.pull(wanted, lambda answer: self._door.post(partial(self._pulled, move, answer)))

    def _pulled(self, move: _Move, answer: Placed | AnabranchError | None) -> None:
        move.waits = False
        if isinstance(answer, AnabranchError):
            _log.warning("move_failed", request_id=move.sequence.key.request_id, problem=answer.message)
            self._retry_s = self._door.clock() + _RETRY_S
            self._give_up(move)
            return
        grew = answer is not None and (move.copy is None or answer.shard.end > move.copy.shard.end)
        move.copy = answer or move.copy
        computed = self._door.scheduler.computed(move.sequence.key)
        move.in_vain = None if grew else (computed, self._door.clock() + _RETRY_S)

    def _is_in_vain(self, move: _Move) -> bool:
        """Whether another piece would bring nothing either: a source is certain of what it has with the next
        step. The last piece is not tried twice.
        """
        if move.in_vain is None or move.is_last:
            return False
        computed, until_s = move.in_vain
        return self._door.clock() < until_s and self._door.scheduler.computed(move.sequence.key) == computed

    def _switch(self, move: _Move, placed: Placed) -> None:
        """The map names the copy from now on; what it lacks of the source's range is lost."""
        sequence, key, scheduler = move.sequence, move.sequence.key, self._door.scheduler
        reached = placed.shard.first if move.copy is None else move.copy.shard.end
        sequence.exchange(placed, *([move.copy] if move.copy is not None else []))
        if reached < placed.shard.end:
            self._door.lose(sequence, [(reached, placed.shard.end)])
        scheduler.thaw(key)
        self._door.pool.release_shard(key, placed)
        self._settle(move, placed, reached)

    def _settle(self, move: _Move, placed: Placed, reached: int) -> None:
        """The map names the copy: tell the gateway, and count."""
        sequence, tokens = move.sequence, reached - placed.shard.first
        self._moves.remove(move)
        self._door.outbox.put(sequence.subscriber, sequence.delta(with_map=True))
        self._door.metrics.moved.inc(tokens)
        self._door.metrics.moves.labels("done").inc()
        _log.info(
            "moved",
            request_id=sequence.key.request_id,
            choice=sequence.key.choice,
            step=self._door.scheduler.step,
            peer=placed.shard.worker,
            target=move.target[0],
            tokens=tokens,
        )

    def _give_up(self, move: _Move) -> None:
        """The sequence keeps what it has; a copy that nobody needs is freed. Where the sequence has nothing
        else on the target all it may have there goes, known or not, and what it gets there later is a new
        life's: the target may have fenced this one, with a lease that ended.
        """
        self._moves.remove(move)
        self._door.metrics.moves.labels("given_up").inc()
        sequence, (target, _) = move.sequence, move.target
        sequence.moves_failed += 1
        is_live = self._door.table.is_live(sequence)
        if is_live:
            self._door.scheduler.thaw(sequence.key)
        if is_live and not sequence.holds_at(target):
            sequence.begin_anew_at(target)
            self._door.pool.renounce(sequence.key, target, sequence.void[target])
        elif move.copy is not None:
            self._door.pool.release_shard(sequence.key, move.copy)
