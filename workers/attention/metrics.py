"""What an attention worker tells Prometheus, read from its stores when it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.attention.worker import AttentionWorker

_STATES = ("free", "reserved", "open", "sealed_referenced", "sealed_cached")


class AttentionMetrics(Collector):
    """Collects from the arenas of one process, labelled with their names, for whatever registry it is put
    into.
    """

    def __init__(self, arenas: Sequence[AttentionWorker]) -> None:
        self._arenas = arenas

    def collect(self) -> Iterator[Metric]:
        """Blocks by state, how full an arena is, leases ended, seconds of attention, bytes of lanes."""
        yield from self._blocks()
        leases = CounterMetricFamily(
            "anabranch_attention_leases_expired", "Sequences nobody renewed.", labels=["arena"]
        )
        busy = CounterMetricFamily(
            "anabranch_attention_busy_seconds",
            "Time spent appending and attending; its rate is the busy ratio.",
            labels=["arena"],
        )
        lanes = GaugeMetricFamily("anabranch_attention_lanes", "Open lanes.", labels=["arena"])
        carried = CounterMetricFamily(
            "anabranch_attention_lane_bytes", "Bytes of all lanes.", labels=["arena", "direction"]
        )
        for arena in self._arenas:
            leases.add_metric([arena.name], arena.core.store.leases_expired)
            busy.add_metric([arena.name], arena.core.busy_seconds)
            lanes.add_metric([arena.name], arena.lanes.lanes_open)
            for direction, count in zip(("sent", "received"), arena.lanes.bytes_carried(), strict=True):
                carried.add_metric([arena.name, direction], count)
        yield from (leases, busy, lanes, carried)

    def _blocks(self) -> Iterator[Metric]:
        blocks = GaugeMetricFamily(
            "anabranch_attention_blocks", "Blocks of the arena.", labels=["arena", "state"]
        )
        used = GaugeMetricFamily(
            "anabranch_attention_pool_usage_ratio", "Share of the arena in use.", labels=["arena"]
        )
        for arena in self._arenas:
            account = arena.core.store.audit()
            for state in _STATES:
                blocks.add_metric([arena.name, state], getattr(account, state))
            used.add_metric([arena.name], 1 - (account.free + account.sealed_cached) / account.capacity)
        yield from (blocks, used)
