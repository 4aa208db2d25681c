"""Whether a submission may enter at all: checks that need no state, for the threads of the service."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequest
from workers.dense.sequences import GENERATION_MOST, Submission


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """max_sequence_length: of prompt and output together. deadline_most_ms: of a request."""

    vocabulary_size: int
    max_sequence_length: int
    deadline_most_ms: int


def check(submission: Submission, limits: AdmissionLimits) -> None:
    """Raise InvalidRequest for what no dense worker of this cluster can serve."""
    submission.sampling.validate(limits.vocabulary_size)
    if not submission.key.request_id:
        raise InvalidRequest("a sequence needs a request id")
    if not 1 <= submission.generation <= GENERATION_MOST:
        raise InvalidRequest(f"generation {submission.generation} is not in [1, {GENERATION_MOST}]")
    if not submission.prompt:
        raise InvalidRequest("the prompt is empty")
    if submission.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1")
    for token_id in (*submission.prompt, *submission.output):
        if not 0 <= token_id < limits.vocabulary_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary of {limits.vocabulary_size} tokens"
            )
    length = len(submission.prompt) + submission.max_tokens
    if length > limits.max_sequence_length:
        raise InvalidRequest(
            f"{len(submission.prompt)} prompt tokens and {submission.max_tokens} new ones make {length}; "
            f"this model serves {limits.max_sequence_length}: shorten the prompt or lower max_tokens"
        )
