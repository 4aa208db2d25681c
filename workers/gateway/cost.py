"""What tokens cost while a cluster runs, from what its members report and the prices of their devices.

Allocation basis: every dense and attention worker is paid for from when it is heard of until it is gone, busy
or not. Usage basis: only the seconds it worked, by its own account (`Load.busy_seconds`); moving bytes, which
`loadgen.cost` sees from its records, is not among them. An attention worker of several arenas is one device,
which works as its best arena does.

Each gateway counts its share, 1 / gateways, of the whole cluster's dollars, and its own requests' tokens: so
sums over gateways are the cluster's, as of all counters of a gateway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anabranch.v1 import control_pb2, inference_pb2
from cluster import prices
from cluster.clock import Clock, monotonic
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.prices import Price, per_mtok

_Life: TypeAlias = tuple[str, int]
"""(worker, epoch)"""


_Role: TypeAlias = inference_pb2.Role.ValueType
_NAMES: Mapping[_Role, str] = {inference_pb2.ROLE_DENSE: "dense", inference_pb2.ROLE_ATTENTION: "attention"}


@dataclass(slots=True)
class _Account:
    """Of all workers of a role."""

    price: Price
    usd_per_s: float = 0.0
    allocated_usd: float = 0.0
    used_usd: float = 0.0


class CostMeter:
    """Adds up dollars by the clock, from membership to membership; may be read from any thread."""

    def __init__(
        self,
        by_role: Mapping[_Role, Price],
        tokens: Callable[[], int],
        clock: Clock = monotonic,
    ) -> None:
        """`by_role`: price of one worker; `tokens`: in and out of this gateway's requests so far."""
        self._accounts = {role: _Account(price) for role, price in by_role.items()}
        self._tokens = tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._busy_s: dict[_Life, float] = {}
        self._counted_s = clock()

    @classmethod
    def of(cls, config: Config, tokens: Callable[[], int]) -> CostMeter | None:
        """By the configuration's prices; None where it names no kind of device. Raises InvalidRequest and
        ConfigError for prices that are missing.
        """
        cost = config.telemetry.cost
        if cost.dense is None:
            return None
        known = prices.in_force(cost, config.placement)
        by_role = {inference_pb2.ROLE_DENSE: known[cost.dense]}
        if cost.attention is not None:
            by_role[inference_pb2.ROLE_ATTENTION] = known[cost.attention]
        elif config.attention.replicas:
            raise ConfigError("telemetry.cost.attention: name the kind of the attention workers' devices")
        return cls(by_role, tokens)

    def set_membership(self, membership: control_pb2.Membership) -> None:
        """Who is paid for from now on, and how long each has worked."""
        paid = [m for m in membership.members if m.role in self._accounts and not m.tier]
        gateways = sum(member.role == inference_pb2.ROLE_GATEWAY for member in membership.members)
        share = 1 / max(1, gateways)
        with self._lock:
            self._count()
            for role, account in self._accounts.items():
                account.usd_per_s = (
                    share * account.price.usd_per_s * sum(member.role == role for member in paid)
                )
            busy_s = {(member.worker_id, member.epoch): member.load.busy_seconds for member in paid}
            for member in paid:
                life, account = (member.worker_id, member.epoch), self._accounts[member.role]
                worked_s = busy_s[life] - self._busy_s.get(life, busy_s[life])
                account.used_usd += share * max(0.0, worked_s) * account.price.usd_per_s
            self._busy_s = busy_s

    def dollars(self) -> dict[str, tuple[float, float]]:
        """This gateway's share so far, by role: allocated, used."""
        with self._lock:
            self._count()
            return {
                _NAMES[role]: (account.allocated_usd, min(account.used_usd, account.allocated_usd))
                for role, account in self._accounts.items()
            }

    def usd_per_mtok(self) -> tuple[float | None, float | None]:
        """Dollars per million tokens so far, on either basis; None before the first token."""
        allocated_usd, used_usd = map(sum, zip(*self.dollars().values(), strict=True))
        return per_mtok(allocated_usd, self._tokens()), per_mtok(used_usd, self._tokens())

    def _count(self) -> None:
        now_s = self._clock()
        for account in self._accounts.values():
            account.allocated_usd += (now_s - self._counted_s) * account.usd_per_s
        self._counted_s = now_s


class CostMetrics(Collector):
    """A meter as Prometheus reads it, with the labels `model_name` and `role`."""

    def __init__(self, model_name: str, meter: CostMeter) -> None:
        self._model_name = model_name
        self._meter = meter

    def collect(self) -> Iterable[Metric]:
        """Dollars by role, and dollars per million tokens since this gateway started, on either basis."""
        dollars = self._meter.dollars()
        for place, name, words in (
            (0, "anabranch:allocated_usd", "This gateway's share of what all workers cost, busy or not."),
            (1, "anabranch:used_usd", "The part of it in which workers worked."),
        ):
            counter = CounterMetricFamily(name, words, labels=("model_name", "role"))
            for role, usd in dollars.items():
                counter.add_metric((self._model_name, role), usd[place])
            yield counter
        gauge = GaugeMetricFamily(
            "anabranch:usd_per_mtok",
            "Dollars per million tokens, prompts and outputs, since this gateway started.",
            labels=("model_name", "basis"),
        )
        for basis, value in zip(("allocation", "usage"), self._meter.usd_per_mtok(), strict=True):
            if value is not None:
                gauge.add_metric((self._model_name, basis), value)
        yield gauge
