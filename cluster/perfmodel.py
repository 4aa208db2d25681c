"""How long steps must take at least: Lamina's equations and DistKV-LLM's model. Pure.

Sources: Lamina, arXiv 2405.01814 (MTIME, ATIME, minimum bandwidth); Infinite-LLM, arXiv 2401.02669 (T(b, S)).
The papers' notation beside our names: N parameters, e element_bytes, B batch, l context_tokens,
d hidden_size, L layers, G query_group (query heads per KV head). These are floors: a roofline says what
cannot be beaten, not what will be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

OVERLAP_ALPHA = 0.2
"""Lamina's alpha: the share of a step the exchange may take."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model the equations need; `weight_bytes` = eN."""

    weight_bytes: float
    element_bytes: int
    layers: int
    hidden_size: int
    query_group: int

    @property
    def parameters(self) -> float:
        """N."""
        return self.weight_bytes / self.element_bytes

    @property
    def kv_token_bytes(self) -> float:
        """KV cache of one token over all layers: 2 L (d / G) e."""
        return 2 * self.layers * self.hidden_size / self.query_group * self.element_bytes


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """What one device does per second at its peak, and what it remembers."""

    flops_per_s: float
    bandwidth_bytes_per_s: float
    memory_bytes: float

    def __post_init__(self) -> None:
        assert min(self.flops_per_s, self.bandwidth_bytes_per_s, self.memory_bytes) > 0


def dense_step_floor_s(model: ModelShape, batch: int, device: DeviceSpeed, devices: int = 1) -> float:
    """MTIME(B) = max(2NB / FLOPS, eN / BW): the dense operators of one step over `batch` tokens."""
    compute_s = 2 * model.parameters * batch / device.flops_per_s
    weights_s = model.weight_bytes / device.bandwidth_bytes_per_s
    return max(compute_s, weights_s) / devices


def attention_step_floor_s(
    model: ModelShape, batch: int, context_tokens: float, device: DeviceSpeed, devices: int = 1
) -> float:
    """ATIME(B, l) = B l (KV bytes per token) / BW: attention of one decoding step, the cache read once."""
    return batch * context_tokens * model.kv_token_bytes / (device.bandwidth_bytes_per_s * devices)


def lane_floor_s(layers: int, round_trip_s: float) -> float:
    """What one exchange per layer costs per step however small the messages: layers x round trip."""
    return layers * round_trip_s


def exchange_step_bytes(model: ModelShape, batch: int) -> float:
    """(2 + 2/G) e d B L: queries and outputs, keys and values, of one step over all layers."""
    return (2 + 2 / model.query_group) * model.element_bytes * model.hidden_size * batch * model.layers


def minimum_bandwidth_bytes_per_s(
    model: ModelShape, batch: int, dense_s: float, attention_s: float, alpha: float = OVERLAP_ALPHA
) -> float:
    """Least bandwidth between both sides so that the exchange takes a share `alpha` of MTIME + ATIME."""
    return exchange_step_bytes(model, batch) / (alpha * (dense_s + attention_s))


