"""`anabranch generate`: one prompt, one output."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer

from anabranch.cli.options import (
    Address,
    ApiKey,
    Authority,
    ConfigFile,
    MaxTokens,
    Seed,
    System,
    Temperature,
    TopP,
    connect,
)
from anabranch.events import Finished, Started, TokenDelta
from anabranch.requests import GenerateOptions
from anabranch.stream import Stream
from cluster.errors import InvalidRequest

INTERRUPTED_STATUS = 130
"""What shells report for a program ended by Ctrl-C."""


def generate_command(
    text: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option("--chat", metavar="", help="Take it for a user's message.")] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    n: Annotated[int, typer.Option("--n", help="Number of outputs.", min=1)] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print a JSON object at the end.")
    ] = False,
    address: Address = None,
    api_key: ApiKey = None,
    authority: Authority = None,
    config_file: ConfigFile = None,
) -> None:
    """Continue a text, or answer a message; the output is printed as it comes.

    \b
    anabranch generate "The river divides" --max-tokens 40
    anabranch generate --chat "What is an anabranch?" --temperature 0
    anabranch generate --chat --json - < question.txt | jq -r .text
    """
    prompt = _read_prompt() if text == "-" else text
    messages = [{"role": "user", "content": prompt}] if chat or system else None
    if messages and system:
        messages.insert(0, {"role": "system", "content": system})
    options = GenerateOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None, n=n
    )
    with connect(address, api_key, authority, config_file) as client:
        stream = client.generate(None if messages else prompt, messages=messages, **options)
        try:
            with stream:
                answer = _collect(stream, n, live=n == 1 and not as_json)
        except KeyboardInterrupt:
            print()
            raise typer.Exit(INTERRUPTED_STATUS) from None
    if as_json:
        print(json.dumps(answer.as_json(), ensure_ascii=False))
    elif n > 1:
        for index, output in enumerate(answer.outputs):
            print(f"[{index}] {output.text}")


@dataclass(slots=True)
class _Output:
    """One choice as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None

    def as_json(self) -> dict[str, object]:
        assert self.finished is not None, "a stream ends when every choice has"
        return {
            "text": self.text,
            "tokens": self.token_ids,
            "finish_reason": self.finished.reason.value,
            "matched_stop": self.finished.matched_stop,
            "usage": dataclasses.asdict(self.finished.usage),
            "timings": dataclasses.asdict(self.finished.timings),
        }


@dataclass(slots=True)
class _Answer:
    """All choices of one request."""

    outputs: list[_Output]
    started: Started | None = None

    def as_json(self) -> dict[str, object]:
        """The first choice's fields and, where several were asked for, all of them under `choices`."""
        assert self.started is not None, "a stream begins with this event"
        head: dict[str, object] = {
            "request_id": self.started.request_id,
            "model": self.started.model,
            "seed": self.started.seed,
        }
        choices = [output.as_json() for output in self.outputs]
        return {**head, **choices[0], **({"choices": choices} if len(choices) > 1 else {})}


def _collect(stream: Stream, n: int, *, live: bool) -> _Answer:
    """Read the stream to its end; `live` prints its text on the way."""
    answer = _Answer([_Output() for _ in range(n)])
    for event in stream:
        if live:
            print(event.text, end="", flush=True)
        match event:
            case Started():
                answer.started = event
            case TokenDelta():
                answer.outputs[event.choice].text += event.text
                answer.outputs[event.choice].token_ids += event.token_ids
            case Finished():
                answer.outputs[event.choice].finished = event
    if live:
        print()
    return answer


def _read_prompt() -> str:
    """Standard input without the newline that ends its last line."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not text: {error}") from error
