"""How long steps must take at least: Lamina's equations and DistKV-LLM's model. Pure.

Sources: Lamina, arXiv 2405.01814 (MTIME, ATIME, minimum bandwidth); Infinite-LLM, arXiv 2401.02669 (T(b, S)).
The papers' notation beside our names: N parameters, e element_bytes, B batch, l context_tokens,
d hidden_size, L layers, G query_group (query heads per KV head). These are floors: a roofline says what
cannot be beaten, not what will be reached.
"""

from __future__ import annotations

import math
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


def dense_step_floor_s(model: ModelShape, batch: float, device: DeviceSpeed, devices: int = 1) -> float:
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
    def evenly(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Least squares of relative differences through (units, seconds): where points span decades, plain
        ones would say of the small what the noise of the large is. Either part may be negative.
        """
        assert len(points) > 1, "a line needs two points"
        weights = [1 / seconds**2 for _, seconds in points]
        total = sum(weights)
        mean_units = sum(w * units for w, (units, _) in zip(weights, points, strict=True)) / total
        mean_s = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
        offsets = [
            (w, units - mean_units, seconds) for w, (units, seconds) in zip(weights, points, strict=True)
        ]
        slope = sum(w * units * (seconds - mean_s) for w, units, seconds in offsets)
        slope /= sum(w * units**2 for w, units, _ in offsets)
        return cls(mean_s - slope * mean_units, slope)

    def explained(self, points: Sequence[tuple[float, float]]) -> float:
        """R2: the share of the seconds' variance that the line explains."""
        mean_s = sum(seconds for _, seconds in points) / len(points)
        left = sum((seconds - self.at(units)) ** 2 for units, seconds in points)
        return 1 - left / sum((seconds - mean_s) ** 2 for _, seconds in points)

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]], *, is_fixed: bool) -> Line:
        """Least squares through (units, seconds), neither part negative. Points of one size do not tell what
        another takes: as much if the work `is_fixed` (weights are read whatever the batch), else its share.
        """
        assert points, "a line needs a point"
        mean_units, mean_s = (sum(values) / len(points) for values in zip(*points, strict=True))
        spread = product = 0.0
        for units, seconds in points:  # one pass: who chooses anew each step has dozens of points
            off = units - mean_units
            spread += off * off
            product += off * (seconds - mean_s)
        if spread <= 1e-6 * mean_units**2:
            return cls(mean_s, 0.0) if is_fixed or mean_units == 0 else cls(0.0, mean_s / mean_units)
        slope = max(0.0, product / spread)
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

    dense: Callable[[float], float]
    attention: Callable[[float], float]
    lane_s: float


def staggering_gain(times: SideTimes, first: MicroBatch, second: MicroBatch) -> float:
    """How many times as long the step takes as one micro-batch as it takes as these two. Splitting reads the
    weights twice, so it pays (more than 1) where the sides are alike, and not where one of them rules.
    """
    rows, scores = first.rows + second.rows, first.scores + second.scores
    single_s = single_step_s(times.dense(rows), times.attention(scores), times.lane_s)
    staggered_s = staggered_step_s(
        times.dense(first.rows),
        times.dense(second.rows),
        times.attention(first.scores),
        times.attention(second.scores),
        times.lane_s,
    )
    return single_s / staggered_s if staggered_s > 0 else 1.0


def staggered_halves_s(dense_s: float, head_s: float, attention_s: float, lane_s: float) -> float:
    """A step of two equal micro-batches: `dense_s` and `attention_s` of both together, `lane_s` of one.

    `head_s`: the part of `dense_s` that lies between the layers of two steps, with no attention to hide.
    """
    dense_half_s = (dense_s - head_s) / 2
    return head_s + staggered_step_s(dense_half_s, dense_half_s, attention_s / 2, attention_s / 2, lane_s)


def staggered_tax(
    dense_s: float, head_s: float, attention_s: float, lane_s: float, monolithic_s: float
) -> float:
    """How many times as long the split step takes as the monolithic one."""
    return staggered_halves_s(dense_s, head_s, attention_s, lane_s) / monolithic_s


def staggered_gain(
    dense_s: float, head_s: float, attention_s: float, lane_s: float, monolithic_s: float
) -> float:
    """How many times the throughput of the monolithic step the split one has."""
    return monolithic_s / staggered_halves_s(dense_s, head_s, attention_s, lane_s)


def read_floor_s(read_bytes: float, bandwidth_bytes_per_s: float) -> float:
    """Attention over a cache: every byte of it once."""
    return read_bytes / bandwidth_bytes_per_s


def decode_floor_s(
    weight_bytes: float, flop: float, cache_bytes: float, bandwidth_bytes_per_s: float, flops_per_s: float
) -> float:
    """A monolithic decoding step: MTIME, then ATIME, on the same cores."""
    attention_s = read_floor_s(cache_bytes, bandwidth_bytes_per_s)
    return max(flop / flops_per_s, weight_bytes / bandwidth_bytes_per_s) + attention_s


