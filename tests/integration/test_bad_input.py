"""What a client may get wrong, against a whole cluster: a status, a sentence, no leak, and life goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from anabranch import Client
from anabranch.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from cluster.errors import AlreadyExists, Cancelled
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster
from tests.serving import Reader, ending, raw_channel, status_of, wait_until, whole
from tests.tokenizer import VOCABULARY_SIZE

LONGEST = 1024
REQUEST_BYTES_MAX = 64 * 1024
LEASE_MS = 3000
PROMPT = random_prompt(40, seed=4)
TOKENS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that knows `LONGEST` positions."""
    folder = tmp_path_factory.mktemp("model")
    return tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """One dense worker, two attention workers, room for everything."""
    overrides = {
        "attention.block_tokens": 8,
        "placement.shard_tokens": 32,
        "gateway.max_request_bytes": REQUEST_BYTES_MAX,
        "attention.lease_ms": LEASE_MS,
    }
    with process_cluster(model, tmp_path_factory.mktemp("run"), overrides) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(running: ProcessCluster) -> Iterator[Client]:
    """The client library, connected."""
    with running.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(model: Path) -> tuple[int, ...]:
    """What transformers says after `PROMPT`, up to the first near-tie."""
    reference = reference_tokens(model, [PROMPT], TOKENS)[0]
    return reference.tokens[: reference.sharp_length()]


@pytest.fixture
def cluster(running: ProcessCluster, client: Client, expected: tuple[int, ...]) -> Iterator[ProcessCluster]:
    """The cluster; after each test nothing is held and the next request is answered rightly."""
    yield running
    running.assert_nothing_leaks()
    answer = whole(client, token_ids=PROMPT, max_tokens=TOKENS).token_ids()
    assert tuple(answer[: len(expected)]) == expected
    assert len(answer) == TOKENS


def _request(**fields: Any) -> inference_pb2.GenerateRequest:
    """A request for a few tokens, with some fields otherwise."""
    sampling = fields.pop("sampling", types_pb2.SamplingParameters(max_tokens=4))
    if not {"text", "tokens", "chat", "no_prompt"} & fields.keys():
        fields["text"] = "the"
    fields.pop("no_prompt", None)
    return inference_pb2.GenerateRequest(sampling=sampling, **fields)


def _sampling(**fields: Any) -> inference_pb2.GenerateRequest:
    return _request(sampling=types_pb2.SamplingParameters(**fields))


def _tokens(count: int) -> inference_pb2.TokenPrompt:
    return inference_pb2.TokenPrompt(token_ids=[1] * count)


