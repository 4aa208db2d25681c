"""What a shape can do in steady state, in closed form: throughput, step time and what limits it. Pure.

A batch of B rows decodes B tokens a step, and as many requests end as begin; where prompts are computed
here, a step takes B / output x prompt of their tokens along. The cache holds as many sequences as fit at
their mean length; B is a mean, and need not be whole. No queueing, no variance: the simulator has both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cluster.errors import InvalidRequest
from cluster.hardware import HardwareClass
from cluster.prices import per_mtok
from loadgen.metrics import Objectives
from loadgen.plan import Plan
from loadgen.simulation.machines import Efficiencies, Shape, Side
from loadgen.simulation.models import SimulatedModel
from loadgen.simulation.steps import StepModel, Switches
from loadgen.simulation.work import Work
from loadgen.workload import Session

_BETTER = 1.1
"""How much better a resource is made to see what that brings."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Means of a workload, in tokens. `context_tokens`: what a decoding row has before it, each row counted,
    so that long outputs count for more.
    """

    prompt_tokens: float
    output_tokens: float
    context_tokens: float
    rate: float | None = None
    """Requests per second, as recorded or asked for."""

    @classmethod
    def of_means(cls, prompt_tokens: float, output_tokens: float) -> Traffic:
        """From published means alone."""
        return cls(prompt_tokens, output_tokens, prompt_tokens + output_tokens / 2)

    @classmethod
    def of_plan(cls, plan: Plan) -> Traffic:
        """Of everything that a plan asks for."""
        pairs = [pair for stage in plan.stages for session in stage.sessions for pair in _turns(session)]
        prompts, outputs = (sum(values) for values in zip(*pairs, strict=True))
        rows = sum(output * (prompt + output / 2) for prompt, output in pairs)
        return cls(prompts / len(pairs), outputs / len(pairs), rows / outputs, plan.stages[0].request_rate)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is held fixed while shapes are compared. `shard_tokens`: a sequence lies at one attention worker
    more for each so many; None: heads are dealt out instead, as in Lamina, and each query travels once.
    """

    model: SimulatedModel
    traffic: Traffic
    efficiencies: Efficiencies = dataclasses.field(default_factory=Efficiencies)
    switches: Switches = dataclasses.field(default_factory=Switches)
    prompts_elsewhere: bool = False
    shard_tokens: int | None = 1024
    step_tokens: int = 2048


@dataclass(frozen=True, slots=True)
class Point:
    """A shape at one batch."""

    batch: float
    step_s: float
    tokens_per_s: float
    """Output tokens of the whole cluster."""
    ttft_s: float
    usd_per_mtok: float
    """Of output tokens."""

    def keeps(self, objectives: Objectives, output_tokens: float) -> bool:
        """Whether the means keep every bound."""
        values_s = {
            "ttft": self.ttft_s,
            "tpot": self.step_s,
            "e2el": self.ttft_s + self.step_s * (output_tokens - 1),
        }
        return all(values_s[name] * 1000 <= bound_ms for name, bound_ms in objectives.bounds_ms)


def batch_most(shape: Shape, setting: Setting) -> float:
    """Sequences of mean length that the cache of one dense worker holds; its share of a shared pool."""
    cache_bytes = shape.cache_bytes(setting.model.shape, setting.efficiencies)
    if shape.attention is not None:
        cache_bytes *= shape.attention.devices / shape.dense_workers
    return cache_bytes / setting.model.shape.kv_token_bytes / setting.traffic.context_tokens


_STEPS_WAITED = 1.5
"""Before the first chunk: the step that a request comes in, half of it on average; one in which its worker is
asked for room.
"""
_STEPS_ASKED = 1.0
"""Where the cache is in attention workers, one more, in which the directory is asked for its prefix."""


