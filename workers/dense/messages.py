"""Submissions and deltas as protos: the only place where the engine's values meet the wire."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from anabranch.v1 import dense_pb2, types_pb2
from anabranch.wire import sampling_value, sequence_key, sequence_message, shard_map, shard_map_message
from cluster import rpc
from cluster.errors import AnabranchError, InvalidRequest
from workers.dense.deltas import Delta, FinishReason, Timings
from workers.dense.sequences import Submission

_FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}


def submission_value(message: dense_pb2.Submission, now_s: float, longest_ms: int) -> Submission:
    """A submission, to be checked by `admission.check`; `longest_ms` is its deadline where it brings none, or
    a later one. Raises InvalidRequest where a gateway left open what it has to resolve.
    """
    sampling = sampling_value(message.sampling)
    if sampling.seed is None or sampling.max_tokens is None:
        raise InvalidRequest("a submission needs a resolved seed and max_tokens")
    asked_ms = message.deadline_ms if message.HasField("deadline_ms") else longest_ms
    return Submission(
        key=sequence_key(message.sequence),
        generation=message.generation,
        prompt=tuple(message.prompt_token_ids),
        output=tuple(message.output_token_ids),
        sampling=sampling,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        priority=message.priority,
        deadline_s=now_s + min(asked_ms, longest_ms) / 1000,
        tenant=message.tenant,
        shard_map=shard_map(message.shard_map) if message.HasField("shard_map") else None,
    )


def refusal(message: dense_pb2.Submission, error: AnabranchError) -> Delta:
    """The answer to a submission that never became a sequence."""
    key = sequence_key(message.sequence)
    return Delta(key, message.generation, len(message.output_token_ids), failure=error)


def step_message(step: int, deltas: Sequence[Delta]) -> dense_pb2.ServeResponse:
    """What a step brought for one gateway."""
    return dense_pb2.ServeResponse(step=dense_pb2.StepDeltas(step=step, deltas=map(delta_message, deltas)))


def delta_message(delta: Delta) -> dense_pb2.SequenceDelta:
    """News of one sequence as a proto."""
    message = dense_pb2.SequenceDelta(
        sequence=sequence_message(delta.key),
        generation=delta.generation,
        first_index=delta.first_index,
        token_ids=[sampled.token_id for sampled in delta.tokens],
        logprobs=[
            _logprobs(sampled.logprob, sampled.alternatives)
            for sampled in delta.tokens
            if sampled.logprob is not None
        ],
        matched_token_id=delta.matched_token_id,
        handoff=delta.handoff is not None,
        cached_tokens=delta.cached_tokens,
    )
    if delta.handoff is not None:
        message.worker_stays = delta.handoff.worker_stays
        message.handoff_to = delta.handoff.target or ""
    if delta.shard_map is not None:
        message.shard_map.CopyFrom(shard_map_message(delta.shard_map))
    if delta.finish is not None:
        message.finish_reason = _FINISH_REASONS[delta.finish]
    if delta.failure is not None:
        message.failure.CopyFrom(_failure(delta.failure))
    if delta.timings is not None:
        message.timings.CopyFrom(_timings(delta.timings))
    return message


def _logprobs(logprob: float, alternatives: Iterable[tuple[int, float]]) -> types_pb2.TokenLogprobs:
    best = (
        types_pb2.TokenLogprobs.Alternative(token_id=token, logprob=value) for token, value in alternatives
    )
    return types_pb2.TokenLogprobs(logprob=logprob, alternatives=best)


def _failure(error: AnabranchError) -> types_pb2.Failure:
    return types_pb2.Failure(code=rpc.code_number(error), reason=error.reason, message=error.message)


def _timings(timings: Timings) -> types_pb2.Timings:
    return types_pb2.Timings(
        queue_seconds=timings.queue_seconds,
        prefill_seconds=timings.prefill_seconds,
        decode_seconds=timings.decode_seconds,
        dense_seconds=timings.dense_seconds,
        attention_seconds=timings.attention_seconds,
        lane_seconds=timings.lane_seconds,
        waited_seconds=timings.waited_seconds,
        preemptions=timings.preemptions,
    )
