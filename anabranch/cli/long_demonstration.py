"""What `anabranch demo --long` does: one request that no attention worker could hold, over eight of them.

Each worker's arena is capped at 1,000 tokens of SmolLM2; prompt and output are 7,900 together. It shows what
a single such worker would answer, where the shards lie, and what it took.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rich.console import Console

from anabranch.answers import ShardUsage
from anabranch.cli import model as models
from anabranch.cli.demonstration import LONG_QUESTION, LONG_TEXT, memory_table, prefill_shown
from anabranch.cli.models.catalogue import DEFAULT_MODEL
from anabranch.cli.models.progress import ConsoleProgress
from anabranch.cli.running_cluster import running_cluster
from anabranch.cli.shard_picture import shard_picture
from anabranch.client import Client
from anabranch.events import Started, TokenDelta
from cluster import config as configuration
from cluster.errors import AnabranchError
from cluster.model_spec import ModelSpec
from cluster.policies.placement import PlacementPolicy, WorkerSpace, inadmissible
from cluster.types import Epoch, WorkerId
from controller.state import ClusterRecord

WORKERS = 8
CAP_TOKENS = 1000
REQUEST_TOKENS = 7900
OUTPUT_TOKENS = 32
_DEADLINE_S = 1800.0
_STARTS = f"starting Ray, controller, gateway, dense worker and {WORKERS} attention workers ..."


@dataclass(frozen=True, slots=True)
class LongAnswer:
    """What came, when, and where its cache lay before the end. arrivals_s: seconds since it was asked."""

    arrivals_s: tuple[float, ...]
    shards: tuple[ShardUsage, ...]


def run(console: Console) -> int:
    """The whole demonstration; returns the exit status."""
    try:
        with ConsoleProgress(console) as progress:
            folder = models.fetch(DEFAULT_MODEL, progress)
        with tempfile.TemporaryDirectory(prefix="anabranch-") as state:
            config = _config(folder, state)
            with running_cluster(console, config, _STARTS) as record:
                problem = _demonstrate(console, config, record)
    except AnabranchError as error:
        problem = error.message
    if problem:
        console.print(f"demo: {problem}", style="red", markup=False)
        return 1
    console.print("Everything is stopped.", style="bold")
    return 0


def _config(folder: Path, state: str) -> configuration.Config:
    geometry = ModelSpec.from_folder(folder).geometry("float32", 1)
    return configuration.load(
        None,
        {
            "model.path": str(folder),
            "attention.replicas": WORKERS,
            "attention.arena": CAP_TOKENS * geometry.token_bytes,
            "gateway.port": 0,
            "gateway.http_port": None,
            "gateway.default_deadline_ms": int(1000 * _DEADLINE_S),
            "controller.port": 0,
            "controller.expiry_ms": 15_000,  # ten processes share perhaps two cores: silence is no death here
            "state_dir": state,
        },
    )


def _demonstrate(console: Console, config: configuration.Config, record: ClusterRecord) -> str | None:
    """Ask, and show everything; returns what is not as promised, if anything."""
    policy = PlacementPolicy(
        config.attention.block_tokens, config.placement.shard_tokens, config.placement.max_shards
    )
    capacity = CAP_TOKENS // policy.block_tokens * policy.block_tokens
    alone = WorkerSpace(WorkerId("attention-0"), Epoch(1), capacity, capacity)
    console.print(
        f"\nEach worker holds {capacity} tokens. To {REQUEST_TOKENS:,} one of them alone would answer:",
        style="bold",
    )
    console.print(f"  RESOURCE_EXHAUSTED: {inadmissible(REQUEST_TOKENS, [alone], policy)}", style="yellow")
    with Client(record.gateways) as client:
        answer = _ask(console, client, _prompt(client))
        members = client.topology().members
    tokens = len(answer.arrivals_s)
    console.print("\nWhere its KV cache lies", style="bold")
    console.print(shard_picture(answer.shards, REQUEST_TOKENS, console.is_terminal))
    ttft_s = answer.arrivals_s[0]
    tpot_ms = 1000 * (answer.arrivals_s[-1] - ttft_s) / max(1, tokens - 1)
    console.print(f"TTFT {ttft_s:.1f} s, TPOT {tpot_ms:.0f} ms, {tokens} tokens", highlight=False)
    console.print(memory_table(members))
    holders = {shard.worker_id for shard in answer.shards if shard.committed_tokens}
    if len(holders) != WORKERS:
        return f"the cache lies on {len(holders)} attention workers, not on {WORKERS}"
    return None if tokens == OUTPUT_TOKENS else f"{tokens} of {OUTPUT_TOKENS} tokens came"


def _prompt(client: Client) -> tuple[int, ...]:
    """A text, again and again, and a question about it: exactly as many tokens as are left for the prompt."""
    text = resources.files("anabranch.cli").joinpath("data", LONG_TEXT).read_text()
    question = client.tokenize(f"\n\n{LONG_QUESTION}\n").token_ids
    room = REQUEST_TOKENS - OUTPUT_TOKENS - len(question)
    tokens = client.tokenize(text).token_ids
    return (tokens * (room // len(tokens) + 1))[:room] + question


def _ask(console: Console, client: Client, prompt: Sequence[int]) -> LongAnswer:
    """Stream the answer to the terminal."""
    console.print(f"\n> [{LONG_TEXT} to {len(prompt):,} tokens] {LONG_QUESTION}", style="bold", markup=False)
    began_s = time.monotonic()
    stream = client.generate(
        token_ids=prompt,
        temperature=0.0,
        max_tokens=OUTPUT_TOKENS,
        ignore_eos=True,
        deadline_s=_DEADLINE_S,
        request_id="demo-long",
    )
    arrivals_s: list[float] = []
    shards: tuple[ShardUsage, ...] = ()
    with contextlib.ExitStack() as until_first:
        for event in stream:
            if isinstance(event, TokenDelta) and event.token_ids:
                until_first.close()
                arrivals_s += [time.monotonic() - began_s] * len(event.token_ids)
                if len(arrivals_s) < OUTPUT_TOKENS:
                    shards = client.topology(stream.request_id).shards
            elif isinstance(event, Started):
                until_first.enter_context(prefill_shown(console, client, stream.request_id, len(prompt)))
            console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return LongAnswer(tuple(arrivals_s), shards)
