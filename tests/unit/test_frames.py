"""Frames: every message survives its bytes, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import AnabranchError, Fenced, InvalidRequest, LaneBroken, VersionMismatch
from cluster.types import Generation, KvGeometry, ShardId
from tests.error_kinds import EVERY_KIND
from workers.lanes import frames
from workers.lanes.codec import FrameCodec, Packed, torch_dtype
from workers.lanes.frame_reader import Frame, FrameReader
from workers.lanes.frames import FrameKind
from workers.lanes.messages import LayerMessage, PartialReply, PlanRow, StepPlanDifference
from workers.lanes.plans import MICRO_BATCHES_MOST

INCARNATION = 0x1234_5678_9ABC_DEF0
ROWS_MOST = 8


def geometry(dtype: str = "float32") -> KvGeometry:
    """A small cache."""
    return KvGeometry(2, 4, 2, 8, dtype, 4, "d")


def codec(dtype: str = "float32", incarnation: int = INCARNATION) -> FrameCodec:
    """A lane's codec over `geometry`."""
    return FrameCodec(geometry(dtype), incarnation, ROWS_MOST)


def message(dtype: str = "float32", rows: int = 3, appended: int = 2) -> LayerMessage:
    """A message with every section."""
    generator = torch.Generator().manual_seed(rows)
    plan = StepPlanDifference(
        7, 6, (ShardId(3),), ((ShardId(1), (5, 6)),), (PlanRow(ShardId(9), Generation(2), 4, 1, 0, 4, (8,)),)
    )

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch_dtype(geometry(dtype)))

    return LayerMessage(
        step=7,
        micro_batch=1,
        layer=1,
        deadline_ms=250,
        plan=plan,
        query=tensor(rows, 4, 8),
        key=tensor(appended, 2, 8),
        value=tensor(appended, 2, 8),
        window=16,
    )


def joined(packed: Packed) -> bytes:
    """The bytes a transport would carry."""
    return b"".join(buffer.tobytes() for buffers in packed for buffer in buffers)


def arriving(lane: FrameCodec, data: bytes, pieces: Sequence[int] = (2**30,)) -> Iterator[Frame]:
    """Feed bytes in pieces of the given sizes, over and over; each frame as soon as it is there."""
    reader, offset, turn = FrameReader(lane.read_header), 0, 0
    while offset < len(data):
        wanted = reader.wanted()
        count = min(len(wanted), pieces[turn % len(pieces)], len(data) - offset)
        wanted[:count] = data[offset : offset + count]
        reader.received(count)
        while (frame := reader.next()) is not None:
            yield frame
        offset += count
        turn += 1


def test_a_plan_that_leaves_tensors_unaligned_is_refused() -> None:
    """A checked frame whose plan has an odd length breaks the lane, and not the thread that reads it."""
    place, lengths, plan = (7, 0, 0, 250, 0), (41, 128, 0, 0), bytes(41 + 128)
    header = frames.pack_header(int(FrameKind.STEP), 3, INCARNATION, place, lengths, (0.0, 0.0))
    (frame,) = assemble(codec(), header + plan + frames.pack_trailer(frames.checksum([plan])))
    with pytest.raises(LaneBroken, match="unaligned"):
        codec().read_message(frame)


def assemble(lane: FrameCodec, data: bytes) -> list[Frame]:
    """All frames in the bytes."""
    return list(arriving(lane, data))


def assert_same_message(got: LayerMessage, sent: LayerMessage) -> None:
    """Equal, tensors bit by bit."""
    for name in LayerMessage.__slots__:
        left, right = getattr(got, name), getattr(sent, name)
        if isinstance(right, Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name
        else:
            assert left == right, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pieces", [(2**30,), (1,), (67, 5), (3, 1000)])
def test_messages_survive_any_cutting_of_the_stream(dtype: str, pieces: tuple[int, ...]) -> None:
    """Frames arrive whole and in order however the bytes are cut, sections absent or empty included."""
    lane = codec(dtype)
    bare = LayerMessage(step=8, micro_batch=0, layer=2, deadline_ms=1)
    empty = LayerMessage(9, 0, 0, 1, StepPlanDifference(9, None, (), (), ()), torch.empty(0, 4, 8).to(
        torch_dtype(geometry(dtype))))  # fmt: skip
    sent = [message(dtype), bare, message(dtype, rows=ROWS_MOST), empty]
    data = b"".join(joined(lane.pack_message(item)) for item in sent)
    for frame, item in zip(arriving(lane, data, pieces), sent, strict=True):
        assert_same_message(lane.read_message(frame), item)


def test_replies_survive() -> None:
    """Outputs, lse with its infinities, and the worker's own time come back as they were."""
    reply = PartialReply(5, 1, 29, torch.randn(3, 4, 8), torch.full((3, 4), -torch.inf), 0.0125)
    (frame,) = assemble(codec(), joined(codec().pack_reply(reply)))
    got = codec().read_reply(frame)
    assert (got.step, got.micro_batch, got.layer, got.compute_seconds) == (5, 1, 29, 0.0125)
    assert torch.equal(got.out, reply.out)
    assert torch.equal(got.lse, reply.lse)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.__name__)
