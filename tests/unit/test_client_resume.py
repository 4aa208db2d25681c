"""The client's state over broken streams: every token and its text once, or an error."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.events import Event, Finished, FinishReason, Started, TokenDelta
from anabranch.requests import generate_request
from anabranch.resume import Generation
from anabranch.v1 import inference_pb2 as api
from anabranch.v1 import types_pb2
from cluster.errors import Internal


def make_generation(choices: int = 1) -> Generation:
    """A generation that was sent."""
    generation = Generation(generate_request("x", None, None, "", "r", {"n": choices, "seed": 5}))
    generation.next_attempt()
    return generation


def make_delta(first: int, token_ids: list[int], text: str = "", choice: int = 0) -> api.GenerateResponse:
    """A delta as a gateway sends it."""
    delta = api.TokensDelta(choice=choice, first_index=first, token_ids=token_ids, text=text)
    return api.GenerateResponse(delta=delta)


def make_finished(choice: int = 0) -> api.GenerateResponse:
    """The end of a choice."""
    return api.GenerateResponse(
        finished=api.Finished(choice=choice, reason=types_pb2.FINISH_REASON_STOP, matched_token_id=2)
    )


def make_started(seed: int = 5) -> api.GenerateResponse:
    """The first event."""
    return api.GenerateResponse(started=api.Started(model="m", prompt_tokens=1, seed=seed))


@dataclass(frozen=True)
class Output:
    """What one choice should be: tokens, its text, and how much of it is certain after each token."""

    token_ids: list[int]
    text: str
    certain: list[int]

    def responses(self, choice: int, first: int, cuts: list[int]) -> list[api.GenerateResponse]:
        """The rest from output index `first`, cut into deltas."""
        edges = sorted({first, *(cut for cut in cuts if cut > first), len(self.token_ids)})
        deltas = [
            make_delta(
                start,
                self.token_ids[start:end],
                self.text[self.certain[start] : self.certain[end]],
                choice,
            )
            for start, end in itertools.pairwise(edges)
        ]
        rest = self.text[self.certain[-1] :]
        last = [make_delta(len(self.token_ids), [], rest, choice)] if rest else []
        return [*deltas, *last, make_finished(choice)]


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    """Any tokens, with any text that becomes certain in any steps."""
    token_ids = draw(st.lists(st.integers(0, 9), max_size=12))
    text = draw(st.text("ab", max_size=20))
    size = len(token_ids)
    certain = draw(st.lists(st.integers(0, len(text)), min_size=size, max_size=size))
    return Output(token_ids, text, [0, *sorted(certain)])


def attempt(
    data: st.DataObject, script: list[Output], request: api.GenerateRequest, edges: list[set[int]]
) -> list[api.GenerateResponse]:
    """What a gateway sends on one stream; it may begin at any earlier edge of what the client holds."""
    queues = []
    for choice, output in enumerate(script):
        held = len(request.resume.received[choice].token_ids) if request.HasField("resume") else 0
        first = data.draw(st.sampled_from(sorted(edge for edge in edges[choice] if edge <= held)))
        cuts = data.draw(st.lists(st.integers(0, len(output.token_ids))))
        queues.append(output.responses(choice, first, cuts))
    responses = [make_started()]
    while any(queues):
        queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
        responses.append(queue.pop(0))
    return responses


@given(st.data(), st.lists(outputs(), min_size=1, max_size=3))
def test_any_cutting_delivers_everything_once(data: st.DataObject, script: list[Output]) -> None:
    """However often streams break and wherever the next one begins, the output is that of one stream."""
    generation = Generation(generate_request("x", None, None, "", "r", {"n": len(script), "seed": 5}))
    edges: list[set[int]] = [{0} for _ in script]
    events: list[Event] = []
    breaks = data.draw(st.lists(st.integers(0, 20), max_size=4))
    for length in [*breaks, None]:
        for response in attempt(data, script, generation.next_attempt(), edges)[:length]:
            events += generation.receive(response)
        for choice in range(len(script)):
            edges[choice] |= {
                event.first_index + len(event.token_ids)
                for event in events
                if isinstance(event, TokenDelta) and event.choice == choice
            }
    assert generation.done
    assert [type(event) for event in events].count(Started) == 1
    for choice, output in enumerate(script):
        mine = [event for event in events if not isinstance(event, Started) and event.choice == choice]
        deltas = [event for event in mine if isinstance(event, TokenDelta)]
        indexed = [
            (event.first_index + offset, token)
            for event in deltas
            for offset, token in enumerate(event.token_ids)
        ]
        assert indexed == list(enumerate(output.token_ids))
        assert "".join(event.text for event in deltas) == output.text == generation.text(choice)
        assert [type(event) for event in mine].count(Finished) == 1
        assert isinstance(mine[-1], Finished)


def test_a_later_attempt_says_what_is_held() -> None:
    """Generation, tokens, seed and shard map of each choice travel, in the choices' order."""
    generation = make_generation(choices=2)
    generation.receive(make_started(seed=77))
    response = make_delta(0, [4, 5], "ab", choice=1)
    response.delta.shard_map.shards.add(worker_id="attention-1")
    generation.receive(response)
    request = generation.next_attempt()
    assert request.resume.generation == 2
    assert request.resume.seed == 77
    assert [list(held.token_ids) for held in request.resume.received] == [[], [4, 5]]
    assert [[shard.worker_id for shard in held.shards] for held in request.shard_maps] == [
        [],
        ["attention-1"],
    ]
    assert request.request_id == "r"
    assert generation.next_attempt().resume.generation == 3


