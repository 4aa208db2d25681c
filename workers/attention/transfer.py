"""Committed KV from one attention worker to another: the source is asked, the target pulls.

The source goes on serving the sequence meanwhile: what is committed never changes. Whose shard counts is
the dense worker's to say, when the copy is done.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import google_crc32c
import torch
from torch import Tensor

from cluster.errors import Fenced, InvalidRequest, Unavailable
from cluster.types import Generation, SequenceKey, ShardId, ShardRef
from workers.attention.arena import Arena
from workers.attention.shard import Shard
from workers.attention.store import Store
from workers.peer import Acquisition, HeldShard, ShardPrefix

_PIECE_BYTES = 2**20
"""Most bytes of one piece: far below gRPC's limit, and one turn at the store."""

_PLACE = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of positions first..first+count, [2, layers, count, kv_heads, head_size] as bytes, with a CRC32C."""

    first: int
    count: int
    payload: bytes
    crc32c: int

    @classmethod
    def of(cls, first: int, rows: Tensor) -> Piece:
        """A piece of rows as `Arena.read` gives them."""
        payload = rows.contiguous().view(torch.uint8).numpy().tobytes()
        return cls(first, rows.shape[2], payload, _checksum(first, rows.shape[2], payload))

    def rows(self, arena: Arena) -> Tensor:
        """The rows for `Arena.write`. Raises Unavailable when they are not what was sent."""
        if _checksum(self.first, self.count, self.payload) != self.crc32c:
            raise Unavailable(f"the copy of positions {self.first}.. was damaged on its way: pull again")
        geometry = arena.geometry
        if len(self.payload) != self.count * geometry.token_bytes:
            raise InvalidRequest(f"{len(self.payload)} bytes are no {self.count} tokens of this cache")
        shape = (2, geometry.layers, self.count, geometry.kv_heads, geometry.head_size)
        flat = torch.frombuffer(bytearray(self.payload), dtype=arena.dtype)
        return flat.view(shape)


def fetch(
    store: Store, arena: Arena, shard_id: ShardId, generation: Generation, first: int, end: int
) -> Iterator[Piece]:
    """Committed positions first..end of a shard, fewer where fewer are. The sequence's steps before `end` are
    over, so a chunk that ends there is committed by it. Raises Fenced.
    """
    with store.turns:
        shard = store.shard(shard_id, generation)
        if shard.pending is not None and shard.pending.end <= end:  # a part of it would cost the rest
            with contextlib.suppress(
                Fenced
            ):  # layers of the last step still on their way: without them, then
                shard.commit(shard.pending.end)  # without publishing: a step may be reading these very blocks
        end = min(end, shard.committed)
    count = max(1, _PIECE_BYTES // arena.geometry.token_bytes)
    for start in range(first, end, count):
        with store.turns:
            shard = store.shard(shard_id, generation)
            if start < shard.first:  # trimmed, perhaps between two pieces
                raise shard.fenced(
                    f"positions from {start} on are asked for, held those from {shard.first} on"
                )
            rows = arena.read(_slots(shard, start, min(end, start + count), arena))
        yield Piece.of(start, rows)


@dataclass(frozen=True, slots=True)
class Copy:
    """What to pull: the tokens of positions from `first` on of a sequence, and its life here.

    begins: into a shard of its own, which the map does not name yet; otherwise behind the piece before.
    """

    key: SequenceKey
    generation: Generation
    first: int
    token_ids: Sequence[int]
    prefix: ShardPrefix
    begins: bool

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.first + len(self.token_ids)


def pull(store: Store, arena: Arena, copy: Copy, fetch_from: Callable[[int], Iterable[Piece]]) -> Acquisition:
    """Refer to what lies here already, reserve room for the rest, fetch it, and commit piece by piece. Raises
    as `Store.reserve`, Fenced where the piece before is gone, and Unavailable.

    Of a first piece that fails nothing stays, since nobody was told of its shard. What a later one brought
    before it broke is whole and stays until the caller gives the copy up.
    """
    with contextlib.ExitStack() as undo:
        position, is_new = copy.first, copy.begins
        if copy.begins:
            found = store.acquire(copy.key, copy.generation, copy.first, copy.token_ids, copy.prefix)
            if found.shard is not None:
                position, is_new = found.shard.shard.end, False
                undo.callback(store.release_shard, copy.key, copy.generation, found.shard.shard.shard)
            if position == copy.end:
                undo.pop_all()
                return found
        shard = store.reserve(copy.key, copy.generation, position, copy.end, copy.prefix, apart=is_new).shard
        if copy.begins or shard.first == position:
            undo.callback(store.release_shard, copy.key, copy.generation, shard.shard)
        if not copy.begins and shard.first == position:
            raise Fenced(f"{copy.key}: the copy that ended at {position} is gone", shards=str(shard.shard))
        held = _fill(store, arena, copy, shard, position, fetch_from)
        undo.pop_all()
    return Acquisition(held, store.available)


def _fill(
    store: Store,
    arena: Arena,
    copy: Copy,
    shard: ShardRef,
    position: int,
    fetch_from: Callable[[int], Iterable[Piece]],
) -> HeldShard | None:
    """Fetch and write what comes from `position` on; what the shard is then. Room for more is freed."""
    try:
        for piece in fetch_from(position):
            if piece.first != position or piece.first + piece.count > copy.end:
                raise Unavailable(f"positions from {piece.first} on came where {position} was due")
            _write(store, arena, shard.shard, copy, piece)
            position += piece.count
    finally:
        held = store.shrink(copy.key, copy.generation, shard.shard)
    return held


def _write(store: Store, arena: Arena, shard_id: ShardId, copy: Copy, piece: Piece) -> None:
    rows = piece.rows(arena)
    offset = piece.first - copy.first
    with store.turns:
        shard = store.shard(shard_id, copy.generation)
        if shard.committed != piece.first or shard.pending is not None:
            raise shard.fenced(f"a copy of {piece.first}.. behind {shard.committed}, or where a step writes")
        arena.write(_slots(shard, piece.first, piece.first + piece.count, arena), rows)
        store.fill(shard, copy.token_ids[offset : offset + piece.count])


def _slots(shard: Shard, first: int, end: int, arena: Arena) -> Tensor:
    slots = [shard.slot(position) for position in range(first, end)]
    return torch.tensor(slots, dtype=torch.int64, device=arena.device)


def _checksum(first: int, count: int, payload: bytes) -> int:
    return int(google_crc32c.extend(google_crc32c.value(_PLACE.pack(first, count)), payload))
