"""What is reported of a run, and what each figure means: the one place where metrics are defined. Pure.

Latencies are vLLM's (`vllm bench serve`), under its names, and count completed requests only. Every figure of
a stage follows from its records and `Facts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from cluster.errors import InvalidRequest
from loadgen.records import Outcome, Record

Summary: TypeAlias = dict[str, Any]
"""One flat object: numbers by name; None where nothing was measured."""

PERCENTILES = (90, 95, 99)

LATENCIES = {
    "ttft": "time to first token: from the actual send to the first delta",
    "tpot": "time per output token after the first: (last delta - first delta) / (output tokens - 1)",
    "itl": "inter-token latency: the gap between consecutive deltas, each gap of each request counted once",
    "e2el": "end-to-end latency: from the actual send to the last delta",
    "send_lag": "actual send - moment it was due: the load generator's own lateness",
}

ROLES = {
    "queue": "waiting for admission",
    "prefill": "from admission to the first token",
    "decode": "from the first to the last token",
    "dense": "dense compute of the steps a request took part in",
    "attention": "the attention workers' compute of those steps, the slowest worker of each layer",
    "lane": "lanes: moving bytes, and waiting beyond that compute",
    "waited": "what of attention and lanes the dense worker waited for with nothing else to do",
}
"""Parts of the server's own account (`anabranch.events.Timings`)."""

FIGURES = {
    "stage": "part of the run that is summed up here",
    "num_prompts": "requests sent or lost after the warm-up",
    "completed": "requests that ended with a finish reason",
    "failed": "requests that ended with an error, or were lost with their sender",
    "interrupted": "requests hung up because the run was told to stop",
    "planned": "requests of the plan, warm-up included",
    "unsent": "planned, but never due: the run ended first, or an earlier turn of the session failed",
    "errors": "failed requests by reason",
    "duration": "seconds from the end of the warm-up to the end of the last request",
    "total_input_tokens": "prompt tokens of completed requests, as the server counted them",
    "total_output_tokens": "output tokens of completed requests",
    "total_cached_tokens": "prompt tokens whose KV the server had already",
    "request_throughput": "completed / duration",
    "request_goodput": "completed requests that kept every objective given / duration",
    "goodput_share": "completed requests that kept every objective given / num_prompts",
    "output_throughput": "total_output_tokens / duration",
    "total_token_throughput": "(total_input_tokens + total_output_tokens) / duration",
    "request_rate": "sessions begun per second, as asked for",
    "max_concurrency": "users of a closed loop",
    "asked_rate": "sessions due per second, as drawn: (count - 1) / (last due - first due)",
    "achieved_rate": "sessions sent per second: (count - 1) / (last send - first send)",
    "achieved_over_asked": "achieved_rate / asked_rate; below 1 the load generator fell behind",
    "mean_concurrent_requests": "requests under way, averaged over the time in which requests were sent",
    "max_concurrent_requests": "most requests under way at once",
    "littles_law_residual": "L / (lambda W) - 1 over the time in which requests were sent: mean requests "
    "under way, arrivals per second, mean stay of arrivals; 0 in a steady state, below it while they pile up",
    "piled_up_share": "of the requests due in the second half of an open loop, those that piled up beyond "
    "chance: (growth of requests under way - 2 sqrt(under way at its begin + at its end)) / due, at least 0",
    "client_cpu_share": "CPU seconds / seconds of the busiest sender, which uses hardly more than one core",
    "preemptions": "times a request lost its place and was computed again",
    "is_kept": "of a point of a sweep: whether the load was borne, and the objectives attained",
    "worth": "of a point of a sweep: the figure by which its points are compared, 0 where it was not kept",
    "warnings": "what makes figures doubtful",
}

SIMULATED = {
    "steps": "steps of all dense workers",
    "mean_step_ms": "milliseconds from the beginning of a step to its end",
    "mean_batch_rows": "sequences in a step, averaged over the time in steps",
    "max_batch_rows": "most sequences in a step",
    "mean_step_tokens": "tokens computed in a step, of prompts too",
    "staggered_share": "of the steps, those cut into two micro-batches",
    "dense_busy_share": "of the run, the time in which dense workers computed, averaged over them",
    "attention_busy_share": "of the run, the time in which the busiest attention worker computed, or the "
    "dense workers' attention where the cache lies beside the weights",
    "lane_share_of_steps": "time of lanes, hidden or not, over the time in steps",
    "mean_pool_used_share": "of all blocks, those in use, averaged over the time in steps",
    "max_pool_used_share": "of all blocks, most in use at once",
}
"""Of a simulated run, which sees what a real one is not asked for."""

