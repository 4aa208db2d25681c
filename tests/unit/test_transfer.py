"""Copies of committed KV between two stores: whole and certain, or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from cluster.errors import AnabranchError, Fenced, InvalidRequest, ResourceExhausted, Unavailable
from cluster.types import ShardRef
from tests.attention_builders import Memory, build_memory, chunk, generation, key
from workers.attention.transfer import Copy, Piece, fetch, pull
from workers.kernels.select import select
from workers.kernels.signature import CacheLayout
from workers.kernels.token_major import TOKEN_MAJOR
from workers.peer import HeldShard, ShardPrefix

TENANT = ShardPrefix("tenant")


def source_of(tokens: int) -> tuple[Memory, ShardRef]:
    """A worker with a sequence of one shard, `tokens` of it committed."""
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key("a"), generation(1), 0, 30, TENANT).shard
    memory.run(chunk(shard, 0, tokens))
    memory.begin(chunk(shard, tokens, 1))
    return memory, shard


def copy_of(tokens: int, first: int = 0) -> Copy:
    """What the target is to pull: token ids are positions."""
    return Copy(key("a"), generation(1), first, range(first, first + tokens), TENANT, begins=first == 0)


def pieces(source: Memory, shard: ShardRef, end: int) -> Callable[[int], Iterator[Piece]]:
    """The source's pieces from any position on."""
    return lambda first: fetch(source.store, source.arena, shard.shard, generation(1), first, end)


def pulled(target: Memory, copy: Copy, fetch_from: Callable[[int], Iterable[Piece]]) -> HeldShard:
    """A copy that must bring something."""
    held = pull(target.store, target.arena, copy, fetch_from).shard
    assert held is not None
    return held


@pytest.mark.parametrize("layout", [TOKEN_MAJOR, select("auto", "cpu").layout], ids=["same", "own"])
@pytest.mark.parametrize("tokens", [1, 4, 11, 16])
def test_a_copy_is_the_source_bit_by_bit(tokens: int, layout: CacheLayout) -> None:
    """Keys, values, committed length and identities arrive, also where the target's kernel wants its cache
    laid out otherwise; the source keeps what it has.
    """
    source, shard = source_of(tokens)
    target = build_memory(sharing=True, layout=layout)
    held = pulled(target, copy_of(tokens), pieces(source, shard, tokens))
    assert (held.shard.first, held.shard.end, held.committed_tokens) == (0, tokens, tokens)
    assert torch.equal(target.contents("a", tokens), source.contents("a", tokens))
    assert target.store.audit().sealed_referenced == tokens // 4
    assert source.committed("a") == [(0, tokens)]


def test_pieces_grow_one_shard() -> None:
    """Three pulls, cut inside blocks, give one shard."""
    source, shard = source_of(14)
    target = build_memory(sharing=True)
    for first, count in ((0, 5), (5, 6), (11, 3)):
        held = pulled(target, copy_of(count, first), pieces(source, shard, first + count))
    assert (held.shard.first, held.shard.end, held.blocks) == (0, 14, 4)
    assert torch.equal(target.contents("a", 14), source.contents("a", 14))


def test_what_lies_there_already_is_not_fetched() -> None:
    """Where another sequence of the tenant has the blocks, only what is missing is asked for."""
    source, shard = source_of(14)
    target = build_memory(sharing=True)
    other = target.store.reserve(key("b"), generation(1), 0, 20, TENANT).shard
    target.run(chunk(other, 0, 9))
    target.begin(chunk(other, 9, 1))
    asked = []

    def fetch_from(first: int) -> Iterator[Piece]:
        asked.append(first)
        return pieces(source, shard, 14)(first)

    pulled(target, copy_of(14), fetch_from)
    assert asked == [9]
    assert target.store.audit().sealed_referenced == 3


