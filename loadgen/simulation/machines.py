"""The hardware of a simulation: how many devices of which kind do what, and how well they are used."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from cluster import prices
from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue, HardwareClass
from cluster.perfmodel import ModelShape
from loadgen.cost import Bill, Devices


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """What devices reach of the catalogue's figures: the one place where a simulation is not first
    principles. Nothing here was fitted to a result. The shares of compute and memory are rooflines, so that
    throughput is what cannot be beaten; set them to what kernels reach on your devices.
    """

    flops: float = 1.0
    """Share of the peak that dense operators and prefill attention reach."""
    bandwidth: float = 1.0
    """Share of the memory's bandwidth at which weights and cache are read."""
    network: float = 0.914
    """Share of the line rate: 45.7 of 50 GB/s (Lamina, arXiv 2405.01814)."""
    memory: float = 0.9
    """Share of the memory for weights and cache; the rest is for activations (vLLM's default)."""
    round_trip_s: float = 33e-6
    """Of one exchange of a layer; Lamina's network stack. NCCL: 66.6e-6."""
    step_s: float = 0.0
    """Of every step, whatever it does: launching kernels, sampling, planning."""
    call_s: float = 1e-3
    """Of a call between processes: a request's way to the scheduler, a token's way back, a reservation."""

    def __post_init__(self) -> None:
        shares = (self.flops, self.bandwidth, self.network, self.memory)
        if not all(0 < share <= 1 for share in shares):
            raise InvalidRequest(
                "efficiencies of flops, bandwidth, network and memory are above 0, at most 1"
            )
        if min(self.round_trip_s, self.step_s) < 0 or not self.call_s > 0:
            raise InvalidRequest("round_trip_s and step_s are at least 0, call_s is above 0")

    @classmethod
    def parse(cls, text: str) -> Efficiencies:
        """`flops=0.7,bandwidth=0.85`. Raises InvalidRequest for other names and numbers."""
        names = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, number = part.partition("=")
            if name not in names:
                raise InvalidRequest(f"no efficiency {name!r}; there are {', '.join(sorted(names))}")
            try:
                values[name] = float(number)
            except ValueError as error:
                raise InvalidRequest(f"{part!r} is no efficiency: write flops=0.7,bandwidth=0.85") from error
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Side:
    """Some devices of one kind."""

    kind: HardwareClass
    devices: int

    @property
    def price_per_hour_usd(self) -> float:
        """Of all of them."""
        return self.kind.price_per_hour_usd * self.devices

    def __str__(self) -> str:
        return f"{self.kind.name}x{self.devices}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A cluster: `dense_workers` dense workers of `dense` each, and attention workers of one device of
    `attention` each, which all dense workers use. Without `attention` the cache lies beside the weights.
    """

    dense: Side
    attention: Side | None = None
    dense_workers: int = 1

    def __post_init__(self) -> None:
        for side in (self.dense, self.attention) if self.attention else ():
            if side is not None and side.kind.network_bytes_per_s is None:
                raise InvalidRequest(f"the catalogue has no network_bytes_per_s of {side.kind.name}: add it")

    @property
    def price_per_hour_usd(self) -> float:
        """Of all devices."""
        attention_usd = self.attention.price_per_hour_usd if self.attention else 0.0
        return self.dense_workers * self.dense.price_per_hour_usd + attention_usd

    @property
    def devices(self) -> int:
        """Of both sides."""
        return self.dense_workers * self.dense.devices + (self.attention.devices if self.attention else 0)

    @property
    def bill(self) -> Bill:
        """What the catalogue asks for all devices, and what they draw."""

        def devices(kind: HardwareClass, count: int, per_worker: int) -> Devices:
            return Devices(count, kind.name, prices.of(kind), kind.power_watts, per_worker)

        dense, attention = self.dense, self.attention
        return Bill(
            devices(dense.kind, self.dense_workers * dense.devices, dense.devices),
            devices(attention.kind, attention.devices, 1) if attention else None,
        )

    @property
    def is_deployable(self) -> bool:
        """Whether this project can run it today: a dense worker is one device."""
        return self.dense.devices == 1

    def holds_weights(self, model: ModelShape, efficiencies: Efficiencies) -> bool:
        """Whether each dense worker's devices hold the model."""
        return self._dense_bytes(efficiencies) >= model.weight_bytes

    def cache_bytes(self, model: ModelShape, efficiencies: Efficiencies) -> float:
        """KV cache of each attention worker or, without any, of each dense worker. Raises InvalidRequest
        where the weights do not fit.
        """
        if not self.holds_weights(model, efficiencies):
            raise InvalidRequest(
                f"{self.dense} holds {self._dense_bytes(efficiencies) / 1e9:,.0f} GB for weights and cache; "
                f"the weights are {model.weight_bytes / 1e9:,.1f} GB: give a dense worker more devices"
            )
        if self.attention is None:
            return self._dense_bytes(efficiencies) - model.weight_bytes
        return self.attention.kind.memory_bytes * efficiencies.memory

    def __str__(self) -> str:
        dense = str(self.dense) if self.dense_workers == 1 else f"{self.dense_workers} x {self.dense}"
        return f"{dense} + {self.attention}" if self.attention else f"{dense} alone"

    def _dense_bytes(self, efficiencies: Efficiencies) -> float:
        return self.dense.devices * self.dense.kind.memory_bytes * efficiencies.memory


def parse_side(text: str, catalogue: Catalogue) -> Side:
    """`h100x2`, or `h100` for one. Raises InvalidRequest, naming the kinds there are."""
    if text in catalogue:
        return Side(catalogue[text], 1)
    match = re.fullmatch(r"(.+)x(\d+)", text)
    if match is None or match[1] not in catalogue or int(match[2]) < 1:
        raise InvalidRequest(f"{text!r}: write h100x2; kinds are {', '.join(catalogue)}")
    return Side(catalogue[match[1]], int(match[2]))
