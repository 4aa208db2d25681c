"""The compiled kernel (module.cpp). All raise ValueError for what does not fit, before memory is read."""

from torch import Tensor

class Layer:
    """One layer of a packed arena; keeps its memory."""

    def __init__(
        self, storage: Tensor, layer: int, cache_type: str, block_tokens: int, head_size: int
    ) -> None: ...

class Plan:
    """Spans of a step, int64 [spans, 7] and their blocks, int64, one after the other. causal: the slots are
    the rows themselves.
    """

    def __init__(self, spans: Tensor, table: Tensor, causal: bool) -> None: ...

class Exchange:
    """`signature.Exchange`, with a plan where that has spans; keeps the layers' memory."""

    layer: int
    has_rows: bool
    has_query: bool

    def __init__(
        self,
        layers: list[Layer],
        socket: int,
        incarnation: int,
        wire_version: int,
        query_heads: int,
        scale: float,
        threads: int,
        spin_s: float,
        level: str,
    ) -> None: ...
    def begin_plan(self, micro_batch: int, step: int, plan: Plan, rows: int, slots: Tensor, /) -> None: ...
    def end(self, micro_batch: int, /) -> None: ...
    def receive(self, wait_s: float, /) -> int: ...
    def take(self) -> bytes: ...
    def append(self) -> None: ...
    def attend(self) -> None: ...
    def reply(self) -> bytes: ...
    def finish(self) -> None: ...
    def take_busy(self) -> float: ...
    def take_received(self) -> int: ...
    def take_sent(self) -> int: ...

def attend(
    plan: Plan,
    layer: Layer,
    query: int,
    query_type: str,
    rows: int,
    query_heads: int,
    head_size: int,
    out: int,
    lse: int,
    scale: float,
    window: int,
    threads: int,
    level: str,
    /,
) -> None:
    """Attend a query at an address, results to addresses; the caller vouches for all three."""

def append(
    layer: Layer,
    slots: int,
    count: int,
    key: int,
    key_stride_bytes: int,
    value: int,
    value_stride_bytes: int,
    threads: int,
    /,
) -> None:
    """Write rows at addresses, which the caller vouches for; slots, at an address too, are checked."""

def read(layer: Layer, slots: Tensor, key: Tensor, value: Tensor) -> None: ...
def read_probe(storage: Tensor, threads: int, level: str) -> None: ...
def record_bytes(cache_type: str, block_tokens: int, head_size: int) -> int: ...
def let_threads_spin(may: bool) -> None:
    """Whether threads that compute ask for the next call for a moment before they sleep."""

def levels() -> list[str]: ...

class RowOperators:
    """Operators over rows at addresses, which the caller vouches for."""

    def __init__(self, number_type: str, level: str) -> None: ...
    def norm(
        self,
        vectors: int,
        update: int,
        weight: int,
        out: int,
        rows: int,
        heads: int,
        size: int,
        stride: int,
        epsilon: float,
        threads: int,
        /,
    ) -> None: ...
    def rotate(
        self, vectors: int, cos: int, sin: int, rows: int, heads: int, size: int, stride: int, threads: int, /
    ) -> None: ...
    def gate(self, gate_up: int, out: int, rows: int, size: int, threads: int, /) -> None: ...
    def own(
        self,
        query: int,
        query_heads: int,
        query_stride: int,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
        kv_heads: int,
        out: int,
        lse: int,
        parts: int,
        scale: float,
        merged: int,
        rows: int,
        size: int,
        threads: int,
        /,
    ) -> None: ...
    def merge(
        self,
        own_out: int,
        own_lse: int,
        out: int,
        lse: int,
        parts: int,
        merged: int,
        rows: int,
        heads: int,
        size: int,
        threads: int,
        /,
    ) -> None: ...
    def product(
        self,
        rows: int,
        weights: int,
        bias: int,
        out: int,
        count: int,
        inputs: int,
        outputs: int,
        gated: bool,
        threads: int,
        /,
    ) -> None: ...
    def best(
        self, numbers: int, place: int, best: int, second: int, rows: int, size: int, threads: int, /
    ) -> None: ...

PackedWeights = tuple[int, int, int, int, bool]
"""Addresses of weights and bias, inputs, outputs, whether gated."""

class DecoderLayer:
    """A layer between two attentions, of bfloat16 at addresses, which the caller vouches for."""

    def __init__(
        self,
        level: str,
        query: PackedWeights,
        key_value: PackedWeights,
        output: PackedWeights,
        gated: PackedWeights,
        down: PackedWeights,
        query_norm: int,
        key_norm: int,
        attended_norm: int,
        head_size: int,
        epsilon: float,
        /,
    ) -> None: ...
    def query(self, normed: int, cos: int, sin: int, out: int, rows: int, threads: int, /) -> None: ...
    def key_value(
        self, normed: int, cos: int, sin: int, out: int, keys: int, rows: int, threads: int, /
    ) -> None: ...
    def absorb(
        self,
        hidden: int,
        attended: int,
        next_norm: int,
        kept: int,
        normed: int,
        rows: int,
        threads: int,
        /,
    ) -> None: ...
