"""`KvService`: reservations, leases, take-over and the audit, over gRPC. Thin: the store decides."""

from __future__ import annotations

import grpc

from anabranch.v1 import inference_pb2, kv_pb2, kv_pb2_grpc, types_pb2
from anabranch.wire import sequence_key, sequence_message, shard_message
from cluster import rpc
from cluster.blocks import BlockHash
from cluster.errors import Fenced
from cluster.types import Generation, KvGeometry
from workers.attention.shard_blocks import BlockAccount
from workers.attention.store import Store
from workers.peer import HeldShard, ShardPrefix


class KvService(kv_pb2_grpc.KvServiceServicer):
    """Serves one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

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
    def Release(  # the name of the RPC
        self, request: kv_pb2.ReleaseRequest, context: grpc.ServicerContext
    ) -> kv_pb2.ReleaseResponse:
        """Free a sequence's shards."""
        self._check_epoch(request.believed)
        blocks = self._store.release(sequence_key(request.sequence), Generation(request.generation))
        return kv_pb2.ReleaseResponse(responder=self._responder(), blocks_released=blocks)

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
        held = self._store.adopt(
            sequence_key(request.sequence), Generation(request.generation), list(request.token_ids)
        )
        return kv_pb2.AdoptResponse(responder=self._responder(), shards=map(_held, held))

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


def _prefix(request: kv_pb2.ReserveRequest | kv_pb2.AcquireRequest) -> ShardPrefix:
    return ShardPrefix(request.tenant, BlockHash(request.parent_hash) if request.parent_hash else None)