COSTS = {
    "allocated_usd": "price of all devices for the duration, whether busy or not",
    "used_usd": "the part of it in which devices worked or bytes moved: all but idle",
    "usd_per_mtok": "allocated_usd / million tokens in and out of completed requests",
    "usd_per_mtok_input": "the share of prefill in the seconds that requests were in the batch, of "
    "allocated_usd / million prompt tokens, cached ones too",
    "usd_per_mtok_output": "the share of decode in those seconds, of allocated_usd / million output tokens",
    "used_usd_per_mtok": "used_usd / million tokens in and out",
    "used_usd_per_mtok_input": "the share of prefill, of used_usd / million prompt tokens",
    "used_usd_per_mtok_output": "the share of decode, of used_usd / million output tokens",
    "usd_per_mtok_dense": "part of usd_per_mtok in which dense devices computed, as far as requests saw",
    "usd_per_mtok_attention": "part in which attention was computed",
    "usd_per_mtok_network": "part in which devices stood while lanes moved bytes",
    "usd_per_mtok_idle": "part in which devices did neither: the rest",
    "tokens_per_usd": "tokens in and out / allocated_usd",
    "good_tokens_per_usd": "tokens in and out of requests that kept every objective given / allocated_usd",
    "usd_per_mtok_at_slo": "allocated_usd / million tokens of requests that kept every objective given",
    "power_w": "watts that all devices are rated at by their makers, not measured",
    "joules_per_output_token": "power_w x duration / output tokens of completed requests; rated power",
}
"""Of `loadgen.cost`, where a shape is given."""

SETTING = {
    "date": "when the run began",
    "version": "of the load generator",
    "client": "machine of the load generator",
    "backend": "API that was spoken",
    "endpoint": "where requests went",
    "model_id": "model that answered",
    "senders": "processes that sent",
    "objectives_ms": "latencies a good request keeps",
    "scenario": "options of the load",
    "content_seed": "seed of the prompts' contents, new in each run",
    "workload": "the plan in one glance",
    "subject": "of a point of a sweep: the cluster and what it was set to",
    "cluster": "its shape, or its address",
    "settings": "engine settings that differed from point to point",
    "load": "how hard it was asked",
    "fault": "why the load was not borne",
    "modelled": "of a simulated run: hardware, efficiencies and what was left out",
    "shape": "devices that are paid for, by role",
    "prices": "of one device of each kind, with date and source",
    "notes": "what was changed on the way from what was asked for",
}
"""What a run was, beside its figures."""

_SLO_KEYS = ("ttft", "tpot", "e2el")
_STAY_SHARE = 0.1
_LAG_S, _LAG_SHARE = 0.005, 0.05
_BUSY_SHARE = 0.7
_BEYOND_LEAST = 10
_OUTPUT_SHARE = 0.95
_RATE_SHARE = 0.98
_SURE_DEVIATIONS = 2.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latencies a good request keeps, in milliseconds by name: `ttft`, `tpot`, `e2el`."""

    bounds_ms: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """`ttft:500,tpot:50`. Raises InvalidRequest for other names and numbers."""
        bounds: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, number = part.partition(":")
            try:
                bounds[name] = float(number)
            except ValueError as error:
                raise InvalidRequest(f"{part!r} is no objective: write ttft:500,tpot:50") from error
            if name not in _SLO_KEYS:
                raise InvalidRequest(f"there is no objective {name!r}, only {', '.join(_SLO_KEYS)}")
        return cls(tuple(bounds.items()))

    def kept_by(self, record: Record) -> bool:
        """Whether a completed request is good. An output of one token has no TPOT to miss."""
        return all(
            (value := getattr(record, f"{name}_s")) is None or value * 1000 <= bound_ms
            for name, bound_ms in self.bounds_ms
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What the records of a stage do not tell."""

    stage: str
    counts_from_s: float
    """End of the warm-up, in seconds since the run began."""
    planned: int
    client_cpu_share: float
    request_rate: float | None = None
    concurrency: int | None = None
    objectives: Objectives = field(default_factory=Objectives)


