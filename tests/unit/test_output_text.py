"""The text of an output: the same however its tokens were cut, with or without stop strings."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.sampling import SamplingParameters
from tests.tokenizer import IM_END_ID, build_tokenizer, write_tokenizer
from workers.gateway.output_text import OutputText, Piece
from workers.gateway.request_plan import ATTEMPT_BITS, STREAM_GENERATION_MAX, RequestPlan
from workers.gateway.tokenizer import Tokenizer

TEXTS = st.text(alphabet="ab é😀", max_size=12)
STOPS = st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3)


@functools.cache
def tokenizer() -> Tokenizer:
    """The tiny byte-level tokenizer: most of its tokens are half a character of something."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Tokenizer(Path(folder))


def plan(stop: list[str] | None = None, min_tokens: int = 0, include_stop: bool = False) -> RequestPlan:
    """A plan of which only the text's part matters."""
    return RequestPlan(
        request_id="one",
        model="tiny",
        prompt_token_ids=(65, 66),
        sampling=SamplingParameters(min_tokens=min_tokens, max_tokens=100, seed=1),
        choices=1,
        stop=tuple(stop or ()),
        include_stop=include_stop,
        priority=0,
        tenant="",
        generation=1,
        received=((),),
        shard_maps=(None,),
    )


def _run(text: OutputText, ids: list[int], cuts: list[int]) -> tuple[list[Piece], Piece | None]:
    """Push `ids` cut at `cuts`; pieces up to a stop, and the flush where none came."""
    pieces = []
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for first, end in itertools.pairwise(edges):
        pieces.append(text.push(ids[first:end]))
        if pieces[-1].matched_stop is not None:
            return pieces, None
    return pieces, text.flush()


@given(TEXTS, STOPS, st.lists(st.integers(0, 50), max_size=4), st.integers(0, 4))
def test_how_tokens_are_cut_changes_nothing(
    text: str, stop: list[str], cuts: list[int], min_tokens: int
) -> None:
    """Text, tokens used and the stop that matched are those of all tokens at once."""
    ids = build_tokenizer().encode(text).ids
    whole, whole_end = _run(OutputText(tokenizer(), plan(stop, min_tokens)), ids, [])
    pieces, end = _run(OutputText(tokenizer(), plan(stop, min_tokens)), ids, cuts)
    assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in whole)
    assert sum(piece.tokens_used for piece in pieces) == sum(piece.tokens_used for piece in whole)
    assert pieces[-1].matched_stop == whole[-1].matched_stop
    assert end == whole_end
    if not stop and end is not None:
        assert "".join(piece.text for piece in pieces) + end.text == text


@given(TEXTS, STOPS, st.integers(0, 50))
def test_a_replayed_text_goes_on_where_the_first_one_stopped(text: str, stop: list[str], cut: int) -> None:
    """After the tokens a client holds were replayed, what follows is what would have followed."""
    ids = build_tokenizer().encode(text).ids
    held = ids[: cut % (len(ids) + 1)]
    first, second = OutputText(tokenizer(), plan(stop)), OutputText(tokenizer(), plan(stop))
    told = first.push(held)
    assert second.push(held) == told
    if told.matched_stop is None:
        assert second.push(ids[len(held) :]) == first.push(ids[len(held) :])


def test_stop_strings_wait_for_min_tokens() -> None:
    """A stop string inside the first min_tokens is text like any other."""
    ids = build_tokenizer().encode("axbxc").ids
    text = OutputText(tokenizer(), plan(["x"], min_tokens=3))
    piece = text.push(ids)
    assert (piece.text, piece.matched_stop, piece.tokens_used) == ("axb", "x", 4)


def test_a_stop_token_s_text_is_shown_on_demand() -> None:
    """With include_stop the token that ended the output is spelt, even a special one."""
    shown, hidden = OutputText(tokenizer(), plan(include_stop=True)), OutputText(tokenizer(), plan())
    assert shown.flush(IM_END_ID).text == "<|im_end|>"
    assert hidden.flush(IM_END_ID).text == ""


def test_generations_of_streams_and_attempts_are_ordered() -> None:
    """The first submission is 1; a client's next stream outranks every attempt before; all fit 16 bits."""
    last = (1 << ATTEMPT_BITS) - 1
    first, second = plan(), _in_generation(2)
    assert first.submission_generation(0) == 1
    assert first.submission_generation(1) == 2
    assert second.submission_generation(0) > first.submission_generation(last)
    assert _in_generation(STREAM_GENERATION_MAX).submission_generation(last) < 1 << 16


def _in_generation(generation: int) -> RequestPlan:
    fields = {name: getattr(plan(), name) for name in RequestPlan.__slots__}
    return RequestPlan(**(fields | {"generation": generation}))
