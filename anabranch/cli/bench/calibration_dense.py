"""The dense side of `anabranch loadgen check`: steps of a real engine over a lane that answers at once.

    python -m anabranch.cli.bench.calibration_dense SETTINGS

SETTINGS is the JSON of `StepSettings`. Prints a line of JSON, {part: [[size, seconds], ...]}:

decode  a step of so many rows, from end to end, with plan and apply; first: one of a prompt's first chunk of
        so many tokens, the layers alone; later: one of a chunk behind others, which merges what it sees;
        own: attention of so many tokens over themselves, all layers; head: head and sampler of so many rows.

Means, of rounds through all parts: what is predicted is a sum of many steps, slow ones too.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Sequence
from statistics import fmean
from time import monotonic, sleep

import torch

from anabranch.cli.bench.step_settings import ATTENTION_EPOCH, LOCAL_WORKER, StepSettings
from cluster.config import TierConfig
from cluster.errors import AnabranchError, DeadlineExceeded, Unavailable
from cluster.sampling import SamplingParameters
from cluster.types import SequenceKey
from workers.attention.core import AttentionCore
from workers.attention.local_peer import LocalPeer
from workers.cores import keep_to
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.operators import select_operators
from workers.dense.sampler import Sampler, SampleRow
from workers.dense.sequences import Submission
from workers.dense.step_runner import StepOutcome
from workers.kernels.select import select
from workers.lanes.messages import LayerMessage, PartialReply

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WAIT_S = 120.0
_PAUSE_S = 0.001
_ROUNDS = 3
_STEPS = 48
_TOKENS_MOST = 1024
_REPEATS = 3
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_CHUNKS = (16, 32, 64, 128, 256)
_PROMPT = 8
_OFTEN = 3
"""Steps that are passed over where a batch has just formed."""

Points = list[tuple[int, float]]


class InstantLane:
    """A `Lane` to nobody: answers each query at once with zeros, and keeps nothing."""

    def __init__(self, heads: int, head_size: int) -> None:
        self._sizes = heads, head_size
        self._nothing: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: dict[tuple[int, int, int], int] = {}
        self.bytes_sent = self.bytes_received = 0

    def send(self, message: LayerMessage) -> None:
        """See `Lane`."""
        if message.query is not None:
            self._rows[message.step, message.micro_batch, message.layer] = len(message.query)

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:  # noqa: ARG002  see `Lane`
        """See `Lane`."""
        rows = self._rows.pop((step, micro_batch, layer))
        if rows not in self._nothing:
            self._nothing[rows] = torch.zeros(rows, *self._sizes), torch.zeros(rows, self._sizes[0])
        return PartialReply(step, micro_batch, layer, *self._nothing[rows], 0.0)

    def shut_down(self) -> None:
        """See `Lane`."""

    def close(self) -> None:
        """See `Lane`."""


class _Peer(LocalPeer):
    """A real store, for room, behind a lane that attends to nothing."""

    lane: InstantLane

    def open_lane(self) -> InstantLane:
        """See `AttentionPeer.open_lane`."""
        return self.lane


class _Watch:
    """Hears of the steps and ends of one batch (a `Subscriber`)."""

    def __init__(self) -> None:
        self.ends_s: list[tuple[float, StepOutcome]] = []
        self._unfinished = self._full_left = self._batch = 0
        self._over = threading.Event()
        self._failure: AnabranchError | None = None

    def begin(self, batch: int, full_steps: int) -> None:
        """Listen to so many sequences, until they end or made so many steps all together."""
        self._batch, self._unfinished, self._full_left = batch, batch, full_steps
        self.ends_s = []
        self._over.clear()

    def note(self, outcome: StepOutcome) -> None:
        """A step is over."""
        self.ends_s.append((monotonic(), outcome))
        self._full_left -= _is_full(outcome, self._batch)
        if self._full_left == 0:
            self._over.set()

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:  # noqa: ARG002  see `Subscriber`
        """See `Subscriber`."""
        for delta in deltas:
            self._failure = self._failure or delta.failure
            self._unfinished -= delta.ends
        if self._failure is not None or self._unfinished == 0:
            self._over.set()

    def wait(self) -> None:
        """Until it is over. Raises DeadlineExceeded, or what one failed with."""
        if not self._over.wait(_WAIT_S):
            raise DeadlineExceeded(f"{self._unfinished} sequences of the calibration have not ended")
        if self._failure is not None:
            raise self._failure


class DenseParts:
    """An engine whose attention costs nothing, and its parts by themselves."""

    def __init__(self, settings: StepSettings) -> None:
        config = settings.config()
        self._decoder = Decoder.from_folder(settings.model, _DTYPES[settings.dtype])
        self._spec = self._decoder.spec
        geometry = self._spec.geometry(settings.dtype, config.attention.block_tokens)
        self._core = AttentionCore(
            config.attention, TierConfig(arena=settings.arena_bytes), geometry, LOCAL_WORKER, ATTENTION_EPOCH
        )
        self._kernel = select("auto", "cpu")
        self._watch = _Watch()
        self._numbers = itertools.count()
        self._engine = Engine(config, self._decoder, self._kernel, self._connect, on_step=self._watch.note)
        self._engine.start()
        blocks = self._core.arena.blocks
        member = AttentionMember(LOCAL_WORKER, ATTENTION_EPOCH, "", blocks, blocks, is_local=True)
        self._engine.pool.update([member])
        assert self._engine.pool.wait_connected(_WAIT_S), "no lane within the process"

    def measure(self) -> dict[str, Points]:
        """Means by part and size."""
        self._batch(1, max(_CHUNKS), _STEPS)  # first calls compile and touch memory
        rounds = [self._round() for _ in range(_ROUNDS)]
        return {
            part: [(size, fmean(dict(found[part])[size] for found in rounds)) for size, _ in rounds[0][part]]
            for part in rounds[0]
        }

    def _round(self) -> dict[str, Points]:
        return {
            "decode": [(rows, self._decode_s(rows)) for rows in _ROWS],
            "first": [(tokens, self._chunk_s(0, tokens)) for tokens in _CHUNKS],
            "later": [(tokens, self._chunk_s(max(_CHUNKS), tokens)) for tokens in _CHUNKS],
            "own": [(tokens, self._own_s(tokens)) for tokens in _CHUNKS],
            "head": [(rows, self._head_s(rows)) for rows in _ROWS],
        }

    def close(self) -> None:
        """End the engine and its cache."""
        self._engine.stop()
        self._core.close()

    def _connect(self, _member: AttentionMember) -> LocalPeer:
        peer = _Peer(self._core.store, self._core.session)
        peer.lane = InstantLane(self._spec.query_heads, self._spec.head_size)
        return peer

    def _batch(
        self, batch: int, prompt: int, tokens: int, full_steps: int = sys.maxsize
    ) -> list[tuple[float, StepOutcome]]:
        """Ends of the steps of so many equal sequences, until they end or made so many all together; prompts
        are new each time.
        """
        self._watch.begin(batch, full_steps)
        sampling = SamplingParameters(max_tokens=tokens, temperature=0.0, ignore_eos=True, seed=0)
        numbers = list(itertools.islice(self._numbers, batch))
        for number in numbers:
            key, deadline_s = SequenceKey(f"calibration-{number}"), monotonic() + _WAIT_S
            prompt_ids = (1 + number % (self._spec.vocabulary_size - 1),) * prompt
            submission = Submission(key, 1, prompt_ids, (), sampling, 0, tokens, 0, deadline_s, "")
            self._engine.submit(submission, self._watch, _WAIT_S)
        self._watch.wait()
        for number in numbers:
            self._engine.abort(SequenceKey(f"calibration-{number}"), 1, _WAIT_S)
        deadline_s = monotonic() + _WAIT_S
        while not self._engine.is_idle():
            if monotonic() > deadline_s:
                raise DeadlineExceeded("the calibration's engine does not let go of its sequences")
            sleep(_PAUSE_S)
        return self._watch.ends_s

    def _decode_s(self, rows: int) -> float:
        """Without the steps until a batch has formed: sequences join as their room is found."""
        ends = self._batch(rows, _PROMPT, _TOKENS_MOST, _OFTEN + _STEPS)
        full = [
            later_s - earlier_s
            for (earlier_s, before), (later_s, outcome) in itertools.pairwise(ends)
            if _is_full(before, rows) and _is_full(outcome, rows)
        ]
        if len(full) <= _OFTEN:
            raise Unavailable(f"{rows} sequences met in no step within {_TOKENS_MOST} tokens of the first")
        return fmean(full[_OFTEN:])

    def _chunk_s(self, before: int, tokens: int) -> float:
        """A chunk behind `before` tokens, which make one step themselves."""
        found = []
        for _ in range(_REPEATS):
            outcomes = [outcome for _, outcome in self._batch(1, before + tokens, 2)]
            outcome = outcomes[1 if before else 0]
            assert outcome.chunks[0].count == tokens, "a chunk in one step"
            found.append(outcome.times.wall_s - outcome.times.head_s)
        return fmean(found)

    def _own_s(self, tokens: int) -> float:
        spec, dtype = self._spec, self._decoder.dtype
        query = torch.randn(tokens, spec.query_heads, spec.head_size).to(dtype)
        key, value = (torch.randn(tokens, spec.kv_heads, spec.head_size).to(dtype) for _ in range(2))
        return spec.layers * _mean_s(
            lambda: self._kernel.causal(query, key, value, (tokens,), spec.head_size**-0.5, None)
        )

    def _head_s(self, rows: int) -> float:
        sampler = Sampler(
            self._spec.vocabulary_size,
            self._spec.eos_token_ids,
            select_operators(torch.float32, self._decoder.device),
        )
        hidden = torch.randn(rows, self._spec.hidden_size).to(self._decoder.dtype)
        parameters = SamplingParameters(temperature=0.0, ignore_eos=True, seed=0, max_tokens=2)
        chosen = [SampleRow(parameters, 0, 0, 0)] * rows
        return _mean_s(lambda: sampler.sample(self._decoder.logits(hidden), chosen))


def _is_full(outcome: StepOutcome, batch: int) -> bool:
    """Whether all of a batch took part, with a token each."""
    return len(outcome.chunks) == len(outcome.sampled) == batch


def _mean_s(call: object) -> float:
    """Of some calls, without the first ones."""
    assert callable(call)
    found = []
    with torch.inference_mode():
        for _ in range(_OFTEN + 2 * _REPEATS):
            began_s = monotonic()
            call()
            found.append(monotonic() - began_s)
    return fmean(found[_OFTEN:])


def main(settings: StepSettings) -> None:
    """Measure once, and tell."""
    keep_to(settings.dense_cores)
    torch.set_num_threads(len(settings.dense_cores))
    parts = DenseParts(settings)
    try:
        print(json.dumps(parts.measure()), flush=True)
    finally:
        parts.close()


if __name__ == "__main__":
    main(StepSettings.from_json(sys.argv[1]))
