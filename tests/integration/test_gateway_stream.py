"""Streams through a real gateway to scripted dense workers: order, text, limits, hang-ups."""

import asyncio
from pathlib import Path

import grpc
import pytest

from anabranch.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from cluster import errors
from tests.fake_dense import TIMINGS, FakeDense, says
from tests.gateways import (
    SEED,
    TOKENIZER,
    asynchronous,
    completion,
    eventually,
    exhaust,
    expected_letters,
    fleet,
    generate,
)
from tests.tokenizer import EOS_ID


@asynchronous
async def test_tokens_arrive_in_order_with_their_text(tmp_path: Path) -> None:
    """Started, then every token once and in order, text that decodes them, then Finished with usage."""
    worker = FakeDense("dense-0", tokens_per_step=3)
    async with fleet(tmp_path, [worker]) as cluster:
        heard = await generate(cluster.stub(), completion())
        await eventually(lambda: len(worker.acknowledged) == 1, "the final delta is acknowledged")
    prompt_tokens = len(TOKENIZER.encode("hello").ids)
    assert heard.tokens() == expected_letters()
    assert heard.text() == TOKENIZER.decode(expected_letters())
    assert heard.started.prompt_tokens == prompt_tokens
    assert heard.started.seed == SEED
    finished = heard.finished()
    assert finished.reason == types_pb2.FINISH_REASON_LENGTH
    assert finished.usage == inference_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=20)
    assert finished.timings.prefill_seconds == 0.5
    assert len({event.request_id for event in heard.events}) == 1


@asynchronous
async def test_choices_are_sequences_of_their_own(tmp_path: Path) -> None:
    """Each of n choices has its own tokens and its own end; the worker gets one sequence for each."""
    worker = FakeDense("dense-0")
    async with fleet(tmp_path, [worker]) as cluster:
        heard = await generate(cluster.stub(), completion(n=3))
    for choice in range(3):
        assert heard.tokens(choice) == expected_letters(choice=choice)
        assert heard.finished(choice).usage.completion_tokens == 20
    assert sorted(submission.sequence.choice for submission in worker.submissions) == [0, 1, 2]


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@asynchronous
async def test_a_stop_string_ends_the_output_and_the_work(tmp_path: Path, tokens_per_step: int) -> None:
    """Text before the stop string is delivered, the string is not, and the worker is told to stop. Its
    account of the time is in the end and in the histograms all the same.
    """
    worker = FakeDense("dense-0", says("one two three four"), tokens_per_step=tokens_per_step)
    async with fleet(tmp_path, [worker]) as cluster:
        heard = await generate(cluster.stub(), completion(stop=["zzz", " thr"]))
        await eventually(lambda: len(worker.aborts) == 1, "the sequence is aborted")
        registry = cluster.gateways[0].metrics.registry
        for part in ("queue", "prefill", "decode"):
            name = f"vllm:request_{part}_time_seconds_count"
            assert registry.get_sample_value(name, {"model_name": "tiny"}) == 1
    assert heard.finished().timings == TIMINGS
    assert heard.text() == "one two"
    assert heard.finished().reason == types_pb2.FINISH_REASON_STOP
    assert heard.finished().matched_stop == " thr"
    assert TOKENIZER.decode(heard.tokens()) == "one two thr"


@asynchronous
async def test_a_stop_token_ends_the_output(tmp_path: Path) -> None:
    """The end token is named, not delivered; with include_stop its text is."""
    async with fleet(tmp_path, [FakeDense("dense-0", says("done"))]) as cluster:
        heard = await generate(cluster.stub(), completion())
        shown = await generate(cluster.stub(), completion(include_stop=True))
    assert heard.text() == "done"
    assert heard.finished().reason == types_pb2.FINISH_REASON_STOP
    assert heard.finished().matched_token_id == EOS_ID
    assert not heard.finished().HasField("matched_stop")
    assert shown.text() == "done<|eos|>"