def test_only_what_is_committed_comes() -> None:
    """Of a chunk whose layers are not all there yet nothing is sent; the shard ends before it. Once they are,
    asking for its end makes it certain.
    """
    source, shard = source_of(6)
    late = chunk(shard, 6, 3)
    step = source.begin(late)
    source.append(step, [late], 0)
    target = build_memory(sharing=True)
    held = pulled(target, copy_of(9), pieces(source, shard, 9))
    assert (held.shard.end, held.committed_tokens) == (6, 6)
    source.append(step, [late], 1)
    held = pulled(target, copy_of(3, 6), pieces(source, shard, 9))
    assert (held.shard.end, held.committed_tokens) == (9, 9)
    assert torch.equal(target.contents("a", 9), source.contents("a", 9))


def _damaged(piece: Piece) -> list[Piece]:
    return [replace(piece, payload=piece.payload[:-1] + bytes([piece.payload[-1] ^ 1]))]


def _misplaced(piece: Piece) -> list[Piece]:
    return [replace(piece, first=piece.first + 4)]


def _short(piece: Piece) -> list[Piece]:
    rows = torch.zeros(2, 2, piece.count, 1, 8)
    return [Piece.of(piece.first, rows)]


def _beyond(piece: Piece) -> list[Piece]:
    return [piece, piece]


@pytest.mark.parametrize(
    ("harm", "error"),
    [(_damaged, Unavailable), (_misplaced, Unavailable), (_short, InvalidRequest), (_beyond, Unavailable)],
)
def test_a_harmed_copy_is_never_read(
    harm: Callable[[Piece], list[Piece]], error: type[AnabranchError]
) -> None:
    """Damaged, misplaced, misshapen or repeated pieces are refused; what is kept is right, nothing leaks."""
    source, shard = source_of(11)
    target = build_memory(sharing=True)

    def fetch_from(first: int) -> Iterator[Piece]:
        for piece in pieces(source, shard, 11)(first):
            yield from harm(piece)

    with pytest.raises(error):
        pull(target.store, target.arena, copy_of(11), fetch_from)
    kept = target.committed("a")
    assert kept in ([], [(0, 11)])
    if kept:
        assert torch.equal(target.contents("a", 11), source.contents("a", 11))
    target.store.release(key("a"), generation(1))
    assert target.store.audit().available == 16


def test_no_room_no_copy() -> None:
    """The room is reserved before a byte moves: a full target asks the source for nothing."""
    source, shard = source_of(11)
    target = build_memory(blocks=2, sharing=True)

    def fetch_from(_first: int) -> Iterator[Piece]:
        raise AssertionError("nothing is to be fetched")

    with pytest.raises(ResourceExhausted):
        pull(target.store, target.arena, copy_of(11), fetch_from)
    assert target.store.audit().free == 2
    assert list(pieces(source, shard, 11)(0))


def test_a_source_that_was_taken_over_gives_nothing() -> None:
    """A fetch under a generation that is over is fenced, and the target keeps nothing."""
    source, shard = source_of(11)
    target = build_memory(sharing=True)
    source.store.adopt(key("a"), generation(2), range(11))
    with pytest.raises(Fenced):
        pull(target.store, target.arena, copy_of(11), pieces(source, shard, 11))
    assert target.store.audit().free == 16


def test_what_is_trimmed_during_a_copy_is_not_read_elsewhere() -> None:
    """Positions given up between two pieces are refused, not read from other blocks."""
    source = build_memory(layers=1, head_size=2**15)  # a piece holds two tokens
    shard = source.store.reserve(key("a"), generation(1), 0, 16).shard
    source.run(chunk(shard, 0, 12))
    source.begin(chunk(shard, 12, 1))
    copied = fetch(source.store, source.arena, shard.shard, generation(1), 0, 12)
    assert next(copied).count == 2
    source.store.trim(key("a"), generation(1), 8)
    with pytest.raises(Fenced, match="held those from 8"):
        next(copied)


