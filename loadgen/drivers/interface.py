"""What every driver does, and what it notes while it does it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from anabranch.events import Timings
from cluster.clock import Clock
from cluster.config import TlsConfig
from loadgen.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: to an OpenAI-compatible `url` or, without one, to our gateways at `addresses`."""

    addresses: tuple[str, ...] = ()
    url: str = ""
    model: str = ""
    """Empty: the one that is served."""
    api_key: str | None = None
    tls: TlsConfig = field(default_factory=TlsConfig)
    timeout_s: float = 600.0
    """A request that takes longer has failed."""
    outage_s: float = 10.0
    """How long no gateway may answer before a request has failed; until then it is resumed elsewhere."""
    ignore_eos: bool = True
    """Ask for outputs of exactly the planned length."""

    @property
    def place(self) -> str:
        """Where it is, for a report."""
        return self.url or ",".join(self.addresses)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a server tells of itself; None where it does not."""

    model: str
    context: int | None = None
    vocabulary: int | None = None
    dilation: float | None = None
    """How many times slower it is than what it emulates: 1 where it emulates nothing."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as it will be sent."""

    request_id: str
    prompt: Prompt
    output_tokens: int


@dataclass(slots=True)
class Hearing:
    """What was heard of one request so far; `now_s` is the run's clock, in seconds since it began."""

    now_s: Clock
    sent_s: float | None = None
    deltas_s: list[float] = field(default_factory=list)
    delta_tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    timings: Timings | None = None

    def send(self) -> None:
        """The request leaves now."""
        self.sent_s = self.now_s()

    def delta(self) -> None:
        """Tokens arrived now."""
        self.deltas_s.append(self.now_s())

    def answer(self, prompt: Prompt) -> Prompt:
        """The output, written as the prompt is."""
        return "".join(self.texts) if isinstance(prompt, str) else self.token_ids


Send: TypeAlias = Callable[[Hearing], Awaitable[None]]
"""Sends what was prepared, and hears it to its end. Raises an error of cluster.errors where it failed."""


class Driver(Protocol):
    """Speaks one API; belongs to one event loop."""

    async def endpoint(self) -> Endpoint:
        """Ask the server what it is; also opens the connection. Raises an error of cluster.errors."""
        ...

    def prepare(self, ask: Ask) -> Send:
        """Build a request, so that nothing but sending is left to do when it is due."""
        ...

    async def close(self) -> None:
        """Leave all connections."""
        ...