def overlapped_floor_s(
    weight_bytes: float, flop: float, cache_bytes: float, bandwidth_bytes_per_s: float, flops_per_s: float
) -> float:
    """A split decoding step, both sides alike and always busy: the longer one; speeds are one side's."""
    attention_s = read_floor_s(cache_bytes, bandwidth_bytes_per_s)
    return max(flop / flops_per_s, weight_bytes / bandwidth_bytes_per_s, attention_s)


def rate_most(tokens: float, floor_s: float) -> float:
    """Tokens per second where `tokens` take at least `floor_s`."""
    return tokens / floor_s


def sharded_attention_s(base_s: float, each_s: float, context_tokens: float, workers: float) -> float:
    """Attention of one sequence over equal shards on `workers` workers, from the line of one worker."""
    return base_s + each_s * context_tokens / workers


def sharding_speedup(base_s: float, each_s: float, context_tokens: float, workers: float) -> float:
    """How many times as fast as one worker they are."""
    return sharded_attention_s(base_s, each_s, context_tokens, 1) / sharded_attention_s(
        base_s, each_s, context_tokens, workers
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """Two sides, machines alike or halves of one, and the way between them.

    `device`: one machine, all of its cores.
    """

    device: DeviceSpeed
    round_trip_s: float
    lane_bytes_per_s: float
    is_one_machine: bool


@dataclass(frozen=True, slots=True)
class Forecast:
    """Most tokens per second of both ways to use a setting, and which to take.

    monolithic: the whole machine, or one instance on each of two. `bottleneck`: dense, attention or lanes.
    """

    monolithic_tokens_per_s: float
    split_tokens_per_s: float
    bottleneck: str
    sequences_held: float
    should_split: bool
    verdict: str


def forecast(model: ModelShape, batch: int, context_tokens: int, setting: Setting) -> Forecast:
    """Floors on both ways for a decoding batch, and the verdict: split where the cache does not fit beside
    the weights, or where it is faster; otherwise not, with the reason.
    """
    instances = 1 if setting.is_one_machine else 2
    whole = setting.device
    side = DeviceSpeed(
        whole.flops_per_s * instances / 2, whole.bandwidth_bytes_per_s * instances / 2, whole.memory_bytes
    )
    share = batch / instances
    monolithic_s = single_step_s(
        dense_step_floor_s(model, math.ceil(share), whole),
        attention_step_floor_s(model, math.ceil(share), context_tokens, whole),
        0.0,
    )
    dense_s, attention_s, lane_s = _split_sides(model, batch, context_tokens, side, setting)
    dense_twice_s = 2 * dense_step_floor_s(model, math.ceil(batch / 2), side)
    split_s = min(
        staggered_halves_s(dense_twice_s, 0.0, attention_s, lane_s),
        single_step_s(dense_s, attention_s, lane_s),
    )
    bottleneck = max((dense_s, "dense"), (attention_s, "attention"), (lane_s, "lanes"))[1]
    held = requests_held(max(0.0, whole.memory_bytes - model.weight_bytes), context_tokens, model)
    fits = held >= share
    monolithic, split = batch / monolithic_s, batch / split_s
    should_split = not fits or split > _WORTH_SPLITTING * monolithic
    verdict = _verdict(should_split, fits, held, split / monolithic, bottleneck)
    return Forecast(monolithic, split, bottleneck, held, should_split, verdict)


_WORTH_SPLITTING = 1.05
"""Splitting brings more parts that can fail: it must promise this much."""


def _split_sides(
    model: ModelShape, batch: int, context_tokens: int, side: DeviceSpeed, setting: Setting
) -> tuple[float, float, float]:
    """Seconds of dense work, attention and lanes of one unsplit step, each side with its device."""
    lane_s = lane_floor_s(model.layers, setting.round_trip_s)
    lane_s += exchange_step_bytes(model, batch) / setting.lane_bytes_per_s
    return (
        dense_step_floor_s(model, batch, side),
        attention_step_floor_s(model, batch, context_tokens, side),
        lane_s,
    )


def _verdict(should_split: bool, fits: bool, held: int, gain: float, bottleneck: str) -> str:
    if not fits:
        return f"split: beside the weights this machine holds {held} such sequences; a peer holds the rest"
    if should_split:
        return f"split: {gain:.2f} times the throughput of monolithic instances; {bottleneck} limit it"
    reasons = {
        "dense": "dense work limits a split step, and weights are read twice",
        "attention": "attention limits a split step: one side's memory is slower than both sides'",
        "lanes": "lanes limit a split step: too many layers for this round trip",
    }
    return f"do not split: {gain:.2f} times the throughput of monolithic instances; {reasons[bottleneck]}"


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
        read_floor_s,
        decode_floor_s,
        overlapped_floor_s,
        rate_most,
        sharded_attention_s,
        sharding_speedup,
    )
}
"""By name, for records of predictions that carry their inputs."""
