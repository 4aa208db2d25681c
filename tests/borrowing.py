"""What borrowing memory between instances is worth: `python -m tests.borrowing [--json FILE] [--seconds S]`.

Two instances of one dense and one attention worker, each instance on one core, serve a Llama of 270 million
random weights in bfloat16: like a large model's, its steps are mostly the reading of weights. One long
request takes 80 % of an arena while clients in a closed loop bring short ones, whose lengths follow quantiles
of the Azure conversation trace (fitted: nine quantiles of prompts and of outputs, joined by lines), clipped:
prompts to 32 tokens, about what one core computes while it reads the weights, outputs to 256. Room is asked
for 16 tokens ahead, in blocks of 16: the defaults, 64 and 32, are made for arenas of a hundred thousand
tokens, and would leave a third of these small ones empty.

Tokens per second of all streams with `placement.instances: borrowing` over those of `separate`, where the
better of waiting (a sequence begins when there is room for all of it) and preempting (room grows, the last
gives way) counts; three caps of the arenas, three seeds. There are as many clients as what both arenas have
beside the long request holds of short ones, each at the mean of what it reserves while it runs. And with
short requests alone, where borrowing can only cost.

Beside it what DistKV-LLM's model says: batches by memory, steps by T(b) = base + each x b, fitted to short
requests alone at two batch sizes, prefill included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch import Client
from cluster.model_spec import ModelSpec
from cluster.perfmodel import Line
from tests.models import random_prompt, tiny_model
from tests.processes import process_cluster

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
PROMPTS = (2, 181, 207, 396, 1020, 1189, 2735, 4083, 14050)
OUTPUTS = (1, 41, 54, 85, 129, 395, 424, 451, 1000)
PROMPT_MOST, OUTPUT_LEAST, OUTPUT_MOST = 32, 16, 256

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}

CAPS = (1536, 2048, 3072)
"""Tokens of each arena."""
SEEDS = (1, 2, 3)
LONG_SHARE = 0.8
AHEAD = BLOCK = 16
"""Tokens: room asked for beyond what is needed now, and what a block holds."""
WARM_S = 6.0
MODES: dict[str, dict[str, Any]] = {
    "waiting": {"placement.instances": "separate", "dense.reserve_ahead_tokens": 4096},
    "preempting": {"placement.instances": "separate"},
    "borrowing": {"placement.instances": "borrowing"},
}


@dataclass(frozen=True)
class Load:
    """A closed loop of `clients`, beside a long request or not. That grows: it has its share of an arena in
    the middle of what is measured, and outlasts it.
    """

    clients: int
    long_prompt: int = 0
    long_output: int = 0

    @classmethod
    def beside(cls, cap: int, held_each: float, step: Line, seconds: float) -> Load:
        """As many short requests as both arenas have room for beside the long one."""
        clients = int((2 - LONG_SHARE) * cap / held_each)
        grown = (WARM_S + seconds / 2) / step.at(1 + clients / 2)
        most = 1.2 * (WARM_S + seconds) / step.at(1)
        return cls(clients, round(LONG_SHARE * cap - grown), round(most))


def drawn(quantiles: Sequence[int], generator: random.Random) -> float:
    """A length of the fit."""
    share = generator.random()
    index = next(i for i in range(1, len(SHARES)) if share <= SHARES[i])
    part = (share - SHARES[index - 1]) / (SHARES[index] - SHARES[index - 1])
    return quantiles[index - 1] + part * (quantiles[index] - quantiles[index - 1])


def short(generator: random.Random) -> tuple[int, int]:
    """(prompt, output) tokens of a short request."""
    prompt = min(PROMPT_MOST, round(drawn(PROMPTS, generator)))
    output = min(OUTPUT_MOST, max(OUTPUT_LEAST, round(drawn(OUTPUTS, generator))))
    return prompt, output


def midway(generator: random.Random) -> tuple[int, int]:
    """A short request as one finds it at any moment: what it has been given so far is part of its prompt.

    Long outputs are found more often, at any of their tokens. A loop that begins with these is at once as it
    stays: if all began anew, they would all be small for a while, then all large.
    """
    requests = [short(generator) for _ in range(100)]
    ((prompt, output),) = generator.choices(requests, [output for _, output in requests])
    done = generator.randrange(output)
    return prompt + done, output - done


def held(requests: Sequence[tuple[int, int]]) -> float:
    """Mean tokens that a running short request has reserved: it grows from its prompt on, and long outputs
    run longer; `AHEAD` to twice that lie ahead, and half of the last block is empty.
    """
    steps = sum(output for _, output in requests)
    tokens = sum(output * (prompt + output / 2) for prompt, output in requests) / steps
    return tokens + 1.5 * AHEAD + BLOCK / 2


def rate(client: Client, load: Load, seed: int, seconds: float) -> float:
    """Tokens per second of all streams, from the long request's first token and some warming up on."""
    stop, has_begun = threading.Event(), threading.Event()
    arrivals: list[float] = []

    def read(prompt_tokens: int, output_tokens: int, number: int) -> None:
        prompt = random_prompt(prompt_tokens, number)
        stream = client.generate(token_ids=prompt, temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        for event in stream:
            if stop.is_set():
                stream.cancel()
                return
            arrivals.extend([time.monotonic()] * len(getattr(event, "token_ids", ())))
            has_begun.set()

    def loop(index: int) -> None:
        generator = random.Random(1000 * seed + index)
        lengths = midway(generator)
        while not stop.is_set():
            read(*lengths, generator.getrandbits(31))
            lengths = short(generator)

    with ThreadPoolExecutor(load.clients + 1) as pool:
        running = []
        if load.long_prompt:
            running.append(pool.submit(read, load.long_prompt, load.long_output, seed))
            has_begun.wait(60)
        running += [pool.submit(loop, index) for index in range(load.clients)]
        time.sleep(WARM_S)
        begin_s = time.monotonic()
        stop.wait(seconds)
        stop.set()
        for future in running:
            future.result()
    counted = sum(begin_s <= moment < begin_s + seconds for moment in arrivals)
    return counted / seconds


def settings(cap: int, token_bytes: int, mode: str) -> dict[str, Any]:
    """One cluster."""
    return {
        "model.dtype": "bfloat16",
        "dense.replicas": 2,
        "attention.replicas": 2,
        "attention.arena": cap * token_bytes,
        "attention.block_tokens": BLOCK,
        "attention.prefix_sharing": False,
        "dense.reserve_ahead_tokens": AHEAD,
        "dense.cores": [0, 1],
        "attention.cores": [0, 1],
        "lanes.spin_us": 0,
        "controller.heartbeat_ms": 500,
        "controller.expiry_ms": 30_000,
        **MODES[mode],
    }


def predicted(cap: int, clients: int, step: Line, held_each: float) -> float:
    """Gain of borrowing: clients are halved between instances, memory says how many of them run."""
    half, spare = clients / 2, (1 - LONG_SHARE) * cap / held_each

    def tokens_per_s(batch: float) -> float:
        return batch / step.at(batch) if batch else 0.0

    separate = tokens_per_s(1 + min(half, spare)) + tokens_per_s(min(half, cap / held_each))
    fitting = min(clients, (2 - LONG_SHARE) * cap / held_each) / 2
    return (tokens_per_s(1 + fitting) + tokens_per_s(fitting)) / separate


@contextmanager
def clusters(model: Path, cap: int, modes: Sequence[str]) -> Iterator[dict[str, Client]]:
    """One of each mode, all there at once: measured in turn, so that a slow minute is everybody's."""
    token_bytes = ModelSpec.from_folder(model).geometry("bfloat16", BLOCK).token_bytes
    with ExitStack() as stack:
        yield {
            mode: stack.enter_context(
                stack.enter_context(
                    process_cluster(
                        model,
                        Path(stack.enter_context(tempfile.TemporaryDirectory())),
                        settings(cap, token_bytes, mode),
                    )
                ).client()
            )
            for mode in modes
        }


def measure(
    model: Path, cap: int, modes: Sequence[str], loads: Sequence[Load], seconds: float
) -> dict[str, list[list[float]]]:
    """Rates of each mode and load, by seed."""
    found: dict[str, list[list[float]]] = {mode: [[] for _ in loads] for mode in modes}
    with clusters(model, cap, modes) as clients:
        for seed in SEEDS:
            for number, load in enumerate(loads):
                for mode, client in clients.items():
                    found[mode][number].append(rate(client, load, seed, seconds))
                    told = f"{found[mode][number][-1]:.1f} tokens/s"
                    print(f"{cap} tokens, {mode}, {load}, seed {seed}: {told}", flush=True)
    return found


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder), tokenizer=True, dtype=torch.bfloat16, **SHAPE)
        found = compare(model, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(model: Path, seconds: float) -> dict[str, Any]:
    """Every cell, measured and predicted."""
    generator = random.Random(0)
    held_each = held([short(generator) for _ in range(10_000)])
    few, many = Load(2), Load(12)
    alone = measure(model, 8192, ("borrowing", "preempting"), [few, many], seconds)
    points = [
        (load.clients / 2, load.clients / statistics.median(rates))
        for load, rates in zip((few, many), alone["preempting"], strict=True)
    ]
    step = Line.through(points, is_fixed=True)
    cells = []
    for cap in CAPS:
        load = Load.beside(cap, held_each, step, seconds)
        rates = {mode: found[0] for mode, found in measure(model, cap, tuple(MODES), [load], seconds).items()}
        better = max(statistics.median(rates["waiting"]), statistics.median(rates["preempting"]))
        gain = statistics.median(rates["borrowing"]) / better
        expected = predicted(cap, load.clients, step, held_each)
        cells.append({"cap": cap, **asdict(load), "rates": rates, "gain": gain, "predicted": expected})
        print(f"arenas of {cap} tokens, {load}: {gain:.2f} x (predicted {expected:.2f})", flush=True)
    cost = 1 - statistics.median(alone["borrowing"][1]) / statistics.median(alone["preempting"][1])
    print(f"short requests alone: borrowing costs {100 * cost:.1f} %")
    return {
        "machine": {"processor": platform.processor(), "cores": os.cpu_count()},
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tests.borrowing --seconds {seconds:g} --json bench/borrowing.json",
        "model": SHAPE,
        "held_each": held_each,
        "step": asdict(step),
        "cells": cells,
        "short_alone": {mode: rates[1] for mode, rates in alone.items()} | {"cost": cost},
    }


if __name__ == "__main__":
    main()