def summarize(records: Sequence[Record], facts: Facts) -> Summary:
    """Every figure of one stage, from the records of the whole run."""
    stage = [record for record in records if record.stage == facts.stage]
    measured = [record for record in stage if not record.warm_up]
    completed = [record for record in measured if record.outcome is Outcome.COMPLETED]
    duration_s = (
        max((record.ended_s for record in measured), default=facts.counts_from_s) - facts.counts_from_s
    )
    summary: Summary = {
        "stage": facts.stage,
        "num_prompts": len(measured),
        "completed": len(completed),
        "failed": _count(measured, Outcome.FAILED),
        "interrupted": _count(measured, Outcome.INTERRUPTED),
        "planned": facts.planned,
        "unsent": facts.planned - len(stage),
        "errors": dict(Counter(r.error.partition(":")[0] for r in measured if r.error)),
        "duration": duration_s,
        **_throughput(completed, duration_s, facts.objectives),
        "goodput_share": _goodput_share(measured, completed, facts.objectives),
        "request_rate": facts.request_rate,
        "max_concurrency": facts.concurrency,
        **_rates(measured, is_open=facts.concurrency is None),
        **_concurrency(stage, facts.counts_from_s),
        "piled_up_share": _piled_up_share(stage, facts) if facts.concurrency is None else None,
        "client_cpu_share": facts.client_cpu_share,
        **_latencies(measured, completed),
        **_timings(completed),
    }
    return {**summary, "warnings": _warnings(summary, completed)}


def definition(key: str) -> str:
    """What a key of a summary means."""
    for meanings in (FIGURES, SIMULATED, COSTS, SETTING):
        if key in meanings:
            return meanings[key]
    statistic, _, rest = key.partition("_")
    name = rest.removesuffix("_ms")
    if name in LATENCIES:
        return f"{statistic} of {LATENCIES[name]}; milliseconds"
    assert name in ROLES, key
    return f"{statistic} milliseconds of completed requests, as the server counts: {ROLES[name]}"


def percentile_note(percent: int, count: int) -> str | None:
    """A warning where fewer than ten samples lie beyond a percentile: it is then hardly known."""
    beyond = count * (100 - percent) / 100
    if not count or beyond >= _BEYOND_LEAST:
        return None
    needed = round(_BEYOND_LEAST * 100 / (100 - percent))
    return f"p{percent} rests on {beyond:.1f} of {count:,} requests: {needed:,} would put ten beyond it"


def _count(records: Sequence[Record], outcome: Outcome) -> int:
    return sum(record.outcome is outcome for record in records)


def _throughput(completed: Sequence[Record], duration_s: float, objectives: Objectives) -> Summary:
    prompts = sum(record.prompt_tokens for record in completed)
    outputs = sum(record.output_tokens for record in completed)
    good = sum(map(objectives.kept_by, completed)) if objectives.bounds_ms else None
    counts: dict[str, float | None] = {
        "request_throughput": len(completed),
        "request_goodput": good,
        "output_throughput": outputs,
        "total_token_throughput": prompts + outputs,
    }
    return {
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "total_cached_tokens": sum(record.cached_tokens for record in completed),
        **{
            key: None if count is None or duration_s <= 0 else count / duration_s
            for key, count in counts.items()
        },
    }


def _goodput_share(
    measured: Sequence[Record], completed: Sequence[Record], objectives: Objectives
) -> float | None:
    if not objectives.bounds_ms or not measured:
        return None
    return sum(map(objectives.kept_by, completed)) / len(measured)


def _rates(measured: Sequence[Record], *, is_open: bool) -> Summary:
    """Of sessions' first requests, since later ones are due when the server lets them be."""
    first = [record for record in measured if record.turn == 0] if is_open else []
    asked = _rate([record.intended_s for record in first])
    achieved = _rate([record.sent_s for record in first if record.sent_s is not None])
    both = asked is not None and achieved is not None
    return {
        "asked_rate": asked,
        "achieved_rate": achieved,
        "achieved_over_asked": achieved / asked if both and asked and achieved else None,
    }


def _rate(moments_s: Sequence[float]) -> float | None:
    span_s = max(moments_s) - min(moments_s) if moments_s else 0.0
    return (len(moments_s) - 1) / span_s if span_s > 0 else None


def _concurrency(stage: Sequence[Record], from_s: float) -> Summary:
    """Little's law in the window from the end of the warm-up to the last send."""
    sent = [record for record in stage if record.sent_s is not None]
    until_s = max((record.sent_s or 0.0 for record in sent), default=from_s)
    arrived = [record for record in sent if (record.sent_s or 0.0) >= from_s]
    nothing = {"mean_concurrent_requests": None, "max_concurrent_requests": 0, "littles_law_residual": None}
    if until_s <= from_s or len(arrived) < 2:
        return nothing | {"max_concurrent_requests": _most_at_once(sent)}
    inside_s = sum(
        max(0.0, min(record.ended_s, until_s) - max(record.sent_s or 0.0, from_s)) for record in sent
    )
    expected_s = sum(record.stay_s for record in arrived)
    return {
        "mean_concurrent_requests": inside_s / (until_s - from_s),
        "max_concurrent_requests": _most_at_once(sent),
        "littles_law_residual": inside_s / expected_s - 1 if expected_s else None,
    }