def test_a_copy_behind_an_own_shard_is_a_shard_of_its_own() -> None:
    """The map names the shard before; the copy must be able to vanish without it."""
    source, shard = source_of(12)
    target = build_memory(sharing=True)
    own = target.store.reserve(key("a"), generation(1), 0, 8, TENANT).shard
    copy = Copy(key("a"), generation(1), 8, range(8, 12), TENANT, begins=True)
    held = pulled(target, copy, pieces(source, shard, 12))
    assert held.shard.shard != own.shard
    target.store.release_shard(key("a"), generation(1), held.shard.shard)
    assert [found.shard for found in target.store.locate(key("a"))] == [own]
    target.store.audit()


def test_a_later_piece_never_begins_a_shard() -> None:
    """The copy so far was lost at the target (its lease, a fault): the next piece is refused, for a shard
    that begins in the middle of the source's range would leave a hole nobody knows of.
    """
    source, shard = source_of(14)
    target = build_memory(sharing=True)
    pull(target.store, target.arena, copy_of(5), pieces(source, shard, 5))
    target.store.release(key("a"), generation(1))
    later = Copy(key("a"), generation(2), 5, range(5, 11), TENANT, begins=False)
    with pytest.raises(AnabranchError):
        pull(target.store, target.arena, later, pieces(source, shard, 11))
    assert target.store.audit().available == 16


def test_a_first_piece_that_fails_leaves_nothing() -> None:
    """The caller was told of no shard, so it cannot give one up: acquired blocks and whole pieces go."""
    source, shard = source_of(14)
    target = build_memory(blocks=4, sharing=True)
    other = target.store.reserve(key("b"), generation(1), 0, 16, TENANT).shard
    target.run(chunk(other, 0, 9))
    target.begin(chunk(other, 9, 1))
    with pytest.raises(AnabranchError):
        pull(target.store, target.arena, copy_of(14), pieces(source, shard, 14))
    assert target.store.locate(key("a")) == ()


def test_a_first_copy_that_breaks_half_way_leaves_nothing() -> None:
    """As above, where the source stops to answer after a whole piece."""
    source, shard = source_of(14)
    target = build_memory(sharing=True)

    def fetch_from(first: int) -> Iterator[Piece]:
        yield from fetch(source.store, source.arena, shard.shard, generation(1), first, 8)
        raise Unavailable("the source is gone")

    with pytest.raises(Unavailable):
        pull(target.store, target.arena, copy_of(14), fetch_from)
    assert target.store.locate(key("a")) == ()


def test_a_copy_behind_a_shard_in_use_is_refused() -> None:
    """A confused peer pulls behind a tail that a step is writing to: the step's blocks stay its own."""
    source, shard = source_of(14)
    memory = build_memory(sharing=True)
    own = memory.store.reserve(key("a"), generation(1), 0, 5, TENANT).shard
    memory.run(chunk(own, 0, 4))
    step = memory.begin(chunk(own, 4, 1))
    with memory.store.turns:
        before = list(memory.store.shard(own.shard, generation(1)).blocks)
    with pytest.raises(AnabranchError):
        pull(
            memory.store,
            memory.arena,
            Copy(key("a"), generation(1), 5, range(5, 9), TENANT, begins=False),
            pieces(source, shard, 9),
        )
    with memory.store.turns:
        assert memory.store.shard(own.shard, generation(1)).blocks[: len(before)] == before
    memory.append(step, [chunk(own, 4, 1)], 0)
    memory.store.audit()


def test_a_copy_that_ends_within_a_chunk_costs_the_source_nothing() -> None:
    """Pieces need not end where chunks do: what a chunk wrote behind the piece is there for its commit."""
    source, shard = source_of(4)
    source.run(chunk(shard, 4, 8))
    target = build_memory(sharing=True)
    assert pulled(target, copy_of(6), pieces(source, shard, 6)).committed_tokens == 4
    source.begin(chunk(shard, 12, 1))  # names position 12: all before it is certain
    (held,) = source.store.locate(key("a"))
    assert held.committed_tokens == 12