NAN, INFINITE = float("nan"), float("inf")
INVALID = {
    "empty text": (_request(text=""), "empty"),
    "no token ids": (_request(tokens=_tokens(0)), "empty"),
    "no messages": (_request(chat=inference_pb2.ChatPrompt()), "no messages"),
    "no prompt": (_request(no_prompt=True), "no prompt"),
    "chat role": (
        _request(chat={"messages": [{"role": "wizard", "content": "x"}]}),
        "wizard",
    ),
    "prompt as long as the context": (_request(tokens=_tokens(LONGEST)), "shorten"),
    "prompt longer than the context": (_request(tokens=_tokens(3 * LONGEST)), "shorten"),
    "prompt and max_tokens": (
        _request(tokens=_tokens(LONGEST - 10), sampling=types_pb2.SamplingParameters(max_tokens=11)),
        "at most 10 tokens",
    ),
    "max_tokens 0": (_sampling(max_tokens=0), "max_tokens is 0"),
    "max_tokens beyond all": (_sampling(max_tokens=2**32 - 1), "max_tokens"),
    "min_tokens over max_tokens": (_sampling(max_tokens=4, min_tokens=5), "min_tokens is 5"),
    "temperature below 0": (_sampling(temperature=-0.1), "temperature is -0.1"),
    "temperature above 2": (_sampling(temperature=2.1), "temperature is 2.1"),
    "temperature NaN": (_sampling(temperature=NAN), "temperature is nan"),
    "temperature infinite": (_sampling(temperature=INFINITE), "temperature is inf"),
    "top_p 0": (_sampling(top_p=0.0), "top_p is 0"),
    "top_p above 1": (_sampling(top_p=1.01), "top_p is 1.01"),
    "top_p NaN": (_sampling(top_p=NAN), "top_p is nan"),
    "top_k beyond the vocabulary": (_sampling(top_k=VOCABULARY_SIZE + 1), "top_k"),
    "min_p below 0": (_sampling(min_p=-0.5), "min_p is -0.5"),
    "min_p NaN": (_sampling(min_p=NAN), "min_p is nan"),
    "repetition_penalty 0": (_sampling(repetition_penalty=0.0), "repetition_penalty is 0"),
    "repetition_penalty infinite": (_sampling(repetition_penalty=INFINITE), "repetition_penalty is inf"),
    "presence_penalty": (_sampling(presence_penalty=2.5), "presence_penalty is 2.5"),
    "presence_penalty NaN": (_sampling(presence_penalty=NAN), "presence_penalty is nan"),
    "frequency_penalty": (_sampling(frequency_penalty=-2.5), "frequency_penalty is -2.5"),
    "frequency_penalty infinite": (_sampling(frequency_penalty=-INFINITE), "frequency_penalty is -inf"),
    "logprobs beyond the limit": (_sampling(logprobs=21), "logprobs is 21"),
    "bias beyond the limit": (_sampling(logit_bias={1: 101.0}), "101"),
    "bias NaN": (_sampling(logit_bias={1: NAN}), "nan"),
    "bias of no token": (_sampling(logit_bias={VOCABULARY_SIZE: 1.0}), "logit_bias"),
    "stop id of no token": (_sampling(stop_token_ids=[VOCABULARY_SIZE]), "stop_token_ids"),
    "too many stop ids": (_sampling(stop_token_ids=[1] * 65), "stop_token_ids"),
    "prompt id of no token": (
        _request(tokens=inference_pb2.TokenPrompt(token_ids=[1, VOCABULARY_SIZE])),
        f"token id {VOCABULARY_SIZE} is outside",
    ),
    "n 0": (_request(n=0), "n is 0"),
    "n beyond the limit": (_request(n=17), "n is 17"),
    "empty stop": (_request(stop=[""]), "stop string has 0"),
    "stop too long": (_request(stop=["x" * 257]), "257"),
    "too many stops": (_request(stop=["x"] * 17), "17 stop strings"),
    "request_id with a space": (_request(request_id="a b"), "request_id"),
    "request_id too long": (_request(request_id="a" * 129), "request_id"),
    "resume of nothing": (_request(resume=inference_pb2.Resume(generation=2)), "request_id"),
    "resume below generation 2": (
        _request(request_id="a", resume=inference_pb2.Resume(generation=1, received=[_tokens(1)])),
        "resume.generation",
    ),
}


def test_what_is_wrong_with_a_request_is_said(cluster: ProcessCluster) -> None:
    """Every field that can be wrong is INVALID_ARGUMENT with a message that names it."""
    with raw_channel(cluster) as channel:
        answers = {name: status_of(channel, request) for name, (request, _) in INVALID.items()}
    for name, (status, message) in answers.items():
        assert status == "INVALID_ARGUMENT", f"{name}: {status} {message}"
        assert INVALID[name][1] in message, f"{name}: {message}"


def test_an_unknown_model_is_not_found(cluster: ProcessCluster) -> None:
    """The message names the model asked for and the one served."""
    with raw_channel(cluster) as channel:
        status, message = status_of(channel, _request(model="gpt-9"))
    assert status == "NOT_FOUND"
    assert "gpt-9" in message
    assert "tiny" in message