def test_the_first_attempt_resumes_nothing() -> None:
    """A request is sent as it is, with a seed of its own."""
    request = Generation(generate_request("x", None, None, "", None, {})).next_attempt()
    assert not request.HasField("resume")
    assert request.sampling.HasField("seed")
    assert request.request_id


@pytest.mark.parametrize(
    ("held", "response", "message"),
    [
        ([], make_delta(1, [7]), "tokens 0 to 0 of choice 0 are missing"),
        ([1, 2], make_delta(4, []), "tokens 2 to 3"),
        ([1, 2], make_delta(0, [1, 9]), "with other tokens"),
        ([1, 2], make_delta(1, [2, 3], "bc"), "cannot be told apart"),
        ([], make_delta(0, [7], choice=3), "choice 3 of 1"),
        ([], api.GenerateResponse(finished=api.Finished()), "without saying why"),
    ],
    ids=["gap", "gap before the end", "other tokens", "inside a delta", "no such choice", "no reason"],
)
def test_what_could_be_wrong_is_an_error(
    held: list[int], response: api.GenerateResponse, message: str
) -> None:
    """Where a token or its text would be missing, wrong or doubtful, the stream fails."""
    generation = make_generation()
    if held:
        generation.receive(make_delta(0, held, "ab"))
    with pytest.raises(Internal, match=message):
        generation.receive(response)


def test_a_finished_choice_stays_finished() -> None:
    """What a later stream says of a finished choice is not news."""
    generation = make_generation(choices=2)
    generation.receive(make_delta(0, [1], "a"))
    (finished,) = generation.receive(make_finished())
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.matched_token_id, finished.matched_stop) == (FinishReason.STOP, 2, None)
    assert not generation.done
    generation.next_attempt()
    assert generation.receive(make_delta(0, [1], "a")) == []
    assert generation.receive(make_delta(1, [8], "b")) == []
    assert generation.receive(make_finished()) == []
    assert generation.receive(make_delta(0, [3], "c", choice=1))[0].text == "c"
    generation.receive(make_finished(choice=1))
    assert generation.done


def test_text_without_tokens_waits_for_the_end() -> None:
    """Text held back to the end is delivered with the end, and dropped when the stream breaks before it."""
    generation = make_generation()
    generation.receive(make_delta(0, [1], "a"))
    assert generation.receive(make_delta(1, [], "b")) == []
    generation.next_attempt()
    assert generation.receive(make_delta(1, [], "b")) == []
    assert [event.text for event in generation.receive(make_finished())] == ["b", ""]
    assert generation.text() == "ab"


def test_log_probabilities_keep_to_their_tokens() -> None:
    """A delta that repeats tokens loses their log-probabilities with them."""
    generation = make_generation()
    generation.receive(make_delta(0, [1], "a"))
    response = make_delta(0, [1, 2], "ab")
    response.delta.logprobs.add(logprob=-1)
    response.delta.logprobs.add(logprob=-2).alternatives.add(token_id=9, logprob=-0.5)
    (event,) = generation.receive(response)
    assert isinstance(event, TokenDelta)
    assert (event.first_index, event.token_ids, event.text) == (1, (2,), "b")
    assert [(item.logprob, item.alternatives[0].token_id) for item in event.logprobs] == [(-2.0, 9)]