def test_every_error_survives_a_fault(kind: type[AnabranchError]) -> None:
    """Kind, message and metadata cross a lane."""
    lane = codec()
    (frame,) = assemble(lane, joined(lane.pack_fault(message(), kind("größer als erlaubt", shard="17"))))
    assert frame.header.kind is FrameKind.FAULT
    assert (frame.header.step, frame.header.micro_batch, frame.header.layer) == (7, 1, 1)
    got = lane.read_fault(frame)
    assert type(got) is kind
    assert got.message == "größer als erlaubt"
    assert got.metadata == {"shard": "17"}


def test_a_fault_of_any_length_fits() -> None:
    """A long message and many facts are cut, not refused: an answer always gets through."""
    error = Fenced("ö" * 100_000, **{f"fact{number}": "x" * 9000 for number in range(100)})
    (frame,) = assemble(codec(), joined(codec().pack_fault(message(), error)))
    assert codec().read_fault(frame).message.startswith("ööö")


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, 10**6), flip=st.integers(1, 255), kind=st.sampled_from(["step", "reply", "fault"])
)
def test_any_flipped_byte_is_detected(position: int, flip: int, kind: str) -> None:
    """No single damaged byte of any frame is read as data."""
    lane = codec()
    buffers = {
        "step": lambda: lane.pack_message(message()),
        "reply": lambda: lane.pack_reply(PartialReply(1, 0, 0, torch.ones(2, 4, 8), torch.ones(2, 4), 1.0)),
        "fault": lambda: lane.pack_fault(message(), Fenced("x")),
    }[kind]()
    data = bytearray(joined(buffers))
    data[position % len(data)] ^= flip
    with pytest.raises(LaneBroken):
        assemble(lane, bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=frames.HEADER_BYTES, max_size=300))
def test_noise_is_never_a_frame(data: bytes) -> None:
    """Arbitrary bytes raise LaneBroken before any payload is taken."""
    with pytest.raises(LaneBroken):
        assemble(codec(), data)


def test_a_truncated_frame_never_completes() -> None:
    """Any prefix of a frame gives no frame."""
    data = joined(codec().pack_message(message()))
    for length in range(0, len(data), 7):
        assert assemble(codec(), data[:length]) == []


def test_a_foreign_incarnation_is_fenced() -> None:
    """A frame of another lane is refused as such, not as damage."""
    data = joined(codec().pack_message(message()))
    with pytest.raises(Fenced, match="arrived on lane"):
        assemble(codec(incarnation=INCARNATION + 1), data)


def _header(
    kind: FrameKind = FrameKind.STEP,
    flags: int = 0,
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0),
    micro_batch: int = 0,
) -> memoryview:
    place = (0, micro_batch, 0, 0, 0)
    return memoryview(frames.pack_header(kind, flags, INCARNATION, place, lengths, (0.0, 0.0)))