_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
MALFORMED = {
    "no UTF-8": b"\x0a\x02\xff\xfe",
    "a length beyond the end": b"\x1a\x7fabc",
    "no protobuf": b"\xff" * 50,
    "endless varint": b"\x38" + b"\xff" * 20,
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_bytes_that_are_no_request(cluster: ProcessCluster, raw: bytes) -> None:
    """What cannot be parsed is the client's mistake in every method, not an UNKNOWN exception."""
    methods = [method for method in _SERVICE.methods if method.input_type.fields]
    with raw_channel(cluster) as channel:
        for method in methods:
            # The stubs want serializers where gRPC takes None for bytes as they are.
            call: Any = channel.unary_stream(f"/{_SERVICE.full_name}/{method.name}", None, None)
            status, message = ending(call(raw, timeout=10))
            assert status == "INVALID_ARGUMENT", f"{method.name}: {status} {message}"
            assert "parsed" in message


def test_an_oversized_message_is_refused(cluster: ProcessCluster) -> None:
    """Beyond gateway.max_request_bytes gRPC itself answers; just below, the request is read."""
    with raw_channel(cluster) as channel:
        status, message = status_of(channel, _request(text="x" * (REQUEST_BYTES_MAX + 1)))
        assert status == "RESOURCE_EXHAUSTED"
        assert "larger than max" in message
        status, message = status_of(channel, _request(text="x" * (REQUEST_BYTES_MAX - 100)))
        assert (status, "shorten" in message) == ("INVALID_ARGUMENT", True)


def test_a_live_id_cannot_be_taken(cluster: ProcessCluster, client: Client) -> None:
    """The second request of an id is ALREADY_EXISTS while the first lives, undisturbed."""
    first = Reader(client, token_ids=PROMPT, max_tokens=300, request_id="twice")
    first.wait_tokens(1)
    with raw_channel(cluster) as channel:
        status, message = status_of(channel, _request(request_id="twice"))
        assert (status, "twice" in message) == ("ALREADY_EXISTS", True)
        assert len(first.result().token_ids()) == 300


def test_an_id_can_be_used_again_after_two_leases(cluster: ProcessCluster, client: Client) -> None:
    """An ended request's id is refused while late words for it may be on the way; then it is free, and the
    new request of this id is answered as under any other.
    """
    whole(client, token_ids=random_prompt(50, seed=5), max_tokens=4, request_id="again")  # at both workers
    ended_s = monotonic()
    answers: list[Sequence[int]] = []

    def is_free() -> bool:
        try:
            answers.append(whole(client, token_ids=PROMPT[:5], max_tokens=4, request_id="again").token_ids())
        except AlreadyExists:
            return False
        return True

    assert not is_free()
    wait_until(is_free, 4 * LEASE_MS / 1000)
    assert monotonic() - ended_s > LEASE_MS / 1000
    assert answers == [whole(client, token_ids=PROMPT[:5], max_tokens=4).token_ids()]


def test_hanging_up_frees_blocks_within_a_second(cluster: ProcessCluster, client: Client) -> None:
    """Whether before the first token, between tokens, or with half a prompt computed."""
    for tokens in (0, 5):
        reader = Reader(client, token_ids=random_prompt(500, seed=9), max_tokens=500)
        reader.wait_tokens(tokens)
        reader.cancel()
        cluster.assert_nothing_leaks(within_s=1.0)
        with pytest.raises(Cancelled):
            reader.result()


def test_abort_ends_a_request_and_frees_its_blocks(cluster: ProcessCluster, client: Client) -> None:
    """Every choice ends with ABORT; the blocks are free within a second; a second Abort finds nothing."""
    reader = Reader(client, token_ids=PROMPT, max_tokens=900, n=3, request_id="to-abort")
    reader.wait_tokens(3)
    assert client.abort("to-abort")
    cluster.assert_nothing_leaks(within_s=1.0)
    assert [finished.reason for finished in reader.result().finished] == ["abort"] * 3
    assert not client.abort("to-abort")


def test_a_deadline_ends_a_decoding_request(cluster: ProcessCluster) -> None:
    """DEADLINE_EXCEEDED within half a second, by the gateway's clock too if the client has none."""
    with raw_channel(cluster) as channel:
        request = _request(tokens=_tokens(5), sampling={"max_tokens": 900, "ignore_eos": True})
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=0.7)
        began_s = monotonic()
        assert ending(call)[0] == "DEADLINE_EXCEEDED"
        assert 0.6 < monotonic() - began_s < 1.2
    cluster.assert_nothing_leaks(within_s=1.0)


def test_choices_differ_and_repeat(cluster: ProcessCluster, client: Client) -> None:
    """Sampled choices of one request differ; the same seed gives the same ones again."""
    options = {"token_ids": PROMPT, "max_tokens": 16, "n": 4, "temperature": 1.0, "seed": 11}
    first, second = whole(client, **options), whole(client, **options)
    outputs = [tuple(first.token_ids(choice)) for choice in range(4)]
    assert len(set(outputs)) == 4
    assert outputs == [tuple(second.token_ids(choice)) for choice in range(4)]
    greedy = whole(client, **options | {"temperature": 0.0})
    assert len({tuple(greedy.token_ids(choice)) for choice in range(4)}) == 1


def test_a_seed_means_the_same_alone_and_in_company(cluster: ProcessCluster, client: Client) -> None:
    """Eight sampled requests at once give the tokens that each gives alone."""

    def run(seed: int) -> list[int]:
        prompt = random_prompt(10 + 9 * seed, seed)
        return whole(
            client, token_ids=prompt, max_tokens=20, temperature=0.9, top_p=0.95, top_k=60, seed=seed
        ).token_ids()

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(run, range(8))) == alone