@asynchronous
async def test_half_characters_are_never_sent(tmp_path: Path) -> None:
    """A character of several tokens arrives whole, one that never ends as U+FFFD at the end."""
    text = "é 😀 ü"
    async with fleet(tmp_path, [FakeDense("dense-0", says(text))]) as cluster:
        heard = await generate(cluster.stub(), completion())
        cut = len(TOKENIZER.encode("é 😀").ids) - 1
        broken = await generate(cluster.stub(), completion(max_tokens=cut))
    assert heard.text() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in event.delta.text for event in heard.events)
    assert broken.text() == "é \N{REPLACEMENT CHARACTER}"


@asynchronous
async def test_a_resolved_seed_and_the_defaults_are_submitted(tmp_path: Path) -> None:
    """The gateway draws an absent seed, resolves max_tokens, and sends every sampling field."""
    worker = FakeDense("dense-0", says("x"))
    async with fleet(tmp_path, [worker], gateway={"default_max_tokens": 17}) as cluster:
        heard = await generate(cluster.stub(), inference_pb2.GenerateRequest(text="hello"))
    (submission,) = worker.submissions
    assert submission.sampling.seed == heard.started.seed
    assert submission.sampling.max_tokens == 17
    assert submission.sampling.temperature == 1.0
    assert submission.tenant == ""
    assert 0 < submission.deadline_ms <= 30_000


@asynchronous
async def test_a_client_that_hangs_up_aborts_its_sequence(tmp_path: Path) -> None:
    """Cancelling the call aborts at the dense worker at once, and the request is gone."""
    worker = FakeDense("dense-0", pause_at=5)
    async with fleet(tmp_path, [worker]) as cluster:
        call = cluster.stub().Generate(completion(request_id="gone"), timeout=20)
        async for event in call:
            if event.delta.first_index == 4:
                break
        call.cancel()
        await eventually(lambda: len(worker.aborts) == 1, "the sequence is aborted")
        assert cluster.gateways[0].desk.streams_open == 0
    assert worker.aborts[0].sequence.request_id == "gone"
    assert worker.aborts[0].generation == worker.submissions[0].generation


@asynchronous
async def test_abort_ends_a_request_by_its_id(tmp_path: Path) -> None:
    """Abort finishes the stream with reason ABORT; an unknown id is no error."""
    worker = FakeDense("dense-0", pause_at=5)
    async with fleet(tmp_path, [worker]) as cluster:
        stub = cluster.stub()
        stream = asyncio.create_task(generate(stub, completion(request_id="named")))
        await eventually(lambda: bool(worker.submissions), "submitted")
        assert (await stub.Abort(inference_pb2.AbortRequest(request_id="named"))).found
        heard = await stream
        assert not (await stub.Abort(inference_pb2.AbortRequest(request_id="named"))).found
        await eventually(lambda: len(worker.aborts) == 1, "the sequence is aborted")
    assert heard.finished().reason == types_pb2.FINISH_REASON_ABORT


@asynchronous
async def test_a_slow_client_is_cut_and_delays_nobody(tmp_path: Path) -> None:
    """A client that does not read gets RESOURCE_EXHAUSTED, its sequences are aborted, others go on."""
    worker = FakeDense("dense-0", step_s=0.0)
    async with fleet(tmp_path, [worker], gateway={"stream_buffer_events": 16}) as cluster:
        request = completion(max_tokens=450, n=16)
        request.sampling.logprobs = 20
        address = f"127.0.0.1:{cluster.gateways[0].port}"
        window = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(address, window) as channel:
            slow = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=20)
            await eventually(lambda: len(worker.submissions) == 16, "submitted")
            heard = await generate(cluster.stub(), completion())
            assert len(heard.tokens()) == 20
            await eventually(lambda: len(worker.aborts) == 16, "every choice is aborted")
            assert cluster.gateways[0].desk.streams_open == 0
            with pytest.raises(errors.ResourceExhausted, match="unread"):
                await exhaust(slow)


@asynchronous
async def test_deadlines_end_requests(tmp_path: Path) -> None:
    """Without a client's deadline the gateway's own ends a stuck request, and aborts it."""
    worker = FakeDense("dense-0", pause_at=2)
    async with fleet(tmp_path, [worker], gateway={"default_deadline_ms": 300}) as cluster:
        call = cluster.stub().Generate(completion())
        with pytest.raises(errors.DeadlineExceeded):
            await exhaust(call)
        await eventually(lambda: len(worker.aborts) == 1, "the sequence is aborted")