def _piled_up_share(stage: Sequence[Record], facts: Facts) -> float | None:
    """In a steady state requests under way at two moments differ as two Poisson counts do."""
    until_s = max((record.intended_s for record in stage), default=facts.counts_from_s)
    middle_s = (facts.counts_from_s + until_s) / 2
    due = sum(middle_s < record.intended_s <= until_s for record in stage)
    before, after = (_under_way(stage, at_s) for at_s in (middle_s, until_s))
    return max(0.0, after - before - _SURE_DEVIATIONS * math.sqrt(before + after)) / due if due else None


def _under_way(records: Sequence[Record], at_s: float) -> int:
    return sum(record.sent_s is not None and record.sent_s <= at_s < record.ended_s for record in records)


def _most_at_once(sent: Sequence[Record]) -> int:
    changes = sorted(
        change for record in sent for change in ((record.sent_s or 0.0, 1), (record.ended_s, -1))
    )
    return int(np.cumsum([step for _, step in changes]).max()) if changes else 0


def _latencies(measured: Sequence[Record], completed: Sequence[Record]) -> Summary:
    samples: dict[str, list[float | None]] = {
        "ttft": [record.ttft_s for record in completed],
        "tpot": [record.tpot_s for record in completed],
        "itl": [gap for record in completed for gap in record.gaps_s],
        "e2el": [record.e2el_s for record in completed],
        "send_lag": [record.lag_s for record in measured],
    }
    summary: Summary = {}
    for name, values in samples.items():
        known_ms = np.array([value for value in values if value is not None], dtype=np.float64) * 1000
        figures: dict[str, float | None] = dict.fromkeys(
            ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES), "max")
        )
        if len(known_ms):
            figures |= {"mean": float(known_ms.mean()), "median": float(np.median(known_ms))}
            figures |= {"std": float(known_ms.std()), "max": float(known_ms.max())}
            figures |= {f"p{percent}": float(np.percentile(known_ms, percent)) for percent in PERCENTILES}
        summary |= {f"{statistic}_{name}_ms": value for statistic, value in figures.items()}
    return summary


def _timings(completed: Sequence[Record]) -> Summary:
    known = [record.timings for record in completed if record.timings is not None]
    means: Summary = {
        f"mean_{name}_ms": 1000 * float(np.mean([getattr(timings, f"{name}_seconds") for timings in known]))
        if known
        else None
        for name in ROLES
    }
    return means | {"preemptions": sum(timings.preemptions for timings in known)}


def _warnings(summary: Summary, completed: Sequence[Record]) -> list[str]:
    notes = [note for percent in PERCENTILES if (note := percentile_note(percent, len(completed)))]
    found = notes[:1]  # of the lowest percentile that is hardly known
    lag_ms, ttft_ms = summary["p99_send_lag_ms"], summary["median_ttft_ms"]
    if lag_ms is not None and lag_ms > 1000 * _LAG_S and lag_ms > _LAG_SHARE * (ttft_ms or 0.0):
        found.append(
            f"requests were sent up to {lag_ms:.1f} ms late (p99): give more --senders, or less load"
        )
    share = summary["achieved_over_asked"]
    if share is not None and share < _RATE_SHARE:
        found.append(f"only {share:.1%} of the asked rate was sent: the load generator fell behind")
    if summary["client_cpu_share"] > _BUSY_SHARE:
        found.append(
            f"a sender was busy {summary['client_cpu_share']:.0%} of the time, too much to trust its times: "
            "give more --senders"
        )
    residual = summary["littles_law_residual"]
    if residual is not None and abs(residual) > _STAY_SHARE:
        found.append(
            f"no steady state (Little's law is off by {residual:+.0%}): the load is too high, or the run "
            "too short for requests that take so long"
        )
    asked = sum(record.asked_output_tokens for record in completed)
    if summary["total_output_tokens"] < _OUTPUT_SHARE * asked:
        came = summary["total_output_tokens"]
        found.append(f"{came:,} of {asked:,} output tokens came: the endpoint ends outputs early")
    return found