def test_thirty_two_at_once_are_answered_as_alone(cluster: ProcessCluster, client: Client) -> None:
    """Mixed lengths, all at once, over several shards: the same tokens as one after the other."""

    def run(index: int) -> list[int]:
        prompt = random_prompt(1 + 13 * index, seed=index)
        return whole(client, token_ids=prompt, max_tokens=4 + index).token_ids()

    with ThreadPoolExecutor(32) as executor:
        together = list(executor.map(run, range(32)))
    assert [len(tokens) for tokens in together] == [4 + index for index in range(32)]
    assert together == [run(index) for index in range(32)]


def test_stop_strings_span_tokens(cluster: ProcessCluster, client: Client) -> None:
    """A stop string over two tokens cuts the text before it, or after it where asked."""
    free = whole(client, token_ids=PROMPT, max_tokens=24)
    text = free.text()
    stop = _inner(text)
    cut = whole(client, token_ids=PROMPT, max_tokens=24, stop=[stop])
    assert cut.text() == text[: text.index(stop)]
    assert (cut.finished[0].reason, cut.finished[0].matched_stop) == ("stop", stop)
    shown = whole(client, token_ids=PROMPT, max_tokens=24, stop=[stop], include_stop=True)
    assert shown.text() == text[: text.index(stop)] + stop
    assert whole(client, token_ids=PROMPT, max_tokens=24, stop=["never said"]).text() == text


def _inner(text: str) -> str:
    """Three characters of the middle of a text: no single token of the tiny tokenizer spells them."""
    middle = len(text) // 2
    return text[middle : middle + 3]


def test_stop_tokens_min_tokens_and_ignore_eos(cluster: ProcessCluster, client: Client) -> None:
    """A stop id ends the output undelivered; min_tokens holds it off; ignore_eos is the callers' wish."""
    free = whole(client, token_ids=PROMPT, max_tokens=20).token_ids()
    stop_id = free[5]
    first = free.index(stop_id)
    stopped = whole(client, token_ids=PROMPT, max_tokens=20, stop_token_ids=[stop_id])
    assert stopped.token_ids() == free[:first]
    assert (stopped.finished[0].reason, stopped.finished[0].matched_token_id) == ("stop", stop_id)
    held = whole(client, token_ids=PROMPT, max_tokens=20, stop_token_ids=[stop_id], min_tokens=20)
    assert len(held.token_ids()) == 20
    assert held.finished[0].reason == "length"
    assert held.token_ids()[: first + 1] != free[: first + 1]


def test_logprobs_come_best_first(cluster: ProcessCluster, client: Client) -> None:
    """Each token has its log-probability and the alternatives asked for; greedy takes the best one."""
    reading = whole(client, token_ids=PROMPT, max_tokens=8, logprobs=5)
    tokens = reading.token_ids()
    entries = [entry for event in reading.events for entry in getattr(event, "logprobs", ())]
    assert len(entries) == len(tokens) == 8
    for token, entry in zip(tokens, entries, strict=True):
        values = [alternative.logprob for alternative in entry.alternatives]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert entry.alternatives[0].token_id == token
        assert entry.logprob == pytest.approx(values[0])
    assert not any(getattr(event, "logprobs", ()) for event in whole(client, token_ids=PROMPT).events)


def test_a_text_and_its_tokens_are_the_same_prompt(cluster: ProcessCluster, client: Client) -> None:
    """Text, its token ids, and chat through the template give the same output as the ids do."""
    text = "the tide, ätherisch: 潮"
    ids = client.tokenize(text).token_ids
    assert whole(client, prompt=text, max_tokens=8).token_ids() == (
        whole(client, token_ids=ids, max_tokens=8).token_ids()
    )
    messages = [{"role": "user", "content": text}]
    ids = client.tokenize(messages=messages).token_ids
    assert whole(client, messages=messages, max_tokens=8).token_ids() == (
        whole(client, token_ids=ids, max_tokens=8).token_ids()
    )


def test_the_whole_context_can_be_used(cluster: ProcessCluster, client: Client) -> None:
    """Prompt and output up to the last position; an absent max_tokens ends there too."""
    prompt = random_prompt(LONGEST - 6, seed=8)
    assert len(whole(client, token_ids=prompt, max_tokens=6).token_ids()) == 6
    reading = whole(client, token_ids=prompt)
    assert len(reading.token_ids()) == 6
    assert reading.finished[0].reason == "length"
