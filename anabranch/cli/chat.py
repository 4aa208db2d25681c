"""`anabranch chat`: a conversation at the terminal, or from a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import typer
from rich.console import Console

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
from anabranch.client import Client
from anabranch.events import TokenDelta
from anabranch.requests import GenerateOptions
from cluster.errors import AnabranchError

_HELP = """\
/system TEXT   begin anew with these instructions; without TEXT, with none
/reset         begin anew
/help          this list
/quit          leave, as do Ctrl-D and Ctrl-C at the prompt; Ctrl-C during an answer stops only that
Anything else is said to the model."""


def chat_command(
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    address: Address = None,
    api_key: ApiKey = None,
    authority: Authority = None,
    config_file: ConfigFile = None,
) -> None:
    """Talk to the model; it remembers the conversation. /help lists what else can be typed.

    \b
    anabranch chat --system "Answer in one sentence."
    printf 'Hello!\\nWhat did I say?\\n' | anabranch chat --temperature 0
    """
    options = GenerateOptions(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with connect(address, api_key, authority, config_file) as client:
        chat = Chat(client, Console(), Console(stderr=True, soft_wrap=True), options, system)
        if sys.stdin.isatty():
            chat.note(f"{client.models()[0].name}; /help lists the commands")
        if not chat.run(_line_reader()):
            raise typer.Exit(1)


@dataclass
class Chat:
    """A conversation: what was said, and how it goes on. Answers go to `output`, all else to `remarks`."""

    client: Client
    output: Console
    remarks: Console
    options: GenerateOptions
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self, read_line: Callable[[], str | None]) -> bool:
        """Take lines until there are no more; returns whether every answer was given."""
        all_answered = True
        while (line := read_line()) is not None:
            line = line.strip()
            if line == "/quit":
                break
            if line.startswith("/"):
                self._obey(line)
            elif line:
                all_answered &= self._answer(line)
        return all_answered

    def note(self, text: str, style: str = "dim") -> None:
        """Say something that is not the model's."""
        self.remarks.print(text, style=style, markup=False, emoji=False, highlight=False)

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        match command:
            case "/help":
                self.note(_HELP)
            case "/reset":
                self.messages.clear()
                self.note("the conversation begins anew")
            case "/system":
                self.system = argument.strip() or None
                self.messages.clear()
                instructions = "these" if self.system else "no"
                self.note(f"the conversation begins anew, with {instructions} instructions")
            case _:
                self.note(f"{command} is not a command; /help lists them")

    def _answer(self, question: str) -> bool:
        """Stream one answer; a question without one is forgotten. Returns whether it was answered."""
        self.messages.append({"role": "user", "content": question})
        answer = Answer()
        try:
            self._stream(answer)
        except KeyboardInterrupt:
            self.output.print()
            self.note("stopped")
        except AnabranchError as error:
            self.output.print()
            self.note(f"error: {error.message}", style="red")
            self.messages.pop()
            return False
        else:
            self.output.print()
            self.note(answer.speed())
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()
        return True

    def _stream(self, answer: Answer) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        with self.client.generate(messages=[*system, *self.messages], **self.options) as stream:
            for event in stream:
                if isinstance(event, TokenDelta):
                    answer.extend(event)
                self.output.out(event.text, end="", highlight=False)  # as it is: no markup, no wrapping


class Answer:
    """One answer as it grows, and its speed as seen from here."""

    def __init__(self) -> None:
        self.text = ""
        self._tokens = 0
        self._first_tokens = 0
        self._began_s = self._first_s = self._last_s = time.monotonic()

    def extend(self, delta: TokenDelta) -> None:
        """Take a delta that just arrived."""
        self.text += delta.text
        if not delta.token_ids:
            return
        self._last_s = time.monotonic()
        if not self._tokens:
            self._first_s, self._first_tokens = self._last_s, len(delta.token_ids)
        self._tokens += len(delta.token_ids)

    def speed(self) -> str:
        """Tokens, tokens per second after the first delta, and how long that took."""
        decode_s = self._last_s - self._first_s
        rate = f", {(self._tokens - self._first_tokens) / decode_s:.1f} tokens/s" if decode_s > 0 else ""
        return f"{self._tokens} tokens{rate}, first after {self._first_s - self._began_s:.2f} s"


def _line_reader() -> Callable[[], str | None]:
    """What gives the next line, and None when there is none: a prompt at a terminal, else a pipe's lines."""
    if not sys.stdin.isatty():
        return lambda: sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives input() its history and editing

    return _ask_at_terminal


def _ask_at_terminal() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
