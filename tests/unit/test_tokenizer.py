"""Tokens to text in any pieces, stop strings across pieces, chat templates."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RawTokenizer

from cluster.errors import BrokenModelFolder, InvalidRequest
from tests.tokenizer import EOS_ID, VOCABULARY_SIZE, build_tokenizer, write_tokenizer
from workers.gateway.tokenizer import IncrementalDetokenizer, StopMatcher, StopResult, Tokenizer

_TEXTS = st.text(alphabet=st.sampled_from("ab the é€😀\n"), max_size=12)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE, as Llama 3, Qwen and SmolLM have it."""
    folder = tmp_path_factory.mktemp("byte-level")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece's way, as Llama 2 and Mistral have it: ▁ for space, bytes for what is unknown."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    raw = RawTokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    raw.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    folder = tmp_path_factory.mktemp("byte-fallback")
    raw.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def split(items: Sequence[int], cuts: Sequence[int]) -> Iterator[Sequence[int]]:
    """`items` in pieces that end at `cuts`."""
    ends = sorted({min(cut, len(items)) for cut in cuts})
    for start, end in zip([0, *ends], [*ends, len(items)], strict=True):
        yield items[start:end]


def streamed(detokenizer: IncrementalDetokenizer, pieces: Iterator[Sequence[int]]) -> str:
    """All a client is shown."""
    return "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.flush()


_IDS = st.lists(st.integers(0, VOCABULARY_SIZE + 3), max_size=90)
_CUTS = st.lists(st.integers(0, 90), max_size=10)


@given(token_ids=_IDS, cuts=_CUTS, skip=st.booleans())
def test_any_split_of_any_tokens_prints_the_same(
    byte_level: Tokenizer, token_ids: list[int], cuts: list[int], skip: bool
) -> None:
    """Byte-level: however tokens arrive, invalid bytes and unknown ids included, the text is `decode`'s."""
    text = streamed(IncrementalDetokenizer(byte_level, skip), split(token_ids, cuts))
    assert text == byte_level.decode(token_ids, skip)


@given(text=_TEXTS, specials=st.lists(st.integers(0, 12), max_size=3), cuts=_CUTS, skip=st.booleans())
def test_any_split_prints_the_same_with_byte_fallback(
    byte_fallback: Tokenizer, text: str, specials: list[int], cuts: list[int], skip: bool
) -> None:
    """SentencePiece: prefix spaces, characters of several byte tokens and skipped tokens between words."""
    token_ids = byte_fallback.encode(text)
    if not _has_bytes(byte_fallback, token_ids):
        for place in specials:
            token_ids.insert(min(place, len(token_ids)), 2)
    shown = streamed(IncrementalDetokenizer(byte_fallback, skip), split(token_ids, cuts))
    assert shown == byte_fallback.decode(token_ids, skip)


def _has_bytes(tokenizer: Tokenizer, token_ids: list[int]) -> bool:
    return any((tokenizer.token(token_id) or "").startswith("<0x") for token_id in token_ids)


@given(token_ids=st.lists(st.integers(0, 263), max_size=90), cuts=_CUTS)
def test_pieces_do_not_matter_for_broken_byte_runs(
    byte_fallback: Tokenizer, token_ids: list[int], cuts: list[int]
) -> None:
    """SentencePiece, any ids at all: the text depends on the tokens, not on how they were cut."""
    whole = streamed(IncrementalDetokenizer(byte_fallback), iter([token_ids]))
    assert streamed(IncrementalDetokenizer(byte_fallback), split(token_ids, cuts)) == whole


