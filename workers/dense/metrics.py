"""What a dense worker tells Prometheus: vLLM's names where dashboards read them, our own beside."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

_SECONDS = "Seconds of steps by part: dense compute, attention of the slowest worker, lanes beyond that."


class DenseMetrics:
    """Counters of one engine; `registry` holds nothing else. Written by the engine's thread."""

    def __init__(self) -> None:
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
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the pool.", registry=registry
        )
        self.prefix_hits = Counter(
            "vllm:prefix_cache_hits", "Prompt tokens whose KV was found in the pool.", registry=registry
        )
        self.seconds = Counter("anabranch_dense_step_seconds", _SECONDS, ["part"], registry=registry)
        self.iteration_tokens = Counter(
            "vllm:iteration_tokens", "Tokens computed in steps.", registry=registry
        )
        self.preemptions = Counter("vllm:num_preemptions", "Sequences preempted.", registry=registry)
        self._registry = registry

    def read_gauges(
        self, running: Callable[[], float], waiting: Callable[[], float], used_share: Callable[[], float]
    ) -> None:
        """Gauges that are read when asked for."""
        for name, text, read in (
            ("vllm:num_requests_running", "Sequences in the running batch.", running),
            ("vllm:num_requests_waiting", "Sequences queued.", waiting),
            ("vllm:kv_cache_usage_perc", "Share of the known KV pool in use, 0 to 1.", used_share),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def note_step(self, tokens: int, sampled: int, dense_s: float, attention_s: float, lane_s: float) -> None:
        """One step was computed."""
        self.steps.inc()
        self.sampled.inc(sampled)
        self.iteration_tokens.inc(tokens)
        for part, seconds in (("dense", dense_s), ("attention", attention_s), ("lane", lane_s)):
            self.seconds.labels(part).inc(max(0.0, seconds))
