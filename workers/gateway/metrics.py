"""What a gateway measures, under vLLM's names where they exist: dashboards and request routers read those.

Counters and histograms are of this gateway's requests: sum them over gateways. What members report of
themselves is the whole cluster's at every gateway: do not sum that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anabranch.v1 import control_pb2, inference_pb2, types_pb2
from cluster.config import Config
from cluster.errors import AnabranchError

_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

REASONS = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_ABORT: "abort",
}
"""Finish reasons as HTTP clients and metrics spell them."""


class GatewayMetrics:
    """All series of one gateway, with the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.tokens = 0
        """All that the next two count."""
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens delivered.")
        self._success = Counter(
            "vllm:request_success",
            "Choices finished, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self.time_to_first_token = self._histogram(
            "vllm:time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self.inter_token_latency = self._histogram(
            "vllm:inter_token_latency_seconds", "Between deltas of a choice, per token.", _TOKEN_SECONDS
        )
        self.request_latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end of a request.", _SECONDS
        )
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "Waiting for admission at the dense worker.", _SECONDS
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "From admission to the first token.", _SECONDS
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "From the first to the last token.", _SECONDS
        )
        self.request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated per choice.", _TOKENS
        )
        self._prefix_queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens of finished choices, looked up in the pool."
        )
        self._prefix_hits = self._counter(
            "vllm:prefix_cache_hits", "Those of them whose KV was found in the pool."
        )
        self._preemptions = self._counter(
            "vllm:num_preemptions", "Times that finished sequences had lost their blocks to others."
        )
        self._failures = Counter(
            "anabranch:request_failure",
            "Requests refused or ended with an error, by its reason.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self._resubmissions = Counter(
            "anabranch:resubmissions",
            "Sequences given to a dense worker again, by cause.",
            ("model_name", "cause"),
            registry=self.registry,
        )

    def watch(
        self, config: Config, membership: Callable[[], control_pb2.Membership], streams: Callable[[], int]
    ) -> None:
        """Also expose what members report of themselves, and the streams open here."""
        self.registry.register(_MemberGauges(self._model_name, config, membership, streams))

    def admitted(self, prompt_tokens: int) -> None:
        """A request was let in."""
        self._prompt_tokens.inc(prompt_tokens)
        self.tokens += prompt_tokens

    def delivered(self, tokens: int) -> None:
        """Tokens went to a client."""
        self._generation_tokens.inc(tokens)
        self.tokens += tokens

    def finished(
        self,
        reason: types_pb2.FinishReason.ValueType,
        usage: inference_pb2.Usage,
        timings: types_pb2.Timings | None,
    ) -> None:
        """One choice ended; `timings` is its dense worker's account, None where none ran it here."""
        self._success.labels(self._model_name, REASONS[reason]).inc()
        self.request_generation_tokens.observe(usage.completion_tokens)
        if timings is not None:
            self._prefix_queries.inc(usage.prompt_tokens)
            self._prefix_hits.inc(usage.cached_tokens)
            self._time(timings)

    def _time(self, timings: types_pb2.Timings) -> None:
        self._queue_time.observe(timings.queue_seconds)
        self._prefill_time.observe(timings.prefill_seconds)
        self._decode_time.observe(timings.decode_seconds)
        self._preemptions.inc(timings.preemptions)

    def failed(self, reason: str) -> None:
        """A request ended with an error."""
        self._failures.labels(self._model_name, reason).inc()

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Whatever error of the tree leaves the block refuses a request."""
        try:
            yield
        except AnabranchError as error:
            self.failed(error.reason)
            raise

    def resubmitted(self, cause: str) -> None:
        """A sequence went to a dense worker again."""
        self._resubmissions.labels(self._model_name, cause).inc()

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, ("model_name",), registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, documentation, ("model_name",), registry=self.registry, buckets=buckets)
        return histogram.labels(self._model_name)


class _MemberGauges(Collector):
    """Sums over the members' last reports, made when somebody reads them."""

    def __init__(
        self,
        model_name: str,
        config: Config,
        membership: Callable[[], control_pb2.Membership],
        streams: Callable[[], int],
    ) -> None:
        self._model_name = model_name
        self._config = config
        self._membership = membership
        self._streams = streams

    def collect(self) -> Iterable[Metric]:
        """The gauges of this moment."""
        members = self._membership().members
        dense = [member.load for member in members if member.role == inference_pb2.ROLE_DENSE]
        yield self._gauge(
            "vllm:num_requests_running",
            "Sequences running on all dense workers.",
            sum(load.sequences_running for load in dense),
        )
        yield self._gauge(
            "vllm:num_requests_waiting",
            "Sequences waiting on all dense workers.",
            sum(load.sequences_waiting for load in dense),
        )
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the pool's blocks that is not available, 1 is all.",
            _usage([member.load.blocks for member in members]),
        )
        yield self._gauge("anabranch:streams_open", "Requests open at this gateway.", self._streams())
        yield self._cache_information(sum(member.load.blocks.capacity for member in members))

    def _cache_information(self, blocks: int) -> GaugeMetricFamily:
        """As vLLM has it: all is in the labels. Request routers compute with block size and count."""
        labels = {
            "model_name": self._model_name,
            "block_size": str(self._config.attention.block_tokens),
            "cache_dtype": self._config.model.dtype,
            "enable_prefix_caching": str(self._config.attention.prefix_sharing),
            "num_gpu_blocks": str(blocks),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The pool of all attention workers, on whatever device.",
            labels=tuple(labels),
        )
        family.add_metric(tuple(labels.values()), 1)
        return family

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family


def _usage(accounts: list[inference_pb2.BlockAccount]) -> float:
    capacity = sum(account.capacity for account in accounts)
    available = sum(account.free + account.sealed_cached for account in accounts)
    return 1 - available / capacity if capacity else 0.0
