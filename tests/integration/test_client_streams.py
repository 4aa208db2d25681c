"""Streams of both clients, over real servers that break, refuse, end and return."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anabranch import Client
from anabranch.events import FinishReason, Started, TokenDelta
from cluster import errors
from cluster.config import SecurityConfig, TlsConfig
from tests.certificates import authority
from tests.client_reading import Read, Reading, read, read_async, when_held
from tests.fake_gateway import MODEL, FakeGateway, Script, text, tokens

both_clients = pytest.mark.parametrize("read", [read, read_async])


def assert_whole(reading: Reading, count: int, choice: int = 0) -> None:
    """Every token and character of the script's beginning, once."""
    assert reading.token_ids(choice) == tokens(count, choice)
    assert reading.text(choice) == text(count, choice)


@both_clients
def test_a_stream_arrives_as_typed_events(read: Read) -> None:
    """Started, deltas, Finished, each with its fields."""
    with FakeGateway(Script(delta_tokens=2)) as gateway:
        reading = read(gateway.address, max_tokens=5, seed=9, request_id="mine", logprobs=0)
    assert reading.events[0] == Started("mine", MODEL, prompt_tokens=2, seed=9)
    assert_whole(reading, 5)
    (finished,) = reading.finished
    assert finished.reason is FinishReason.LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 5)
    assert finished.timings.decode_seconds == 0.5
    delta = reading.events[1]
    assert isinstance(delta, TokenDelta)
    assert delta.logprobs[0].logprob == -1.0
    assert reading.resumes == 0


@both_clients
@pytest.mark.parametrize("lag", [0, 3])
def test_a_stream_that_breaks_goes_on_at_another_gateway(read: Read, lag: int) -> None:
    """The second gateway is told what the first one delivered, and nothing is lost or repeated."""
    script = Script(lag=lag, break_after=[5])
    with FakeGateway(script) as first, FakeGateway(Script(lag=lag)) as second:
        reading = read([first.address, second.address], max_tokens=9, n=2, seed=3)
    for choice in range(2):
        assert_whole(reading, 9, choice)
    assert len(reading.started) == 1
    assert len(reading.finished) == 2
    assert reading.resumes == 1
    (resumed,) = second.requests
    assert resumed.resume.generation == 2
    assert resumed.resume.seed == 3
    assert [list(held.token_ids) for held in resumed.resume.received] == [tokens(2), tokens(2, 1)]
    assert [held.shards[0].worker_id for held in resumed.shard_maps] == ["attention-0", "attention-1"]
    assert resumed.request_id == first.requests[0].request_id


@both_clients
def test_a_gateway_that_is_killed_is_left(read: Read) -> None:
    """A connection that dies, with no word from the gateway, is an interruption like any other."""
    with FakeGateway(Script(hold_after=4)) as first, FakeGateway() as second, when_held(first, first.kill):
        reading = read([first.address, second.address], max_tokens=8)
    assert_whole(reading, 8)
    assert reading.resumes == 1


@both_clients
def test_streams_break_again_and_again(read: Read) -> None:
    """Each break continues where the last one stopped, before the first token and at the end included."""
    with FakeGateway(Script(break_after=[0, 1, 3, 2, 4, 1], lag=1)) as gateway:
        reading = read(gateway.address, max_tokens=8)
    assert_whole(reading, 8)
    assert [request.resume.generation for request in gateway.requests] == [0, 2, 3, 4, 5, 6, 7]


@both_clients
@pytest.mark.parametrize("break_after", range(1, 9))
def test_a_break_between_any_two_events_loses_nothing(read: Read, break_after: int) -> None:
    """A stop string's held-back text, too, comes once, wherever the stream broke."""
    with FakeGateway(Script(break_after=[break_after], lag=2)) as gateway:
        reading = read(gateway.address, max_tokens=9, stop=" joins")
    assert_whole(reading, 6)
    assert [(event.reason, event.matched_stop) for event in reading.finished] == [
        (FinishReason.STOP, " joins")
    ]


@both_clients
def test_all_gateways_down_and_one_returns(read: Read) -> None:
    """The stream waits for a gateway and goes on."""
    first, second = FakeGateway(Script(hold_after=3)), FakeGateway()

    def outage() -> None:
        second.kill()
        first.kill()
        first.script.hold_after = None
        first.start()

    with first, second, when_held(first, outage):
        reading = read([first.address, second.address], max_tokens=7)
    assert_whole(reading, 7)
    assert reading.resumes >= 2


@both_clients
def test_a_gateway_that_repeats_is_deduplicated(read: Read) -> None:
    """A resumed stream that begins too early is cut; one that begins too late is an error."""
    with FakeGateway(Script(break_after=[5], repeat=3)) as gateway:
        assert_whole(read(gateway.address, max_tokens=8), 8)
    missing = pytest.raises(errors.Internal, match="tokens 4 to 4 of choice 0 are missing")
    with FakeGateway(Script(break_after=[5], skip=1)) as gateway, missing:
        read(gateway.address, max_tokens=8)


