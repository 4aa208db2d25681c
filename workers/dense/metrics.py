"""What a dense worker tells Prometheus.

vLLM's names are the gateways', so that no sum counts anything twice; here is the one that only a dense worker
knows. The other series are this process's own, and carry no label of the cluster.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workers.dense.step_runner import StepTimes

_SIDE_SECONDS = (
    "Seconds of steps as each side, dense and attention, spent them: computed (its rate is the busy ratio), "
    "waited, transferred."
)
_HIDDEN = "Share of the last step's attention and lane time that dense work covered, 0 to 1."
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)


class DenseMetrics:
    """Counters of one engine; `registry` holds nothing else. Written by the engine's thread.

    `computed_s`: what heartbeats report of `side_seconds`, the dense side computing.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.steps = Counter("anabranch_dense_steps", "Steps computed.", registry=registry)
        self.steps_aborted = Counter(
            "anabranch_dense_steps_aborted", "Steps a fault of an attention worker ended.", registry=registry
        )
        self.sampled = Counter("anabranch_dense_tokens_sampled", "Tokens sampled.", registry=registry)
        self.recomputed = Counter(
            "anabranch_dense_tokens_lost",
            "Tokens whose KV cache was lost and is recomputed.",
            registry=registry,
        )
        self.adopted = Counter(
            "anabranch_dense_tokens_adopted",
            "Tokens whose KV cache was found on taking over.",
            registry=registry,
        )
        self.moved = Counter(
            "anabranch_dense_tokens_moved",
            "Tokens whose KV cache was moved to another attention worker.",
            registry=registry,
        )
        self.moves = Counter(
            "anabranch_dense_moves", "Moves of shards that ended, by outcome.", ["outcome"], registry=registry
        )
        self.prefix_queries = Counter(
            "anabranch_dense_prefix_queries", "Prompt tokens looked up in the pool.", registry=registry
        )
        self.prefix_hits = Counter(
            "anabranch_dense_prefix_hits", "Prompt tokens whose KV was found in the pool.", registry=registry
        )
        self.side_seconds = Counter(
            "anabranch_dense_side_seconds", _SIDE_SECONDS, ["side", "state"], registry=registry
        )
        self.hidden_ratio = Gauge("anabranch_dense_hidden_ratio", _HIDDEN, registry=registry)
        self.micro_batches = Counter(
            "anabranch_dense_micro_batches", "Micro-batches of all steps.", registry=registry
        )
        self.iteration_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens computed per step.",
            ["model_name"],
            registry=registry,
            buckets=_STEP_TOKENS,
        ).labels(model_name)
        self.preemptions = Counter("anabranch_dense_preemptions", "Sequences preempted.", registry=registry)
        self.computed_s = 0.0
        self._registry = registry

    def read_gauges(
        self, running: Callable[[], float], waiting: Callable[[], float], used_share: Callable[[], float]
    ) -> None:
        """Gauges that are read when asked for."""
        for name, text, read in (
            ("anabranch_dense_sequences_running", "Sequences in the running batch.", running),
            ("anabranch_dense_sequences_waiting", "Sequences queued.", waiting),
            ("anabranch_dense_pool_usage_ratio", "Share of the known KV pool in use, 0 to 1.", used_share),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def note_step(self, tokens: int, sampled: int, micro_batches: int, times: StepTimes) -> None:
        """One step was computed."""
        self.steps.inc()
        self.sampled.inc(sampled)
        self.iteration_tokens.observe(tokens)
        self.micro_batches.inc(micro_batches)
        self.computed_s += times.dense_s
        for side, state, seconds in (
            ("dense", "computed", times.dense_s),
            ("dense", "waited", times.waited_s),
            ("dense", "transferred", times.sent_s),
            ("attention", "computed", times.attention_s),
            ("attention", "waited", times.attention_idle_s),
            ("attention", "transferred", times.lane_s),
        ):
            self.side_seconds.labels(side, state).inc(seconds)
        self.hidden_ratio.set(times.hidden_share)
