"""Asks for prefixes that other dense workers left in the pool: the controller's directory, or the copy of it
in the registry while no controller answers.

Used by the pool's threads. It asks once per new request rather than being told of every change: a
copy of the directory in each dense worker would need reports, gaps and memory of its own, to save a call of a
millisecond.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import grpc

from anabranch.v1 import control_pb2, control_pb2_grpc
from cluster import rpc
from cluster.blocks import HASHES_MOST, BlockHash
from cluster.clock import Clock, monotonic
from cluster.config import TlsConfig
from cluster.errors import AnabranchError
from cluster.policies.directory import Life, Run, runs_of
from cluster.policies.prefixes import Find
from cluster.registry.opening import open_registry
from cluster.registry.settings import RegistryConfig
from cluster.telemetry import logger
from cluster.types import Epoch, WorkerId

_log = logger("dense.finder")

_FIND_MS = 50
"""A request waits for either answer no longer than this: computing a prompt takes longer, but not much."""
_PAUSE_FIRST_S = 1.0
_PAUSE_MOST_S = 30.0
_DOUBLINGS_MOST = 16


class Patience:
    """Leaves whoever does not answer alone for a while, and longer each time. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._resume_s = clock()

    @property
    def is_paused(self) -> bool:
        """Whether nobody should ask now."""
        return self._clock() < self._resume_s

    def answered(self) -> None:
        """There was an answer: the next pause is a short one again."""
        self._failures = 0

    def failed(self) -> float:
        """There was none; returns for how many seconds nobody should ask. Calls that failed together are one
        failure: 0 for all but the first.
        """
        with self._lock:
            if self.is_paused:
                return 0.0
            pause_s: float = min(_PAUSE_FIRST_S * 2 ** min(self._failures, _DOUBLINGS_MOST), _PAUSE_MOST_S)
            self._failures += 1
            self._resume_s = self._clock() + pause_s
            return pause_s


def find_nothing(_hashes: Sequence[BlockHash], _blocks_before: int) -> tuple[Run, ...]:
    """Where there is nobody else to ask."""
    return ()


class PrefixFinder:
    """`FindPrefix` with a short deadline. A controller that does not answer is left alone for a while, and
    longer each time: `otherwise` is asked instead. Where the controller is may change: see `follow`.
    """

    def __init__(
        self,
        controller: str,
        tls: TlsConfig,
        clock: Clock = monotonic,
        timeout_s: float = _FIND_MS / 1000,
        otherwise: Find = find_nothing,
    ) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._tls = tls
        self._otherwise = otherwise
        self._patience = Patience(clock)
        self._channel = rpc.channel(controller, tls)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def find(self, hashes: Sequence[BlockHash], blocks_before: int) -> tuple[Run, ...]:
        """The longest run of these consecutive blocks that may lie somewhere, as far as anybody knows.
        Raises nothing.
        """
        if not hashes:
            return ()
        asked = hashes[:HASHES_MOST]
        found = self._ask(asked, blocks_before)
        return self._otherwise(asked, blocks_before) if found is None else found

    @property
    def is_paused(self) -> bool:
        """Whether the controller is left alone for now."""
        return self._patience.is_paused

    def follow(self, controller: str) -> None:
        """Ask at this host:port from now on, at once. A call under way finds nothing there."""
        last, self._channel = self._channel, rpc.channel(controller, self._tls)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._patience = Patience(self._clock)
        last.close()

    def close(self) -> None:
        """Close the channel. Idempotent."""
        self._channel.close()

    def _ask(self, hashes: Sequence[BlockHash], blocks_before: int) -> tuple[Run, ...] | None:
        """What the controller says; None where it does not answer."""
        patience, stub = self._patience, self._stub
        if patience.is_paused:
            return None
        request = control_pb2.FindPrefixRequest(block_hashes=hashes, blocks_before=blocks_before)
        try:
            response = stub.FindPrefix(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            if patience is self._patience and (pause_s := patience.failed()):
                _log.warning("directory_away", pause_s=pause_s, problem=rpc.from_rpc(error).message)
            return None
        except ValueError:  # what grpc says of a channel that was closed since
            return None
        patience.answered()
        return tuple(Run(run.blocks, tuple(map(_life, run.holders))) for run in response.runs)


class CopyFinder:
    """The registry's copy of the directory, asked with a short deadline; a registry that does not answer is
    left alone as a controller is. What it names may be as old as the controller's absence.
    """

    def __init__(self, config: RegistryConfig, clock: Clock = monotonic) -> None:
        """Raises ConfigError as `open_registry`."""
        deadline_ms = min(config.deadline_ms, _FIND_MS)
        self._registry = open_registry(config.model_copy(update={"deadline_ms": deadline_ms}))
        self._patience = Patience(clock)

    def find(self, hashes: Sequence[BlockHash], blocks_before: int) -> tuple[Run, ...]:
        """The longest run of these consecutive blocks in the copy. Raises nothing."""
        if self._patience.is_paused:
            return ()
        try:
            blocks = self._registry.find_blocks(hashes)
        except AnabranchError as error:
            if pause_s := self._patience.failed():
                _log.warning("directory_copy_away", pause_s=pause_s, problem=error.message)
            return ()
        self._patience.answered()
        return runs_of(blocks, blocks_before)

    def close(self) -> None:
        """Let the connections go. Idempotent."""
        self._registry.close()


def _life(holder: control_pb2.Holder) -> Life:
    return Life(WorkerId(holder.worker_id), Epoch(holder.epoch))
