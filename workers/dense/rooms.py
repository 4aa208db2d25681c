"""Room for sequences at attention workers: blocking calls, for the pool's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from cluster.errors import (
    AnabranchError,
    DeadlineExceeded,
    Fenced,
    InvalidRequest,
    LeaseOver,
    ResourceExhausted,
    Unavailable,
)
from cluster.fault_points import reach
from cluster.policies.placement import Allotment, PlacementPolicy, place
from cluster.policies.prefixes import Source
from cluster.policies.ranges import Range
from cluster.telemetry import logger
from cluster.types import Epoch, Generation, SequenceKey, ShardId, ShardRef, WorkerId
from workers.dense.growth import grown_by, is_meant, known_start
from workers.dense.holders import Held, Holders
from workers.dense.members import MemberTable
from workers.dense.prefixes import BlockChain
from workers.dense.sequences import Placed
from workers.peer import Adoption, AttentionPeer, HeldShard, PullSource, ShardPrefix

_log = logger("dense.rooms")


@dataclass(frozen=True, slots=True)
class RoomWanted:
    """Positions first..end of a sequence that has `shards`; new shards come under `generation`."""

    key: SequenceKey
    generation: Generation
    chain: BlockChain
    first: int
    end: int
    shards: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class PrefixWanted:
    """What lies at `sources`, in order, of a sequence's tokens without its last; if `asks`, the directory may
    name more.
    """

    key: SequenceKey
    generation: Generation
    chain: BlockChain
    token_ids: tuple[int, ...]
    sources: tuple[Source, ...]
    asks: bool = False


@dataclass(frozen=True, slots=True)
class PullWanted:
    """Tokens from `first` on, to be copied from the shard that holds them to a life of another worker."""

    key: SequenceKey
    generation: Generation
    first: int
    token_ids: tuple[int, ...]
    prefix: ShardPrefix
    source: Placed
    target: tuple[WorkerId, Epoch]
    begins: bool


@dataclass(frozen=True, slots=True)
class Adopted:
    """What survives of a sequence: shards, disjoint and ordered, and the committed range in each."""

    placed: tuple[Placed, ...] = ()
    committed: tuple[Range, ...] = ()


class Rooms:
    """Reserves by the placement policy, and keeps `holders` true to what the workers granted."""

    def __init__(
        self,
        members: MemberTable,
        holders: Holders,
        policy: PlacementPolicy,
        on_lease_over: Callable[[SequenceKey, WorkerId, Generation], None],
    ) -> None:
        """`on_lease_over`: what a worker held of a sequence under a generation is gone, as it says when asked
        for more.
        """
        self._members = members
        self._holders = holders
        self._policy = policy
        self._on_lease_over = on_lease_over

    def reserve(self, wanted: RoomWanted) -> tuple[Placed, ...]:
        """The shards concerned with their whole ranges: all of the range, or as much of it from its start
        as there is room for. A worker that refuses is left out and the rest placed anew. Raises Fenced.
        """
        shards = {placed.identity: placed for placed in wanted.shards}
        granted: dict[tuple[WorkerId, Epoch, ShardId], Placed] = {}
        refusing: set[WorkerId] = set()
        position = wanted.first
        while position < wanted.end:
            allotment = self._next(position, wanted.end, shards.values(), refusing)
            if allotment is None:
                break
            placed = self._reserve_at(wanted, allotment, shards.values())
            if placed is None:
                refusing.add(allotment.worker)
                continue
            shards[placed.identity] = granted[placed.identity] = placed
            position = allotment.end
        return tuple(granted.values())

    def acquire(self, wanted: PrefixWanted) -> Adopted:
        """Pin the longest prefix of a sequence that lies in the pool. Stops at the first worker that holds
        less than was hoped for; the last one is also asked for the open block behind. Raises Fenced.
        """
        found: list[HeldShard] = []
        *before, last = wanted.sources or [None]
        if last is not None:
            last = replace(last, end=last.end + wanted.chain.block_tokens - 1)
        for source in filter(None, (*before, last)):
            shard = self._acquire_at(wanted, source)
            if shard is not None:
                found.append(shard)
            if shard is None or shard.shard.end < min(source.end, len(wanted.token_ids)):
                break
        return _without_overlaps(found)

    def adopt(
        self,
        key: SequenceKey,
        generation: Generation,
        token_ids: Sequence[int],
        shard_map: Sequence[ShardRef] | None,
    ) -> Adopted:
        """Take over what lies at the workers of a map, and where an earlier life here had any; at every other
        worker too where that is not all the map names, for a shard may have moved since, or where there is no
        map. A worker that cannot be reached counts as having nothing. Raises Fenced.

        Each worker confirms the tokens of its own shards. What lies behind a token that differs at any of
        them is given back, wherever it is.
        """
        named = {(held.worker, held.epoch) for held in self._holders.take(key)}
        named |= {(shard.worker, shard.epoch) for shard in shard_map or ()}
        peers = self._members.peers()
        first = [peer for peer in peers if shard_map is None or (peer.worker, peer.epoch) in named]
        adoptions = [self._adopt_at(peer, key, generation, token_ids) for peer in first]
        if not _has_all(adoptions, shard_map or (), len(token_ids)):
            rest = [peer for peer in peers if peer not in first]
            adoptions += [self._adopt_at(peer, key, generation, token_ids) for peer in rest]
        found = [held for adoption in adoptions for held in adoption.shards]
        differences = (adoption.first_difference for adoption in adoptions)
        differs_at = min((at for at in differences if at is not None), default=inf)
        for held in found:
            if held.committed_end > differs_at:
                self.release_shard(key, Placed(held.shard, held.generation))
        return _without_overlaps(held for held in found if held.committed_end <= differs_at)

    def _adopt_at(
        self, peer: AttentionPeer, key: SequenceKey, generation: Generation, token_ids: Sequence[int]
    ) -> Adoption:
        """Nothing where the worker does not answer. One that is only late is asked twice, while it is a
        member: what it has may be most of a long prompt. Raises Fenced.
        """
        for _ in range(2):
            try:
                adoption = peer.adopt(key, generation, token_ids)
            except Fenced:
                raise
            except AnabranchError as error:
                is_late = isinstance(error, DeadlineExceeded)
                _tell("adopt_failed", key, peer.worker, error)
                if not is_late or self._members.peer(peer.worker, peer.epoch) is not peer:
                    break
            else:
                if adoption.shards:
                    self._holders.put(key, Held(peer.worker, peer.epoch, generation))
                return adoption
        self._holders.put(key, Held(peer.worker, peer.epoch, generation))  # perhaps its answer was lost
        return Adoption()

    def pull(self, wanted: PullWanted) -> Placed | None:
        """Let the target copy from the source; the copy with all it has by now, None where nothing came.
        Raises what the target answers.
        """
        source = wanted.source
        peer = self._members.peer(*wanted.target)
        address = self._members.address(source.shard.worker, source.shard.epoch)
        if peer is None or not address:
            raise Unavailable(f"no way from {source.shard.worker} to {wanted.target[0]}")
        try:
            found = peer.pull(
                wanted.key,
                wanted.generation,
                wanted.first,
                wanted.token_ids,
                wanted.prefix,
                PullSource(address, source.shard, source.generation, wanted.begins),
            )
        except ResourceExhausted as error:
            self._members.refused(peer.worker, peer.epoch, error)
            raise
        self._holders.granted(wanted.key, Held(peer.worker, peer.epoch, wanted.generation))
        self._members.set_free(peer.worker, peer.epoch, found.blocks_available)
        return Placed(found.shard.shard, wanted.generation) if found.shard is not None else None

    def expect_pull(self, wanted: PullWanted) -> PullWanted:
        """Before a pull is queued: under which generation it goes, and whom a release has to reach as well.
        A pull that comes after the release is fenced by it.
        """
        worker, epoch = wanted.target
        held = self._holders.expect(wanted.key, Held(worker, epoch, wanted.generation))
        return replace(wanted, generation=held.generation)

    def release_shard(self, key: SequenceKey, placed: Placed) -> None:
        """Give back one shard. Its worker is forgotten only where it says that it holds no other: one may
        have been granted that the engine has not heard of yet.
        """
        shard = placed.shard
        peer = self._members.peer(shard.worker, shard.epoch)
        if peer is None:
            return
        try:
            blocks = peer.release_shard(key, placed.generation, shard.shard)
            if not peer.locate(key):
                self._holders.take_one(key, shard.worker)
        except AnabranchError as error:  # its lease ends by itself
            _tell("release_failed", key, shard.worker, error)
            return
        self._members.add_free(shard.worker, shard.epoch, blocks)

    def release(self, key: SequenceKey, computed_end: int = 0) -> None:
        """Give back all room of a sequence, of which positions before `computed_end` were computed."""
        for held in self._holders.take(key):
            try:
                self._release_at(key, held, computed_end)
            except AnabranchError as error:  # its lease ends by itself
                _tell("release_failed", key, held.worker, error)

    def trim(self, key: SequenceKey, workers: Iterable[WorkerId], keep_from: int) -> None:
        """Give back what lies at these workers before a position. What a worker keeps because it does not
        answer is given back by the next call, or with the rest.
        """
        for held in filter(None, (self._holders.get(key, worker) for worker in workers)):
            peer = self._members.peer(held.worker, held.epoch)
            if peer is None:
                continue
            try:
                blocks = peer.trim(key, held.generation, keep_from)
            except AnabranchError as error:
                _tell("trim_failed", key, held.worker, error)
            else:
                self._members.add_free(held.worker, held.epoch, blocks)

    def abandon(self, key: SequenceKey) -> None:
        """Keep nothing of a sequence in mind, and free nothing."""
        self._holders.take(key)

    def renounce(self, key: SequenceKey, held: Held) -> None:
        """Give back what one worker held of a sequence. Raises Fenced where the sequence is another's."""
        try:
            self._release_at(key, held)
        except Fenced:
            raise
        except AnabranchError as error:
            _tell("release_failed", key, held.worker, error)

    def _next(
        self, first: int, end: int, shards: Iterable[Placed], refusing: set[WorkerId]
    ) -> Allotment | None:
        spaces = [s for s in self._members.spaces(self._policy.block_tokens) if s.worker not in refusing]
        allotments = place(first, end, [placed.shard for placed in shards], spaces, self._policy)
        return allotments[0] if allotments else None

    def _reserve_at(
        self, wanted: RoomWanted, allotment: Allotment, shards: Iterable[Placed]
    ) -> Placed | None:
        """None where the worker refuses or does not answer. Raises Fenced."""
        peer = self._members.peer(allotment.worker, allotment.epoch)
        if peer is None:
            return None
        generation = self._generation_at(wanted.key, peer.worker, peer.epoch, wanted.generation)
        grown = grown_by(shards, allotment)
        prefix = wanted.chain.prefix(known_start(grown, allotment))
        try:
            reservation = peer.reserve(wanted.key, generation, allotment.first, allotment.end, prefix)
            reach("reserve-commit")
            if not is_meant(reservation.shard, grown, allotment):
                raise InvalidRequest(f"{peer.worker} has a shard from {reservation.shard.first} on as well")
        except ResourceExhausted as error:
            self._members.refused(allotment.worker, allotment.epoch, error)
            return None
        except InvalidRequest as error:
            _tell("strays", wanted.key, peer.worker, error)
            self._release_strays(wanted.key, peer, shards)
            return None
        except LeaseOver:
            was_held = self._holders.take_void(wanted.key, peer.worker, generation) is not None
            if not was_held and not _is_mapped(wanted, peer.worker, generation):
                raise  # of somebody before who had this id
            self._on_lease_over(wanted.key, peer.worker, generation)
            return None
        except Fenced:
            raise
        except AnabranchError as error:
            # Perhaps it was granted and the answer lost: release it with the rest. And for the moment nobody
            # is placed there, for each attempt may take its whole deadline.
            self._holders.put(wanted.key, Held(peer.worker, peer.epoch, generation))
            self._members.refused(allotment.worker, allotment.epoch, error)
            _tell("reserve_failed", wanted.key, peer.worker, error)
            return None
        self._members.set_free(allotment.worker, allotment.epoch, reservation.blocks_available)
        self._holders.put(wanted.key, Held(peer.worker, peer.epoch, generation))
        return Placed(reservation.shard, generation)

    def _release_strays(self, key: SequenceKey, peer: AttentionPeer, shards: Iterable[Placed]) -> None:
        """Free what a worker holds of a sequence beside its `shards`: of an acquisition or a copy whose
        answer was lost, say. Room there is asked for again.
        """
        named = {placed.identity for placed in shards}
        try:
            for held in peer.locate(key):
                if (peer.worker, peer.epoch, held.shard.shard) not in named:
                    peer.release_shard(key, held.generation, held.shard.shard)
        except AnabranchError as error:
            _tell("release_failed", key, peer.worker, error)

    def _generation_at(self, key: SequenceKey, worker: WorkerId, epoch: Epoch, new: Generation) -> Generation:
        """A worker knows one generation of a sequence: the one of what it holds, or else a new one."""
        held = self._holders.get(key, worker)
        return held.generation if held is not None and held.epoch == epoch else new

    def _acquire_at(self, wanted: PrefixWanted, source: Source) -> HeldShard | None:
        """None where nothing lies, or the worker does not answer. Raises Fenced."""
        peer = self._members.peer(source.worker, source.epoch)
        tokens = wanted.token_ids[source.first : source.end]
        if peer is None or not tokens:
            return None
        try:
            found = peer.acquire(
                wanted.key, wanted.generation, source.first, tokens, wanted.chain.prefix(source.first)
            )
        except Fenced:
            raise
        except AnabranchError as error:
            self._holders.put(wanted.key, Held(peer.worker, peer.epoch, wanted.generation))
            _tell("acquire_failed", wanted.key, peer.worker, error)
            return None
        self._members.set_free(source.worker, source.epoch, found.blocks_available)
        if found.shard is not None:
            self._holders.put(wanted.key, Held(peer.worker, peer.epoch, wanted.generation))
        return found.shard

    def _release_at(self, key: SequenceKey, held: Held, computed_end: int = 0) -> None:
        peer = self._members.peer(held.worker, held.epoch)
        if peer is not None:
            blocks = peer.release(key, held.generation, computed_end)
            self._members.add_free(held.worker, held.epoch, blocks)


