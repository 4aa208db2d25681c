"""`KvService`: reservations, leases, take-over and the audit, over gRPC. Thin: the store decides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import grpc

from anabranch.v1 import inference_pb2, kv_pb2, kv_pb2_grpc, types_pb2
from anabranch.wire import sequence_key, sequence_message, shard_message
from cluster import rpc
from cluster.blocks import BlockHash
from cluster.config import TlsConfig
from cluster.errors import Fenced, Unavailable
from cluster.fault_points import reach
from cluster.types import Generation, KvGeometry, ShardId
from workers.attention.arena import Arena
from workers.attention.shard_blocks import BlockAccount
from workers.attention.store import Store
from workers.attention.transfer import Copy, Piece, fetch, pull
from workers.peer import HeldShard, ShardPrefix

_FETCH_S = 10.0
"""Deadline of one copy from another worker: the dense worker asks for a small one at a time."""


COPIES_MOST = 4
"""Copies from and to other workers at once: half the threads for calls that others wait for."""


class KvService(kv_pb2_grpc.KvServiceServicer):
    """Serves one store and its arena; `tls` is that of channels to other attention workers."""

    def __init__(self, store: Store, arena: Arena, tls: TlsConfig) -> None:
        self._store = store
        self._arena = arena
        self._tls = tls
        self._copies = threading.BoundedSemaphore(COPIES_MOST)

    @rpc.unary
    def Reserve(  # the name of the RPC
        self, request: kv_pb2.ReserveRequest, context: grpc.ServicerContext
    ) -> kv_pb2.ReserveResponse:
        """Reserve room, or extend a shard."""
        self._check_epoch(request.believed)
        reservation = self._store.reserve(
            sequence_key(request.sequence),
            Generation(request.generation),
            request.first_position,
            request.end_position,
            _prefix(request),
        )
        reach("reserve-commit")
        return kv_pb2.ReserveResponse(
            responder=self._responder(),
            shard=shard_message(reservation.shard),
            lease_ms=reservation.lease_ms,
            blocks_available=reservation.blocks_available,
        )

    @rpc.unary
    def Acquire(  # the name of the RPC
        self, request: kv_pb2.AcquireRequest, context: grpc.ServicerContext
    ) -> kv_pb2.AcquireResponse:
        """Begin a shard with what lies here already."""
        self._check_epoch(request.believed)
        found = self._store.acquire(
            sequence_key(request.sequence),
            Generation(request.generation),
            request.first_position,
            list(request.token_ids),
            _prefix(request),
        )
        return kv_pb2.AcquireResponse(
            responder=self._responder(),
            shard=None if found.shard is None else _held(found.shard),
            blocks_available=found.blocks_available,
        )

    @rpc.unary
    def Pull(  # the name of the RPC
        self, request: kv_pb2.PullRequest, context: grpc.ServicerContext
    ) -> kv_pb2.PullResponse:
        """Copy committed KV from another worker."""
        self._check_epoch(request.believed)
        with self._one_copy():
            return self._pull(request)

    def _pull(self, request: kv_pb2.PullRequest) -> kv_pb2.PullResponse:
        copy = Copy(
            sequence_key(request.sequence),
            Generation(request.generation),
            request.first_position,
            list(request.token_ids),
            _prefix(request),
            request.begins,
        )
        with rpc.channel(request.source_address, self._tls) as channel:
            source = kv_pb2_grpc.KvServiceStub(channel)
            pulled = pull(
                self._store, self._arena, copy, lambda first: _fetched(source, request, first, copy.end)
            )
        return kv_pb2.PullResponse(
            responder=self._responder(),
            shard=None if pulled.shard is None else _held(pulled.shard),
            blocks_available=pulled.blocks_available,
        )

    @rpc.stream
    def Fetch(  # the name of the RPC
        self, request: kv_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[kv_pb2.FetchResponse]:
        """Send committed positions of a shard."""
        self._check_epoch(request.believed)
        generation = Generation(request.generation)
        shard, first, end = ShardId(request.shard_id), request.first_position, request.end_position
        with self._one_copy():
            for piece in fetch(self._store, self._arena, shard, generation, first, end):
                yield kv_pb2.FetchResponse(
                    first_position=piece.first, count=piece.count, payload=piece.payload, crc32c=piece.crc32c
                )

    @rpc.unary
    def Release(  # the name of the RPC
        self, request: kv_pb2.ReleaseRequest, context: grpc.ServicerContext
    ) -> kv_pb2.ReleaseResponse:
        """Free a sequence's shards, or one of them."""
        self._check_epoch(request.believed)
        key, generation = sequence_key(request.sequence), Generation(request.generation)
        if request.HasField("shard_id"):
            blocks = self._store.release_shard(key, generation, ShardId(request.shard_id))
        else:
            blocks = self._store.release(key, generation, request.computed_end)
        return kv_pb2.ReleaseResponse(responder=self._responder(), blocks_released=blocks)

    @rpc.unary
    def Trim(  # the name of the RPC
        self, request: kv_pb2.TrimRequest, context: grpc.ServicerContext
    ) -> kv_pb2.TrimResponse:
        """Give back what no row will see."""
        self._check_epoch(request.believed)
        blocks = self._store.trim(
            sequence_key(request.sequence), Generation(request.generation), request.keep_from_position
        )
        return kv_pb2.TrimResponse(responder=self._responder(), blocks_released=blocks)

    @rpc.unary
    def Renew(  # the name of the RPC
        self, request: kv_pb2.RenewRequest, context: grpc.ServicerContext
    ) -> kv_pb2.RenewResponse:
        """Renew leases."""
        self._check_epoch(request.believed)
        unknown = self._store.renew(sequence_key(sequence) for sequence in request.sequences)
        return kv_pb2.RenewResponse(responder=self._responder(), unknown=map(sequence_message, unknown))

    @rpc.unary
    def Adopt(  # the name of the RPC
        self, request: kv_pb2.AdoptRequest, context: grpc.ServicerContext
    ) -> kv_pb2.AdoptResponse:
        """Take a sequence over."""
        self._check_epoch(request.believed)
        adopted = self._store.adopt(
            sequence_key(request.sequence), Generation(request.generation), list(request.token_ids)
        )
        return kv_pb2.AdoptResponse(
            responder=self._responder(),
            shards=map(_held, adopted.shards),
            first_difference=adopted.first_difference,
        )

    @rpc.unary
    def Locate(  # the name of the RPC
        self, request: kv_pb2.LocateRequest, context: grpc.ServicerContext
    ) -> kv_pb2.LocateResponse:
        """Show a sequence's shards."""
        held = self._store.locate(sequence_key(request.sequence))
        return kv_pb2.LocateResponse(responder=self._responder(), shards=map(_held, held))

    @rpc.unary
    def Audit(  # the name of the RPC
        self, request: kv_pb2.AuditRequest, context: grpc.ServicerContext
    ) -> kv_pb2.AuditResponse:
        """Show the account and every holding."""
        holdings = (
            kv_pb2.AuditResponse.Holding(
                sequence=sequence_message(key),
                shards=map(_held, held),
                lease_remaining_ms=int(1000 * remaining_s),
            )
            for key, held, remaining_s in self._store.holdings()
        )
        return kv_pb2.AuditResponse(
            responder=self._responder(),
            blocks=account_message(self._store.audit(), self._store.geometry),
            holdings=holdings,
        )

    @contextlib.contextmanager
    def _one_copy(self) -> Iterator[None]:
        """Count a copy: it waits for another worker on a thread of the server. Raises Unavailable: that it is
        busy says nothing of its room, which ResourceExhausted would.
        """
        if not self._copies.acquire(blocking=False):
            raise Unavailable(f"{self._store.worker} has {COPIES_MOST} copies under way: ask again")
        try:
            yield
        finally:
            self._copies.release()

    def _check_epoch(self, believed: types_pb2.Believed) -> None:
        if believed.epoch not in (0, self._store.epoch):
            raise Fenced(f"{self._store.worker} was restarted: epoch {believed.epoch:x} is over")

    def _responder(self) -> types_pb2.Responder:
        return types_pb2.Responder(worker_id=self._store.worker, epoch=self._store.epoch)


