"""One generation across any number of broken streams: pure state, no I/O.

    first attempt --events--> ... --every choice finished--> done
         |                     |
         +----- broken --------+--> next attempt: generation + 1, with all that was received

Invariant: what a caller was given of a choice is `tokens`, and the text that is certain with them. The
latter is a function of the tokens (see TokensDelta.text in the contract), so an attempt that names the
tokens neither repeats nor loses text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from anabranch.events import Event, Finished, Started, TokenDelta, TokenLogprobs
from anabranch.v1 import inference_pb2, types_pb2
from cluster.errors import Internal

_UNSPECIFIED = types_pb2.FINISH_REASON_UNSPECIFIED


class Generation:
    """A request and all that was received for it; decides what is new and what to ask next.

    `request` names its id and its seed, so that it can be resumed even when not one event arrived.
    """

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        assert request.request_id
        assert request.sampling.HasField("seed")
        self._request = request
        self._seed = request.sampling.seed
        self._choices = [_Choice(index) for index in range(request.n if request.HasField("n") else 1)]
        self._started = False
        self.attempts = 0
        """Streams opened so far; the number of the last one's generation."""

    @property
    def request_id(self) -> str:
        """Identity of the request, the same in every attempt."""
        return self._request.request_id

    @property
    def done(self) -> bool:
        """Whether every choice has finished."""
        return all(choice.finished for choice in self._choices)

    def text(self, choice: int = 0) -> str:
        """All text of one choice received so far."""
        return "".join(self._choices[choice].texts)

    def next_attempt(self) -> inference_pb2.GenerateRequest:
        """What to send on a new stream: the request itself at first, then with what is held of it."""
        self.attempts += 1
        if self.attempts == 1:
            return self._request
        for choice in self._choices:
            choice.uncertain_text = ""  # its end was not seen: it comes again
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume.generation = self.attempts
        request.resume.seed = self._seed
        request.resume.received.extend(
            inference_pb2.TokenPrompt(token_ids=choice.token_ids) for choice in self._choices
        )
        request.shard_maps.extend(choice.shard_map for choice in self._choices)
        return request

    def receive(self, response: inference_pb2.GenerateResponse) -> list[Event]:
        """The events that are news. Raises Internal where a token or its text would be wrong or lost."""
        match response.WhichOneof("event"):
            case "started":
                return self._start(response)
            case "delta":
                event = self._choice(response.delta.choice).accept(response.delta)
                return [event] if event else []
            case "finished":
                return self._choice(response.finished.choice).finish(response.finished)
        return []

    def _start(self, response: inference_pb2.GenerateResponse) -> list[Event]:
        started = response.started
        self._seed = started.seed
        if self._started:
            return []
        self._started = True
        return [Started(self.request_id, started.model, started.prompt_tokens, started.seed)]

    def _choice(self, index: int) -> _Choice:
        if index >= len(self._choices):
            raise Internal(f"the gateway spoke of choice {index} of {len(self._choices)}")
        return self._choices[index]


@dataclass(slots=True)
class _Choice:
    """What was received of one choice.

    `text_ends` holds, for each output index at which a delta began or ended, how many characters were
    certain there: it lets a delta that repeats what is held be cut.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    text_length: int = 0
    text_ends: dict[int, int] = field(default_factory=lambda: {0: 0})
    uncertain_text: str = ""
    shard_map: types_pb2.ShardMap = field(default_factory=types_pb2.ShardMap)
    finished: bool = False

    def accept(self, delta: inference_pb2.TokensDelta) -> TokenDelta | None:
        """Take what is new of a delta."""
        if delta.HasField("shard_map"):
            self.shard_map = delta.shard_map
        if self.finished:
            return None
        known = self._known_tokens(delta)
        if not delta.token_ids:
            self.uncertain_text += delta.text
            return None
        if known == len(delta.token_ids):
            self._learn_text_end(delta)
            return None
        text = self.uncertain_text + self._new_text(delta)
        self.uncertain_text = ""
        logprobs = delta.logprobs[known:]
        return self._deliver(delta.token_ids[known:], text, tuple(map(TokenLogprobs.from_proto, logprobs)))

    def finish(self, finished: inference_pb2.Finished) -> list[Event]:
        """End the choice; text held back to the end is certain now."""
        if self.finished:
            return []
        if finished.reason == _UNSPECIFIED:
            raise Internal(f"the gateway ended choice {self.index} without saying why")
        self.finished = True
        rest, self.uncertain_text = self.uncertain_text, ""
        last: list[Event] = [self._deliver((), rest, ())] if rest else []
        return [*last, Finished.from_proto(finished)]

    def _deliver(
        self, token_ids: tuple[int, ...] | list[int], text: str, logprobs: tuple[TokenLogprobs, ...]
    ) -> TokenDelta:
        first_index = len(self.token_ids)
        self.token_ids += token_ids
        if text:
            self.texts.append(text)
            self.text_length += len(text)
        self.text_ends[len(self.token_ids)] = self.text_length
        return TokenDelta(self.index, first_index, tuple(token_ids), text, logprobs)

    def _known_tokens(self, delta: inference_pb2.TokensDelta) -> int:
        """How many of a delta's tokens were received before."""
        received = len(self.token_ids)
        if delta.first_index > received:
            raise Internal(f"tokens {received} to {delta.first_index - 1} of choice {self.index} are missing")
        known = min(received - delta.first_index, len(delta.token_ids))
        held = self.token_ids[delta.first_index : delta.first_index + known]
        if held != list(delta.token_ids[:known]):
            raise Internal(
                f"choice {self.index} was sent again from token {delta.first_index} with other tokens"
            )
        return known

    def _learn_text_end(self, delta: inference_pb2.TokensDelta) -> None:
        """A repeated delta, cut otherwise than the first time, tells how much text is certain at its end."""
        start = self.text_ends.get(delta.first_index)
        if start is not None:
            self.text_ends.setdefault(delta.first_index + len(delta.token_ids), start + len(delta.text))

    def _new_text(self, delta: inference_pb2.TokensDelta) -> str:
        start = self.text_ends.get(delta.first_index)
        if start is None:
            raise Internal(
                f"choice {self.index} came again from token {delta.first_index}, inside an earlier delta: "
                "the new part of its text cannot be told apart"
            )
        return delta.text[self.text_length - start :]