def requests_held(memory_bytes: float, context_tokens: int, model: ModelShape) -> int:
    """Requests of this context whose KV cache fits, weights left out."""
    return int(memory_bytes // (context_tokens * model.kv_token_bytes))


def staggered_dense_replicas(dense_s: float, attention_s: float) -> float:
    """n - 1 model replicas that n batches in rotation keep busy on one set of memory devices.

    Lamina's rotational staggered pipelining: t_a = t_m / (n - 1).
    """
    return dense_s / attention_s


def layer_time_s(
    batch: int,
    contexts_tokens: Sequence[int],
    dense_work: Callable[[int], float],
    dense_speed: Callable[[int], float],
    attention_speed: Callable[[int], float],
) -> float:
    """DistKV-LLM's T(b, S) = W(b) / f(b) + sum_r S_r / g(S), one layer.

    `dense_work(b)` in FLOP, `dense_speed(b)` in FLOP/s, `attention_speed(S)` in tokens of context per second
    at S tokens in all.
    """
    total = sum(contexts_tokens)
    attention_s = sum(tokens / attention_speed(total) for tokens in contexts_tokens)
    return dense_work(batch) / dense_speed(batch) + attention_s


def lane_deadline_s(predicted_s: float, floor_ms: float, factor: float) -> float:
    """How long a layer's reply may take: the floor plus `factor` times what was predicted."""
    assert predicted_s >= 0
    return floor_ms / 1000 + factor * predicted_s


def single_step_s(dense_s: float, attention_s: float, lane_s: float) -> float:
    """A step of one micro-batch: while one side works the other waits."""
    return dense_s + attention_s + lane_s


def staggered_step_s(
    first_dense_s: float,
    second_dense_s: float,
    first_attention_s: float,
    second_attention_s: float,
    lane_s: float,
) -> float:
    """A step of two micro-batches, staggered; each argument is over all layers, `lane_s` of either one.

    Lamina's rotational pipelining with n = 2: per layer both sides work for both micro-batches, and each
    micro-batch passes through dense, lane and attention one after the other. The longest of these decides.
    """
    return max(
        first_dense_s + second_dense_s,
        first_attention_s + second_attention_s,
        max(first_dense_s + first_attention_s, second_dense_s + second_attention_s) + lane_s,
    )


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of some work: `base_s`, and `each_s` for each unit of it."""

    base_s: float
    each_s: float

    def at(self, units: float) -> float:
        """Seconds for `units`."""
        return self.base_s + self.each_s * units

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]], *, is_fixed: bool) -> Line:
        """Least squares through (units, seconds), neither part negative. Points of one size do not tell what
        another takes: as much if the work `is_fixed` (weights are read whatever the batch), else its share.
        """
        assert points, "a line needs a point"
        mean_units = sum(units for units, _ in points) / len(points)
        mean_s = sum(seconds for _, seconds in points) / len(points)
        spread = sum((units - mean_units) ** 2 for units, _ in points)
        if spread <= 1e-6 * mean_units**2:
            return cls(mean_s, 0.0) if is_fixed or mean_units == 0 else cls(0.0, mean_s / mean_units)
        slope = sum((units - mean_units) * (seconds - mean_s) for units, seconds in points) / spread
        slope = max(0.0, slope)
        base_s = mean_s - slope * mean_units
        return cls(base_s, slope) if base_s >= 0 else cls(0.0, mean_s / mean_units)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one micro-batch asks of both sides: rows, and scores (row x token seen) per layer and head."""

    rows: int
    scores: int


@dataclass(frozen=True, slots=True)
class SideTimes:
    """What a micro-batch takes over all layers: dense by rows, attention by scores, and lanes."""

    dense: Line
    attention: Line
    lane_s: float


def staggering_gain(times: SideTimes, first: MicroBatch, second: MicroBatch) -> float:
    """How many times as long the step takes as one micro-batch as it takes as these two. Splitting reads the
    weights twice, so it pays (more than 1) where the sides are alike, and not where one of them rules.
    """
    rows, scores = first.rows + second.rows, first.scores + second.scores
    single_s = single_step_s(times.dense.at(rows), times.attention.at(scores), times.lane_s)
    staggered_s = staggered_step_s(
        times.dense.at(first.rows),
        times.dense.at(second.rows),
        times.attention.at(first.scores),
        times.attention.at(second.scores),
        times.lane_s,
    )
    return single_s / staggered_s if staggered_s > 0 else 1.0


def staggered_halves_s(dense_s: float, attention_s: float, lane_s: float) -> float:
    """A step of two equal micro-batches: `dense_s` and `attention_s` of both together, `lane_s` of one."""
    return staggered_step_s(dense_s / 2, dense_s / 2, attention_s / 2, attention_s / 2, lane_s)


def staggered_tax(dense_s: float, attention_s: float, lane_s: float, monolithic_s: float) -> float:
    """How many times as long the split step takes as the monolithic one."""
    return staggered_halves_s(dense_s, attention_s, lane_s) / monolithic_s


def staggered_gain(dense_s: float, attention_s: float, lane_s: float, monolithic_s: float) -> float:
    """How many times the throughput of the monolithic step the split one has."""
    return monolithic_s / staggered_halves_s(dense_s, attention_s, lane_s)


EQUATIONS: Mapping[str, Callable[..., float]] = {
    equation.__name__: equation
    for equation in (
        single_step_s,
        staggered_step_s,
        staggered_halves_s,
        staggered_tax,
        staggered_gain,
        lane_floor_s,
        lane_deadline_s,
    )
}
"""By name, for records of predictions that carry their inputs."""