@both_clients
def test_a_stream_that_ends_too_soon_is_resumed(read: Read) -> None:
    """An end without every choice's Finished is a break."""
    with FakeGateway(Script(end_after=4)) as gateway:
        reading = read(gateway.address, max_tokens=8)
    assert_whole(reading, 8)
    assert reading.resumes >= 2


@both_clients
def test_no_gateway_at_all_is_an_error_in_time(read: Read) -> None:
    """After `outage_s` without any answer the failure is raised; a request's deadline comes first."""
    with FakeGateway() as gateway:
        gateway.kill()
        with pytest.raises(errors.Unavailable, match=gateway.address):
            read(gateway.address, connection={"outage_s": 0.3})
        began_s = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded, match=r"within its 0\.4 s"):
            read(gateway.address, deadline_s=0.4)
        assert time.monotonic() - began_s < 5


@both_clients
def test_the_deadline_ends_a_silent_stream(read: Read) -> None:
    """What arrived is delivered; then DeadlineExceeded, and the gateway is hung up on."""
    reading = Reading()
    with FakeGateway(Script(hold_after=4)) as gateway:
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.5 s"):
            read(gateway.address, max_tokens=9, deadline_s=0.5, into=reading)
        assert gateway.hung_up.wait(10)
    assert reading.token_ids() == tokens(3)


@both_clients
@pytest.mark.parametrize(
    "kind",
    [
        errors.InvalidRequest,
        errors.NotFound,
        errors.AlreadyExists,
        errors.PermissionDenied,
        errors.ResourceExhausted,
        errors.Fenced,
        errors.Cancelled,
        errors.DeadlineExceeded,
        errors.Internal,
    ],
)
def test_what_a_retry_cannot_help_is_raised_at_once(read: Read, kind: type[errors.AnabranchError]) -> None:
    """An answer is an answer: its kind and message reach the caller, and no other gateway is asked."""
    refusal = kind("do this instead")
    with (
        FakeGateway(Script(refusal=refusal)) as first,
        FakeGateway() as second,
        pytest.raises(errors.AnabranchError, match="do this instead") as caught,
    ):
        read([first.address, second.address], max_tokens=3)
    assert type(caught.value) is kind
    assert len(first.requests) == 1
    assert second.requests == []


@both_clients
def test_a_draining_gateway_is_passed_over(read: Read) -> None:
    """UNAVAILABLE at the start leads to another gateway."""
    with FakeGateway(Script(refusal=errors.Unavailable("draining"))) as first, FakeGateway() as second:
        assert_whole(read([first.address, second.address], max_tokens=3), 3)


@both_clients
def test_the_api_key_travels(read: Read) -> None:
    """A known key is served, none and another one are refused."""
    with FakeGateway(Script(api_key="secret")) as gateway:
        assert_whole(read(gateway.address, connection={"api_key": "secret"}, max_tokens=2), 2)
        for wrong in (None, "other"):
            with pytest.raises(errors.Unauthenticated, match="not known"):
                read(gateway.address, connection={"api_key": wrong})


@both_clients
def test_tls_is_spoken_and_demanded(read: Read, tmp_path: Path) -> None:
    """With the authority a client is served, mutual TLS included; without it there is no connection."""
    signer = authority(tmp_path)
    security = SecurityConfig(tls=signer.tls("server", mutual=True))
    with FakeGateway(security=security) as gateway:
        assert_whole(read(gateway.address, connection={"tls": signer.tls("client")}, max_tokens=2), 2)
        for wrong in (None, TlsConfig(authority=str(tmp_path / "authority.pem"))):
            with pytest.raises(errors.Unavailable):
                read(gateway.address, connection={"tls": wrong, "outage_s": 0.0})


@both_clients
def test_an_abort_from_elsewhere_ends_the_stream(read: Read) -> None:
    """The stream ends with Cancelled, and is not resumed."""
    with (
        FakeGateway(Script(hold_after=3)) as gateway,
        Client(gateway.address) as other,
        when_held(gateway, lambda: other.abort("mine")),
        pytest.raises(errors.Cancelled, match="aborted"),
    ):
        read(gateway.address, max_tokens=9, request_id="mine")
    assert len(gateway.requests) == 1


def test_many_streams_at_once_do_not_mix() -> None:
    """Threads that share a client each get their own stream, through breaks."""
    with (
        FakeGateway(Script(break_after=[2, 3, 4])) as first,
        FakeGateway(Script(break_after=[5])) as second,
        Client([first.address, second.address]) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        counts = range(1, 7)
        texts = pool.map(lambda count: client.generate("x", max_tokens=count).text(), counts, timeout=20)
        assert list(texts) == [text(count) for count in counts]
