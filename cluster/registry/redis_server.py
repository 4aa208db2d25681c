"""The registry in Redis: outlives the controller, and is read by whoever does not reach it.

The one file that imports `redis`, and its one translator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.blocks import BlockHash
from cluster.errors import AnabranchError, Fenced, Internal, ResourceExhausted, Unauthenticated, Unavailable
from cluster.policies.directory import HeldBlock
from cluster.registry import block_codec, scripts
from cluster.registry.interface import (
    PAST_EPOCHS_MOST,
    ControllerRecord,
    MemberRecord,
    RegistryView,
)
from cluster.registry.settings import RegistryConfig
from cluster.types import Epoch, WorkerId

_REFUSALS = ("OOM", "MISCONF", "READONLY", "NOREPLICAS")
_BATCH_MOST = 500
"""Members or blocks written or listed in one call: Redis does nothing else meanwhile."""


class RedisRegistry:
    """Owns a pool of connections to one Redis; keeps nothing else. See `Registry` and `scripts`."""

    def __init__(self, config: RegistryConfig) -> None:
        """Connects when first used. Raises ConfigError for a password file that cannot be read."""
        self._prefix = f"anabranch:{scripts.FORMAT_VERSION}:{{{config.cluster}}}:"
        self._lease_ms = int(config.lease_s * 1000)
        self._place = config.place
        self._client = _client(config)
        script = self._client.register_script
        self._claim = script(scripts.CLAIM)
        self._publish = script(scripts.PUBLISH.replace("{past_most}", str(PAST_EPOCHS_MOST)))
        self._head = script(scripts.HEAD)
        self._members = script(scripts.MEMBERS)
        self._publish_blocks = script(scripts.PUBLISH_BLOCKS)
        self._blocks_most = config.blocks_most

    def claim(self, controller: ControllerRecord, *, take_over: bool) -> None:
        """See `Registry`."""
        record = (controller.address, controller.agreement, controller.welcome, int(take_over))
        self._write(self._claim, controller.epoch, record)

    def publish(
        self,
        writer: Epoch,
        version: int,
        present: Sequence[MemberRecord],
        gone: Sequence[tuple[WorkerId, Epoch]],
    ) -> frozenset[WorkerId]:
        """See `Registry`. More members than fit one call are written in parts, the version with the last."""
        refused: set[WorkerId] = set()
        ended = [word for worker, epoch in gone for word in (worker, _hexadecimal(epoch))]
        *first, last = _parts(present) or [()]
        for part, name in (*((part, "") for part in first), (last, version)):
            words = [word for each in part for word in (each.worker, _hexadecimal(each.epoch), each.body)]
            answer = self._write(self._publish, writer, (name, len(ended) // 2, *ended, *words))
            refused.update(WorkerId(worker.decode()) for worker in answer)
            ended = []
        return frozenset(refused)

    def version(self) -> int:
        """See `Registry`."""
        with self._translated():
            return int(self._client.get(f"{self._prefix}version") or 0)

    def read(self) -> RegistryView:
        """See `Registry`. Many members are read in parts."""
        version, controller, names = self._run(self._head, ())
        members: list[MemberRecord] = []
        past: dict[WorkerId, tuple[Epoch, ...]] = {}
        for part in _parts(sorted(WorkerId(name.decode()) for name in names)):
            for worker, (epoch, body, ended) in zip(part, self._run(self._members, part), strict=True):
                if epoch is not None:
                    members.append(MemberRecord(worker, _epoch(epoch), body))
                if ended:
                    past[worker] = tuple(map(_epoch, reversed(ended)))
        return RegistryView(int(version), _controller(controller), tuple(members), past)

    def publish_blocks(self, writer: Epoch, blocks: Sequence[HeldBlock], *, starts_over: bool = False) -> int:
        """See `Registry`. More blocks than fit one call are written in parts."""
        kept = 0
        for part in _parts(blocks) or [()]:
            words = [word for block in part for word in (block.identity, block_codec.pack(block))]
            settings = (self._blocks_most, int(starts_over))
            kept = int(self._write(self._publish_blocks, writer, (*settings, *words)))
            starts_over = False
        return kept

    def find_blocks(self, identities: Sequence[BlockHash]) -> list[HeldBlock]:
        """See `Registry`. One call."""
        if not identities:
            return []
        with self._translated():
            found: list[Any] = self._client.hmget(f"{self._prefix}blocks", list(identities))
        kept = takewhile(lambda each: each[1] is not None, zip(identities, found, strict=True))
        return [block_codec.unpack(identity, held) for identity, held in kept]

    def read_blocks(self) -> Iterator[list[HeldBlock]]:
        """See `Registry`."""
        cursor = None
        while cursor != 0:
            with self._translated():
                answer: Any = self._client.hscan(f"{self._prefix}blocks", cursor or 0, count=_BATCH_MOST)
            cursor, found = answer
            yield [block_codec.unpack(BlockHash(identity), held) for identity, held in found.items()]

    def close(self) -> None:
        """See `Registry`."""
        self._client.close()

    def _write(self, script: Any, writer: Epoch, words: Iterable[Any]) -> Any:
        answer = self._run(script, (_hexadecimal(writer), self._lease_ms, *words))
        if answer == b"FENCED":
            raise Fenced(f"the registry at {self._place} has no controller, or another one")
        return answer

    def _run(self, script: Any, words: Iterable[Any]) -> Any:
        with self._translated():
            return script(keys=[f"{self._prefix}controller"], args=[self._prefix, *words])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the library and of Redis, as ours."""
        where = f"the registry at {self._place}"
        try:
            yield
        except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise Unauthenticated(f"{where} refuses this user or password: {error}") from error
        except redis.exceptions.BusyLoadingError as error:
            raise Unavailable(f"{where} still loads its data") from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
            raise Unavailable(f"{where} does not answer: {error}") from error
        except redis.exceptions.ResponseError as error:
            raise self._refusal(error) from error
        except redis.exceptions.RedisError as error:
            raise Internal(f"{where} and its client do not understand each other: {error}") from error

    def _refusal(self, error: redis.exceptions.ResponseError) -> AnabranchError:
        """Memory or disk full, or a replica: it answers, but takes nothing."""
        where, text = f"the registry at {self._place}", str(error)
        is_full = isinstance(error, redis.exceptions.OutOfMemoryError | redis.exceptions.ReadOnlyError)
        if is_full or text.startswith(_REFUSALS):
            return ResourceExhausted(f"{where} refuses writes: {text}")
        if text.startswith("NOAUTH"):
            return Unauthenticated(f"{where} asks for a password")
        return Internal(f"{where} does not understand: {text}")


def _client(config: RegistryConfig) -> redis.Redis:
    deadline_s = config.deadline_ms / 1000
    address = config.parts
    options: dict[str, Any] = {}
    if address.is_encrypted:
        options = {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_ca_certs": config.authority,
        }
    # A connection that Redis closed meanwhile is opened anew; a call that took too long is not repeated.
    retry = Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))
    return redis.Redis(
        host=address.host,
        port=address.port,
        db=address.database,
        username=address.username,
        password=config.password(),
        socket_timeout=deadline_s,
        socket_connect_timeout=deadline_s,
        retry=retry,
        **options,
    )


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[at : at + _BATCH_MOST] for at in range(0, len(items), _BATCH_MOST)]


def _hexadecimal(epoch: Epoch) -> str:
    return f"{epoch:016x}"


def _epoch(raw: bytes) -> Epoch:
    return Epoch(int(raw, 16))


def _controller(raw: Sequence[bytes | None]) -> ControllerRecord | None:
    epoch, address, agreement, welcome = raw
    if epoch is None or address is None or agreement is None or welcome is None:
        return None
    return ControllerRecord(_epoch(epoch), address.decode(), agreement.decode(), welcome)
