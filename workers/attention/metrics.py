"""What an attention worker tells Prometheus, read from the store when it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.attention.core import AttentionCore
from workers.lanes.server import LaneServer


class AttentionMetrics(Collector):
    """Collects from one worker, for whatever registry it is put into."""

    def __init__(self, core: AttentionCore, lanes: LaneServer) -> None:
        self._core = core
        self._lanes = lanes

    def collect(self) -> Iterator[Metric]:
        """Blocks by state, how full the arena is, leases ended, seconds of attention, bytes of lanes."""
        store = self._core.store
        account = store.audit()
        blocks = GaugeMetricFamily("anabranch_attention_blocks", "Blocks of the arena.", labels=["state"])
        for state in ("free", "reserved", "open", "sealed_referenced", "sealed_cached"):
            blocks.add_metric([state], getattr(account, state))
        yield blocks
        used = 1 - (account.free + account.sealed_cached) / account.capacity
        yield GaugeMetricFamily("anabranch_attention_pool_usage_ratio", "Share of the arena in use.", used)
        yield CounterMetricFamily(
            "anabranch_attention_leases_expired", "Sequences nobody renewed.", store.leases_expired
        )
        yield CounterMetricFamily(
            "anabranch_attention_busy_seconds",
            "Time spent appending and attending; its rate is the busy ratio.",
            self._core.busy_seconds,
        )
        yield GaugeMetricFamily("anabranch_attention_lanes", "Open lanes.", self._lanes.lanes_open)
        carried = CounterMetricFamily(
            "anabranch_attention_lane_bytes", "Bytes of all lanes.", labels=["direction"]
        )
        for direction, count in zip(("sent", "received"), self._lanes.bytes_carried(), strict=True):
            carried.add_metric([direction], count)
        yield carried
