"""Asks the controller's directory for prefixes that other dense workers left in the pool.

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
from cluster.policies.directory import Life, Run
from cluster.telemetry import logger
from cluster.types import Epoch, WorkerId

_log = logger("dense.finder")

_FIND_S = 0.05
"""A request waits for the controller no longer than this: computing a prompt takes longer, but not much."""
_PAUSE_FIRST_S = 1.0
_PAUSE_MOST_S = 30.0
_DOUBLINGS_MOST = 16


class PrefixFinder:
    """`FindPrefix` with a short deadline. A controller that does not answer is left alone for a while, and
    longer each time: requests go on without it. Where the controller is may change: see `follow`.
    """

    def __init__(
        self, controller: str, tls: TlsConfig, clock: Clock = monotonic, timeout_s: float = _FIND_S
    ) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._tls = tls
        self._channel = rpc.channel(controller, tls)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._lock = threading.Lock()
        self._failures = 0
        self._resume_s = 0.0

    def find(self, hashes: Sequence[BlockHash], blocks_before: int) -> tuple[Run, ...]:
        """The longest run of these consecutive blocks that may lie somewhere; nothing while the controller
        does not answer. Raises nothing.
        """
        if not hashes or self.is_paused:
            return ()
        request = control_pb2.FindPrefixRequest(
            block_hashes=hashes[:HASHES_MOST], blocks_before=blocks_before
        )
        stub = self._stub
        try:
            response = stub.FindPrefix(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            self._pause(stub, rpc.from_rpc(error).message)
            return ()
        except ValueError:  # what grpc says of a channel that was closed since
            return ()
        self._failures = 0
        return tuple(Run(run.blocks, tuple(map(_life, run.holders))) for run in response.runs)

    @property
    def is_paused(self) -> bool:
        """Whether the controller is left alone for now."""
        return self._clock() < self._resume_s

    def follow(self, controller: str) -> None:
        """Ask at this host:port from now on, at once. A call under way to the last one finds nothing."""
        channel = rpc.channel(controller, self._tls)
        with self._lock:
            last, self._channel = self._channel, channel
            self._stub = control_pb2_grpc.ControlServiceStub(channel)
            self._failures, self._resume_s = 0, 0.0
        last.close()

    def close(self) -> None:
        """Close the channel. Idempotent."""
        self._channel.close()

    def _pause(self, stub: control_pb2_grpc.ControlServiceStub, problem: str) -> None:
        with self._lock:
            if stub is not self._stub or self.is_paused:  # calls that failed together are one failure
                return
            pause_s = min(_PAUSE_FIRST_S * 2 ** min(self._failures, _DOUBLINGS_MOST), _PAUSE_MOST_S)
            self._failures += 1
            self._resume_s = self._clock() + pause_s
        _log.warning("directory_away", pause_s=pause_s, problem=problem)


def _life(holder: control_pb2.Holder) -> Life:
    return Life(WorkerId(holder.worker_id), Epoch(holder.epoch))
