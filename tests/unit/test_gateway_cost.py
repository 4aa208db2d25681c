"""Dollars of a running cluster equal hand calculations, on either basis."""

from __future__ import annotations

import datetime

import pytest
from prometheus_client import CollectorRegistry

from anabranch.v1 import control_pb2, inference_pb2
from cluster import config as configuration
from cluster.errors import ConfigError, InvalidRequest
from cluster.prices import Price
from workers.gateway.cost import CostMeter, CostMetrics

HOUR_S = 3600.0
DENSE, ATTENTION, GATEWAY = (
    inference_pb2.ROLE_DENSE,
    inference_pb2.ROLE_ATTENTION,
    inference_pb2.ROLE_GATEWAY,
)


def _price(usd: float) -> Price:
    return Price(price_per_hour_usd=usd, price_date=datetime.date(2026, 11, 1), source="a test")


def _member(
    name: str, role: inference_pb2.Role.ValueType, busy_s: float = 0.0, epoch: int = 1, tier: int = 0
) -> inference_pb2.Member:
    load = inference_pb2.Load(busy_seconds=busy_s)
    return inference_pb2.Member(worker_id=name, role=role, epoch=epoch, load=load, tier=tier)


class Metered:
    """A meter on a clock of its own: $10 an hour for a dense worker, $4 for an attention worker."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.tokens = 0
        prices = {DENSE: _price(10.0), ATTENTION: _price(4.0)}
        self.meter = CostMeter(prices, lambda: self.tokens, lambda: self.now_s)

    def at(self, now_s: float, *members: inference_pb2.Member) -> None:
        """Who lives, from now on."""
        self.now_s = now_s
        self.meter.set_membership(control_pb2.Membership(members=members))

    @property
    def total(self) -> tuple[float, float]:
        """Dollars of all roles: allocated, used."""
        allocated_usd, used_usd = zip(*self.meter.dollars().values(), strict=True)
        return sum(allocated_usd), sum(used_usd)


def test_an_hour_of_a_cluster_by_hand() -> None:
    """One dense and two attention workers, of which the dense worker works 30 minutes and one attention
    worker 15: $18 are allocated, $6 used, over 2,000,000 tokens.
    """
    metered = Metered()
    metered.at(0.0, _member("d", DENSE), _member("a", ATTENTION), _member("b", ATTENTION))
    metered.at(
        HOUR_S / 2, _member("d", DENSE, 900.0), _member("a", ATTENTION, 900.0), _member("b", ATTENTION)
    )
    metered.at(HOUR_S, _member("d", DENSE, 1800.0), _member("a", ATTENTION, 900.0), _member("b", ATTENTION))
    metered.tokens = 2_000_000
    assert metered.total == pytest.approx((18.0, 6.0))
    registry = CollectorRegistry()
    registry.register(CostMetrics("tiny", metered.meter))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "tiny"} | labels)

    assert value("anabranch:usd_per_mtok", basis="allocation") == pytest.approx(9.0)
    assert value("anabranch:usd_per_mtok", basis="usage") == pytest.approx(3.0)
    assert value("anabranch:allocated_usd_total", role="dense") == pytest.approx(10.0)
    assert value("anabranch:allocated_usd_total", role="attention") == pytest.approx(8.0)
    assert value("anabranch:used_usd_total", role="dense") == pytest.approx(5.0)
    assert value("anabranch:used_usd_total", role="attention") == pytest.approx(1.0)


def test_gateways_share_what_a_cluster_costs() -> None:
    """Each of two counts half, so that their sum is the whole."""
    metered = Metered()
    gateways = (_member("g", GATEWAY), _member("h", GATEWAY))
    metered.at(0.0, _member("d", DENSE), *gateways)
    metered.at(HOUR_S, _member("d", DENSE, 360.0), *gateways)
    assert metered.total == pytest.approx((5.0, 0.5))


def test_who_is_paid_for_is_who_lives() -> None:
    """From when it is heard of until it is gone; further arenas of a process are the same device; what a life
    worked before it was heard of, or an earlier life of it, does not count.
    """
    metered = Metered()
    metered.at(HOUR_S, _member("d", DENSE, 500.0), _member("a.1", ATTENTION, 99.0, tier=1))
    metered.at(2 * HOUR_S, _member("d", DENSE, 100.0, epoch=2))
    assert metered.total == pytest.approx((10.0, 0.0))
    metered.at(3 * HOUR_S)
    metered.now_s = 9 * HOUR_S
    assert metered.total == pytest.approx((20.0, 0.0))


def test_before_the_first_token_there_is_no_price_of_one() -> None:
    """The gauge is absent rather than infinite."""
    metered = Metered()
    metered.at(0.0, _member("d", DENSE))
    metered.now_s = HOUR_S
    (*_, gauge) = CostMetrics("tiny", metered.meter).collect()
    assert gauge.samples == []


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dense": "h1000", "attention": "h20"}, InvalidRequest, "telemetry.cost.dense: there is no price"),
        ({"dense": "h100"}, ConfigError, "telemetry.cost.attention"),
        ({"dense": "h100", "attention": "h20", "prices": "nowhere.toml"}, InvalidRequest, "nowhere.toml"),
    ],
)
def test_prices_that_are_missing_are_refused(
    settings: dict[str, str], error: type[Exception], words: str
) -> None:
    """With the key that is wrong."""
    config = configuration.load(None, {f"telemetry.cost.{key}": value for key, value in settings.items()})
    with pytest.raises(error, match=words):
        CostMeter.of(config, lambda: 0)


def test_costs_are_off_until_a_device_is_named() -> None:
    """And attention alone cannot be paid for."""
    assert CostMeter.of(configuration.load(None), lambda: 0) is None
    with pytest.raises(ConfigError, match=r"cost\.dense"):
        configuration.load(None, {"telemetry.cost.attention": "h20"})
