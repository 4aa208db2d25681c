"""A request after admission: checked, tokenized, every default resolved.

Both public APIs end here; there is no second way into the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.v1 import types_pb2
from cluster.sampling import SamplingParameters
from cluster.types import Generation, SequenceKey

ATTEMPT_BITS = 8
"""Low bits of a submission's generation: this gateway's own resubmissions."""

STREAM_GENERATION_MAX = (1 << (16 - ATTEMPT_BITS)) - 1
"""Highest generation a client may resume with: dense workers keep 16 bits for gateways."""


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What one client asked for; immutable. Token ids are inside the vocabulary, lengths inside the
    model's limit, `sampling` has its seed and max_tokens.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParameters
    choices: int
    stop: tuple[str, ...]
    include_stop: bool
    priority: int
    tenant: str
    """Salted identity of the API key's owner; empty without keys."""
    generation: int
    """Generation of the client's stream: 1, and one more with each resumption."""
    received: tuple[tuple[int, ...], ...]
    """Per choice: the output tokens the client already has."""
    shard_maps: tuple[types_pb2.ShardMap | None, ...]
    """Per choice: where its KV lay as the client last heard."""

    @property
    def max_tokens(self) -> int:
        """Most output tokens per choice."""
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens

    @property
    def seed(self) -> int:
        """The seed in use."""
        assert self.sampling.seed is not None
        return self.sampling.seed

    def sequence_key(self, choice: int) -> SequenceKey:
        """The name of one choice inside the cluster. A tenant's requests cannot be reached, resumed or
        ended under another tenant's key, whatever id it names: the tenant is part of the name.
        """
        return SequenceKey(cluster_request_id(self.tenant, self.request_id), choice)

    def submission_generation(self, attempt: int) -> Generation:
        """The generation of this gateway's submission number `attempt`, from 0.

        A client that resumes elsewhere knows only its streams, not what a gateway resubmitted on its
        own. With the stream in the high bits the client's next one is higher than all of these. The very
        first is 1: a dense worker then knows that nothing of the sequence lies anywhere.
        """
        assert 1 <= self.generation <= STREAM_GENERATION_MAX
        assert 0 <= attempt < 1 << ATTEMPT_BITS
        return Generation(((self.generation - 1) << ATTEMPT_BITS | attempt) + 1)


def cluster_request_id(tenant: str, request_id: str) -> str:
    """A request's name inside the cluster; `/` is not allowed in a client's id."""
    return f"{tenant[:16]}/{request_id}" if tenant else request_id


def sampling_message(sampling: SamplingParameters) -> types_pb2.SamplingParameters:
    """Resolved parameters as a submission carries them: every field said."""
    return types_pb2.SamplingParameters(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
    )