@given(text=st.text(alphabet="é€😀a ", min_size=1, max_size=40))
def test_characters_come_whole_and_at_once(byte_level: Tokenizer, text: str) -> None:
    """No half character is printed, and none waits longer than its last byte."""
    detokenizer, shown = IncrementalDetokenizer(byte_level), ""
    for count, token_id in enumerate(token_ids := byte_level.encode(text), start=1):
        shown += detokenizer.push([token_id])
        assert "\N{REPLACEMENT CHARACTER}" not in shown
        assert shown == byte_level.decode(token_ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_genuine_replacement_character_is_text(byte_level: Tokenizer) -> None:
    """A model may spell U+FFFD itself; it comes out with the next character, not twice and not never."""
    text = "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}€"
    detokenizer = IncrementalDetokenizer(byte_level)
    assert "".join([detokenizer.push([token_id]) for token_id in byte_level.encode(text)]) == text


def test_an_unfinished_character_is_shown_at_the_end(byte_level: Tokenizer) -> None:
    """`flush` prints what can no longer be completed, once."""
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.push(byte_level.encode("a€")[:-1]) == "a"
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_endless_broken_bytes_are_printed_and_forgotten(byte_level: Tokenizer) -> None:
    """Bytes that never become text are not hoarded: they come out, and text after them is right."""
    continuation = next(
        token_id for token_id in range(256) if byte_level.decode([token_id]) == "\N{REPLACEMENT CHARACTER}"
    )
    token_ids = [continuation] * 500 + byte_level.encode("the €")
    detokenizer = IncrementalDetokenizer(byte_level)
    early = detokenizer.push(token_ids[:400])
    assert len(early) >= 397
    assert early + detokenizer.push(token_ids[400:]) + detokenizer.flush() == byte_level.decode(token_ids)


def test_the_prompt_keeps_the_space_before_the_answer(byte_fallback: Tokenizer) -> None:
    """With the prompt as context the first word keeps the space that decoding alone would drop."""
    prompt, answer = byte_fallback.encode("a"), byte_fallback.encode("b")
    assert IncrementalDetokenizer(byte_fallback).push(answer) == "b"
    assert IncrementalDetokenizer(byte_fallback, context=prompt).push(answer) == " b"


def test_special_tokens_can_be_shown(byte_level: Tokenizer) -> None:
    """Left out by default, printed on request."""
    assert IncrementalDetokenizer(byte_level).push([EOS_ID]) == ""
    assert IncrementalDetokenizer(byte_level, skip_special_tokens=False).push([EOS_ID]) == "<|eos|>"


_STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def reference_stop(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The slow definition: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return (text[:end] if include_stop else text[: end - len(longest)]), longest
    return text, None


@given(text=st.text(alphabet="abc", max_size=40), stops=_STOPS, cuts=_CUTS, include_stop=st.booleans())
def test_stop_strings_do_not_depend_on_pieces(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    """Text and match equal the slow definition for any cut, also for stop strings inside each other."""
    matcher, shown = StopMatcher(stops, include_stop), ""
    for piece in split([ord(character) for character in text], cuts):
        shown += matcher.push("".join(map(chr, piece))).text
    shown += matcher.flush()
    assert (shown, matcher.matched) == reference_stop(text, stops, include_stop)


def test_stop_matcher_holds_back_no_more_than_needed() -> None:
    """What can no longer begin a stop string is printed at once."""
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go ST").text == "go "
    assert matcher.push("ART").text == "START"
    assert matcher.push(" STOP and on") == StopResult(" ", "STOP")
    assert matcher.push("more").text == ""


def test_without_stop_strings_text_passes() -> None:
    """The common case holds nothing."""
    assert StopMatcher([]).push("abc").text == "abc"


def write_config(folder: Path, **config: object) -> Path:
    """A folder with our tiny tokenizer and this tokenizer_config.json."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


_MESSAGES = [{"role": "user", "content": "hi"}]


def test_no_template_is_the_callers_error(tmp_path: Path) -> None:
    """A base model refuses messages and says what to send instead."""
    tokenizer = Tokenizer(write_config(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="has no chat template"):
        tokenizer.render_chat(_MESSAGES)


def test_template_files_go_before_the_configuration(tmp_path: Path) -> None:
    """chat_template.jinja wins, and special tokens are variables, written as text or as an object."""
    folder = write_config(tmp_path, chat_template="old", bos_token={"content": "<|bos|>"})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert Tokenizer(folder).render_chat(_MESSAGES) == "<|bos|>hi"


def test_tools_choose_their_template(tmp_path: Path) -> None:
    """Of named templates `tool_use` serves requests with tools; without one the default gets them."""
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools|tojson }}"},
    ]
    tokenizer = Tokenizer(write_config(tmp_path, chat_template=templates))
    assert tokenizer.render_chat(_MESSAGES) == "plain"
    assert tokenizer.render_chat(_MESSAGES, tools=[{"name": "<é>"}]) == '[{"name": "<é>"}]'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "does not accept"),
        ("{{ messages.append(1) }}", "does not accept"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[5].content.x }}", "does not accept"),
    ],
)
def test_refusals_of_a_template_reach_the_caller(tmp_path: Path, template: str, message: str) -> None:
    """What a template refuses, trips over or is not allowed to do is an error of the request."""
    with pytest.raises(InvalidRequest, match=message):
        Tokenizer(write_config(tmp_path, chat_template=template)).render_chat(_MESSAGES)


def test_generation_marks_and_loop_controls_are_known(tmp_path: Path) -> None:
    """Tags of training templates print their body; `break` works; the date has its function."""
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    tokenizer = Tokenizer(write_config(tmp_path, chat_template=template))
    assert tokenizer.render_chat([*_MESSAGES, *_MESSAGES]) == "hi4"


def test_broken_folders_are_named(tmp_path: Path) -> None:
    """No tokenizer, an unreadable one, a template that does not compile: each names its file."""
    with pytest.raises(BrokenModelFolder, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    with pytest.raises(BrokenModelFolder, match="does not compile"):
        Tokenizer(write_config(tmp_path, chat_template="{% for %}"))
    with pytest.raises(BrokenModelFolder, match="neither a text nor a list"):
        Tokenizer(write_config(tmp_path, chat_template=[1]))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BrokenModelFolder, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_padding_and_truncation_of_training_are_off(tmp_path: Path) -> None:
    """A prompt is never cut or padded because the tokenizer file once was told to."""
    raw = build_tokenizer()
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("abcdef")) == 6


def test_a_long_text_does_not_stop_other_threads(byte_level: Tokenizer) -> None:
    """While a text of 400,000 characters becomes tokens, another thread never waits for most of that time."""
    text, longest_s = "a b " * 100_000, 0.0
    encoding = threading.Thread(target=byte_level.encode, args=(text,))
    began_s = before_s = monotonic()
    encoding.start()
    while encoding.is_alive():
        encoding.join(0.001)
        now_s = monotonic()
        longest_s, before_s = max(longest_s, now_s - before_s), now_s
    assert longest_s < 0.5 * (monotonic() - began_s)