def account_message(account: BlockAccount, geometry: KvGeometry) -> inference_pb2.BlockAccount:
    """An account as heartbeats and `Audit` carry it."""
    return inference_pb2.BlockAccount(
        capacity=account.capacity,
        free=account.free,
        reserved=account.reserved,
        open=account.open,
        sealed_referenced=account.sealed_referenced,
        sealed_cached=account.sealed_cached,
        block_bytes=geometry.block_bytes,
    )


def _held(held: HeldShard) -> kv_pb2.HeldShard:
    return kv_pb2.HeldShard(
        shard=shard_message(held.shard),
        committed_tokens=held.committed_tokens,
        blocks=held.blocks,
        generation=held.generation,
    )


def _fetched(
    source: kv_pb2_grpc.KvServiceStub, request: kv_pb2.PullRequest, first: int, end: int
) -> Iterator[Piece]:
    """The source's pieces from position `first` on. Raises what the source answers."""
    fetch_request = kv_pb2.FetchRequest(
        believed=types_pb2.Believed(epoch=request.source.epoch),
        shard_id=request.source.shard_id,
        generation=request.source_generation,
        first_position=first,
        end_position=end,
    )
    try:
        for response in source.Fetch(fetch_request, timeout=_FETCH_S):
            yield Piece(response.first_position, response.count, response.payload, response.crc32c)
    except grpc.RpcError as error:
        raise rpc.from_rpc(error) from error


def _prefix(request: kv_pb2.ReserveRequest | kv_pb2.AcquireRequest | kv_pb2.PullRequest) -> ShardPrefix:
    return ShardPrefix(request.tenant, BlockHash(request.parent_hash) if request.parent_hash else None)
