"""What `anabranch demo` does: a real model served by a real cluster on this machine, in one command.

Starts one gateway, one dense worker and two attention workers under a Ray controller, asks a short
question and one about a long text, shows where the long request's KV cache lies, and stops everything.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anabranch.answers import Member, ShardUsage
from anabranch.cli import model as models
from anabranch.cli.invocation import invocation
from anabranch.cli.models.catalogue import DEFAULT_MODEL
from anabranch.cli.models.progress import ConsoleProgress
from anabranch.cli.pulse import pulse
from anabranch.cli.running_cluster import running_cluster
from anabranch.client import Client
from anabranch.events import Finished, Started, TokenDelta
from cluster import config as configuration
from cluster.errors import AnabranchError
from controller.state import ClusterRecord

SHORT_QUESTION = "What is the capital of France?"
LONG_QUESTION = "What is the name of the larger boat of the survey?"
LONG_TEXT = "river_survey.txt"
_STARTS = "starting Ray, controller, gateway, dense worker and two attention workers ..."
_ANSWER_TOKENS = 32
_LONG_TOKENS_LEAST = 3000
_LOOKS = 3  # what the last step wrote is committed by the next one: look again


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question: what it cost, and where its cache lay shortly before its end."""

    prompt_tokens: int
    tokens: int
    ttft_s: float
    tpot_s: float
    shards: tuple[ShardUsage, ...]


def run(console: Console) -> int:
    """The whole demonstration; returns the exit status."""
    try:
        with ConsoleProgress(console) as progress:
            folder = models.fetch(DEFAULT_MODEL, progress)
        with (
            tempfile.TemporaryDirectory(prefix="anabranch-") as state,
            running_cluster(console, _config(folder, state), _STARTS) as record,
        ):
            problem = _ask_both(console, record)
    except AnabranchError as error:
        console.print(f"demo: {error.message}", style="red", markup=False)
        return 1
    if problem:
        console.print(f"demo: {problem}", style="red", markup=False)
        return 1
    command = invocation()
    console.print("Everything is stopped. Next, each in a terminal of its own:", style="bold")
    console.print(f"  {command} up\n  {command} chat", highlight=False, markup=False, soft_wrap=True)
    return 0


def _config(folder: Path, state: str) -> configuration.Config:
    return configuration.load(
        None,
        {
            "model.path": str(folder),
            "attention.arena": "256MiB",
            "gateway.port": 0,
            "gateway.http_port": None,
            "controller.port": 0,
            "state_dir": state,
        },
    )


def _ask_both(console: Console, record: ClusterRecord) -> str | None:
    """Ask both questions and show what they cost; returns what is not as promised, if anything."""
    text = resources.files("anabranch.cli").joinpath("data", LONG_TEXT).read_text()
    with Client(record.gateways) as client:
        short = _ask(console, client, SHORT_QUESTION, SHORT_QUESTION)
        shown = f"[{LONG_TEXT}, {len(text.split())} words] {LONG_QUESTION}"
        long = _ask(console, client, f"{text}\n\n{LONG_QUESTION}", shown)
        members = client.topology().members
    console.print(_cache_table(long), _speed_table(short, long), memory_table(members))
    holders = {shard.worker_id for shard in long.shards if shard.committed_tokens}
    if len(holders) < 2:
        return f"the long request's cache lies on {len(holders)} attention worker(s), not on both"
    if long.prompt_tokens < _LONG_TOKENS_LEAST:
        return f"the long question has {long.prompt_tokens} tokens, fewer than {_LONG_TOKENS_LEAST}"
    return None


def _ask(console: Console, client: Client, question: str, shown: str) -> Answer:
    """Stream one answer to the terminal."""
    console.print(f"\n> {shown}", style="bold", markup=False)
    began_s = time.monotonic()
    stream = client.generate(
        messages=[{"role": "user", "content": question}], temperature=0.0, max_tokens=_ANSWER_TOKENS
    )
    prompt_tokens = tokens = 0
    arrivals_s: list[float] = []
    shards: tuple[ShardUsage, ...] = ()
    with contextlib.ExitStack() as until_first:
        for event in stream:
            if isinstance(event, Started):
                prompt_tokens = event.prompt_tokens
                until_first.enter_context(prefill_shown(console, client, stream.request_id, prompt_tokens))
            elif isinstance(event, TokenDelta) and event.token_ids:
                until_first.close()
                arrivals_s.append(time.monotonic())
                if len(arrivals_s) <= _LOOKS:
                    shards = client.topology(stream.request_id).shards
            elif isinstance(event, Finished):
                tokens = event.usage.completion_tokens
            console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    ttft_s = arrivals_s[0] - began_s
    return Answer(
        prompt_tokens, tokens, ttft_s, (arrivals_s[-1] - arrivals_s[0]) / max(1, tokens - 1), shards
    )


@contextmanager
def prefill_shown(console: Console, client: Client, request_id: str, total: int) -> Iterator[None]:
    """Show how much of a prompt is in the cache, until left; says nothing of what takes under two seconds."""

    def say(_passed_s: float) -> None:
        held = sum(shard.committed_tokens for shard in client.topology(request_id).shards)
        console.print(f"  {held:,} of {total:,} prompt tokens are in the cache", style="dim")

    with pulse(say):
        yield


def _cache_table(answer: Answer) -> Table:
    table = Table(title=f"Where the KV cache of the long request lies ({answer.prompt_tokens} prompt tokens)")
    for heading in ("worker", "positions", "tokens", "blocks", "bytes"):
        table.add_column(heading, justify="left" if heading == "worker" else "right")
    for shard in answer.shards:
        table.add_row(
            shard.worker_id,
            _positions(shard),
            str(shard.committed_tokens),
            str(shard.blocks),
            f"{shard.bytes:,}",
        )
    return table


def _positions(shard: ShardUsage) -> str:
    """First and last position held."""
    last = shard.first_position + shard.committed_tokens - 1
    return f"{shard.first_position} to {last}" if shard.committed_tokens else "none"


def _speed_table(short: Answer, long: Answer) -> Table:
    table = Table(title="Speed")
    for heading in ("question", "prompt tokens", "output tokens", "TTFT s", "TPOT ms", "decode tokens/s"):
        table.add_column(heading, justify="left" if heading == "question" else "right")
    for name, answer in (("short", short), ("long", long)):
        rate = f"{1 / answer.tpot_s:.1f}" if answer.tpot_s else "-"
        table.add_row(
            name,
            str(answer.prompt_tokens),
            str(answer.tokens),
            f"{answer.ttft_s:.2f}",
            f"{1000 * answer.tpot_s:.1f}",
            rate,
        )
    return table


def memory_table(members: Iterable[Member]) -> Table:
    """The most memory each process of the cluster had."""
    table = Table(title="Processes")
    for heading in ("worker", "process", "peak memory MiB"):
        table.add_column(heading, justify="left" if heading == "worker" else "right")
    for member in members:
        peak = f"{member.resident_peak_bytes / 2**20:.0f}"
        table.add_row(member.worker_id, str(member.process_id), peak)
    return table