def _is_mapped(wanted: RoomWanted, worker: WorkerId, generation: Generation) -> bool:
    """Whether the sequence's map names a shard there. It may when nothing is known to be held: to whom gave a
    copy back the worker said that it has no more, since all had gone with the lease.
    """
    return any((placed.shard.worker, placed.generation) == (worker, generation) for placed in wanted.shards)


def _tell(event: str, key: SequenceKey, worker: WorkerId, error: AnabranchError) -> None:
    _log.warning(event, request_id=key.request_id, peer=worker, problem=error.message)


def _has_all(adoptions: Sequence[Adoption], shard_map: Iterable[ShardRef], known: int) -> bool:
    """Whether every shard that a map names of the first `known` positions begins where one was found. Their
    ends tell nothing: what was not certain yet is given up.
    """
    found = [(held.shard.first, held.shard.end) for adoption in adoptions for held in adoption.shards]
    begins = (shard.first for shard in shard_map if shard.first < known)
    return all(any(first <= begin < end for first, end in found) for begin in begins)


def _without_overlaps(found: Iterable[HeldShard]) -> Adopted:
    """Where two shards cover the same positions the one with more committed is kept."""
    chosen: list[HeldShard] = []
    for held in sorted(found, key=lambda held: -held.committed_tokens):
        if all(
            held.shard.end <= other.shard.first or other.shard.end <= held.shard.first for other in chosen
        ):
            chosen.append(held)
    chosen.sort(key=lambda held: held.shard.first)
    return Adopted(
        tuple(Placed(held.shard, held.generation) for held in chosen),
        tuple((held.shard.first, held.committed_end) for held in chosen),
    )