def at_batch(shape: Shape, setting: Setting, batch: float) -> Point:
    """Steady state at a batch of at least one row."""
    assert batch >= 1, "an empty batch has no step"
    model = StepModel(setting.model.shape, shape, setting.efficiencies, setting.switches)
    step_s = model.times(_work(model.workers, setting, batch)).wall_s
    tokens_per_s = shape.dense_workers * batch / step_s
    chunks = 0 if setting.prompts_elsewhere else -(-setting.traffic.prompt_tokens // setting.step_tokens)
    waited = _STEPS_WAITED + (_STEPS_ASKED if shape.attention is not None else 0.0)
    ttft_s = (waited + chunks) * step_s + 2 * setting.efficiencies.call_s
    usd_per_mtok = per_mtok(shape.price_per_hour_usd / 3600, tokens_per_s)
    assert usd_per_mtok is not None, "a step brings tokens"
    return Point(batch, step_s, tokens_per_s, ttft_s, usd_per_mtok)


def saturated(shape: Shape, setting: Setting) -> Point | None:
    """With the cache full; None where the weights or one sequence do not fit."""
    if not shape.holds_weights(setting.model.shape, setting.efficiencies):
        return None
    batch = batch_most(shape, setting)
    return at_batch(shape, setting, batch) if batch >= 1 else None


def best_within(shape: Shape, setting: Setting, objectives: Objectives) -> Point | None:
    """The largest batch whose means keep the objectives, found by bisection: steps grow with the batch."""
    most = saturated(shape, setting)
    if most is None or most.keeps(objectives, setting.traffic.output_tokens):
        return most
    low, high = 0, int(most.batch) + 1  # `low` keeps them (or is nothing), `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        is_kept = at_batch(shape, setting, middle).keeps(objectives, setting.traffic.output_tokens)
        low, high = (middle, high) if is_kept else (low, middle)
    return at_batch(shape, setting, low) if low else None


def bottleneck(shape: Shape, setting: Setting, objectives: Objectives) -> str:
    """The resource that brings most where there is a tenth more of it, at the largest batch that keeps the
    objectives: memory, bandwidth, compute, network or latency floor. Raises InvalidRequest where the shape
    cannot serve the model so.
    """
    now = best_within(shape, setting, objectives)
    if now is None:
        raise InvalidRequest(f"{shape} cannot serve {setting.model.name} within the objectives")
    gains = {}
    for name, (better_shape, better_setting) in _improvements(shape, setting).items():
        point = best_within(better_shape, better_setting, objectives)
        gains[name] = 0.0 if point is None else point.tokens_per_s / now.tokens_per_s
    return max(gains, key=lambda name: gains[name])


_Improved: TypeAlias = dict[str, tuple[Shape, Setting]]


def _improvements(shape: Shape, setting: Setting) -> _Improved:
    """The same with a tenth more of one resource each."""

    def kinds(change: Callable[[HardwareClass], dict[str, float]]) -> Shape:
        def side(old: Side) -> Side:
            return Side(old.kind.model_copy(update=change(old.kind)), old.devices)

        attention = side(shape.attention) if shape.attention else None
        return Shape(side(shape.dense), attention, shape.dense_workers)

    quicker = dataclasses.replace(
        setting.efficiencies, round_trip_s=setting.efficiencies.round_trip_s / _BETTER
    )
    return {
        "memory": (kinds(lambda kind: {"memory_bytes": kind.memory_bytes * _BETTER}), setting),
        "bandwidth": (
            kinds(lambda kind: {"bandwidth_bytes_per_s": kind.bandwidth_bytes_per_s * _BETTER}),
            setting,
        ),
        "compute": (kinds(lambda kind: {"flops_per_s": kind.flops_per_s * _BETTER}), setting),
        "network": (
            kinds(lambda kind: {"network_bytes_per_s": (kind.network_bytes_per_s or 0.0) * _BETTER}),
            setting,
        ),
        "latency floor": (shape, dataclasses.replace(setting, efficiencies=quicker)),
    }


def _work(workers: int, setting: Setting, batch: float) -> Work:
    """A step in steady state; sequences lie evenly over the attention workers."""
    traffic = setting.traffic
    prompt_tokens = (
        0 if setting.prompts_elsewhere else round(batch * traffic.prompt_tokens / traffic.output_tokens)
    )
    holders = 1
    if setting.shard_tokens is not None:
        holders = min(workers, -(-round(traffic.context_tokens) // setting.shard_tokens))
    chunk = min(setting.step_tokens, round(traffic.prompt_tokens))
    cached = max(0, round((traffic.prompt_tokens - chunk) / 2 / workers))
    # Few rows ask few workers, but some: with no queries at all a step would do without its lanes.
    queries = max(1, round((batch + (prompt_tokens if cached else 0)) * holders / workers))
    return Work(
        tokens=round(batch + prompt_tokens),
        own_scores=prompt_tokens * chunk // 2,
        read_tokens=[round(batch * traffic.context_tokens / workers)] * workers,
        chunks=_chunks(workers, prompt_tokens, chunk, cached),
        queries=[queries] * workers,
        appended=[round((batch + prompt_tokens) / workers)] * workers,
    )


def _chunks(workers: int, prompt_tokens: int, chunk: int, cached: int) -> list[tuple[int, int, int]]:
    """What a step's chunks read: each before it half of what a prompt has before its last chunk."""
    if not cached or not prompt_tokens:
        return []
    whole, rest = divmod(prompt_tokens, chunk)
    sizes = [chunk] * whole + ([rest] if rest else [])
    return [(worker, size, cached) for worker in range(workers) for size in sizes]


def _turns(session: Session) -> list[tuple[int, int]]:
    """(prompt, output) of each request of a session."""
    pairs, before = [], 0
    for turn in session.turns:
        prompt = before + turn.new_tokens
        pairs.append((prompt, turn.output_tokens))
        before = prompt + turn.output_tokens
    return pairs