def test_another_wire_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of another version names both."""
    monkeypatch.setattr(frames, "WIRE_VERSION", 99)
    data = bytes(_header())
    monkeypatch.undo()
    with pytest.raises(VersionMismatch, match="99"):
        assemble(codec(), data)


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        (FrameKind.STEP, (2**32 - 1, 0, 0, 0)),
        (FrameKind.STEP, (0, (ROWS_MOST + 1) * 4 * 8 * 4, 0, 0)),
        (FrameKind.PARTIAL, (0, 0, 4, 0)),
        (FrameKind.CLOSE, (4, 0, 0, 0)),
        (FrameKind.FAULT, (frames.FAULT_BYTES_MOST + 1, 0, 0, 0)),
    ],
)
def test_lengths_are_checked_before_memory_is_taken(
    kind: FrameKind, lengths: tuple[int, int, int, int]
) -> None:
    """A header that announces more than the lane allows is refused while nothing is allocated."""

    reader = FrameReader(codec().read_header)
    before = len(reader.wanted())
    reader.wanted()[: frames.HEADER_BYTES] = _header(kind, lengths=lengths)
    reader.received(frames.HEADER_BYTES)
    with pytest.raises(LaneBroken, match="at most"):
        reader.next()
    assert len(reader.wanted()) == before - frames.HEADER_BYTES


def test_a_micro_batch_beyond_the_limit_is_refused() -> None:
    """A frame cannot make its reader keep memory for micro-batches without end."""
    with pytest.raises(LaneBroken, match="micro-batch"):
        assemble(codec(), bytes(_header(micro_batch=MICRO_BATCHES_MOST)))


@pytest.mark.parametrize(
    ("flags", "lengths"),
    [
        (frames.Flag.QUERY, (0, 4 * 8 * 4 + 4, 0, 0)),
        (frames.Flag.KEY_VALUE, (0, 0, 64, 128)),
        (frames.Flag.PLAN, (16, 0, 0, 0)),
    ],
)
def test_sections_that_are_no_rows_are_refused(
    flags: frames.Flag, lengths: tuple[int, int, int, int]
) -> None:
    """A well-checked frame whose sections do not fit the geometry raises LaneBroken."""
    payload = bytes(sum(lengths))
    data = bytes(_header(flags=flags, lengths=lengths)) + payload
    (frame,) = assemble(codec(), data + frames.pack_trailer(frames.checksum([payload])))
    with pytest.raises(LaneBroken):
        codec().read_message(frame)


def test_the_sender_refuses_what_the_lane_cannot_carry() -> None:
    """Too many rows or another dtype fail at the sender, before a byte is sent."""
    with pytest.raises(InvalidRequest, match="limits"):
        codec().pack_message(message(rows=ROWS_MOST + 1))
    with pytest.raises(InvalidRequest, match="bfloat16"):
        codec("bfloat16").pack_message(message("float32"))
    with pytest.raises(InvalidRequest, match="fit"):
        codec().pack_message(LayerMessage(step=-1, micro_batch=0, layer=0, deadline_ms=1))


def test_memory_is_reused() -> None:
    """Two pieces of memory take a micro-batch's frames in turn; each makes the tensors of a shape once."""
    lane = codec()
    one = joined(lane.pack_message(message()))
    found = assemble(lane, one * 6)
    tensors = [lane.read_message(frame).query for frame in found]
    assert {id(tensor) for tensor in tensors} == {id(tensors[0]), id(tensors[1])}
    places = {frame.memory.tensor.data_ptr() for frame in found}
    assert len(places) == 2


def test_a_reply_stays_whole_while_others_are_read() -> None:
    """Frames of another micro-batch in the same piece, however many, leave a micro-batch's last reply."""
    lane = codec()
    first = PartialReply(1, 0, 0, torch.full((3, 4, 8), 5.0), torch.full((3, 4), 6.0), 0.0)
    others = [
        PartialReply(1, 1, layer, torch.full((2, 4, 8), float(layer)), torch.ones(2, 4), 0.0)
        for layer in range(9)
    ]
    data = b"".join(joined(lane.pack_reply(reply)) for reply in (first, *others))
    kept, *rest = assemble(lane, data)
    reply = lane.read_reply(kept)
    assert bool((reply.out == 5).all())
    assert bool((reply.lse == 6).all())
    assert bool((lane.read_reply(rest[-1]).out == 8).all())


def test_large_frames_between_small_ones() -> None:
    """A frame far larger than the reader's first memory arrives whole, and so does what follows it."""
    wide = KvGeometry(1, 64, 64, 64, "float32", 16, "wide")
    lane = FrameCodec(wide, INCARNATION, 64)
    messages = [
        LayerMessage(step, 0, 0, 1, query=torch.full((rows, 64, 64), float(step)))
        for step, rows in enumerate((1, 64, 1))
    ]
    data = b"".join(joined(lane.pack_message(sent)) for sent in messages)
    for pieces in ((2**30,), (100_000, 7)):
        for frame, sent in zip(arriving(lane, data, pieces), messages, strict=True):
            assert_same_message(lane.read_message(frame), sent)
