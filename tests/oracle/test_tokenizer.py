"""The real model's folder against transformers: token ids, chat prompts, and what it answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from tests.smollm2 import smollm2_folder
from tests.tokenizer import BOS_ID, EOS_ID, SPECIALS, build_tokenizer
from workers.gateway.tokenizer import IncrementalDetokenizer, Tokenizer

TEXTS = [
    "",
    " ",
    "The capital of France is",
    "  leading, trailing  and   inner spaces   ",
    "tabs\tand\r\nline ends\n\n\n",
    "In 2024, 1234567890 people paid 3.14159 dollars; 007 and 1e-5, ٣٤٥, ½, ²",
    "it's we'll they've I'd don't DON'T",
    "café naïve Ångström straße ﬁ e\u0301",
    "日本語のテキスト 中文字符 한국어 العربية עברית हिन्दी ไทย",
    "👍 👨‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 ☃️",
    "def f(x: int) -> dict[str, list[int]]:\n    return {'a': [x**2 for _ in range(10)]}  # done\n",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|><repo_name> <|im_end",
    "\u00a0\u2003\u200b\ufeff\u2028zero\x00\x07\x7f",
    "https://example.org/?q=a+b&c=%20d#frag user@example.org",
    "ßẞ ǅ İi ﷺ \N{REPLACEMENT CHARACTER} \U0010ffff",
    "a" * 500 + "1" * 200,
]
CHATS = [
    [{"role": "user", "content": "Hello 12"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>é</b>\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    """The gateway's tokenizer of the real model."""
    return Tokenizer(smollm2_folder())


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' tokenizer of the same folder."""
    return transformers.AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_and_text_equal(ours: Tokenizer, theirs: Any, text: str) -> None:
    """Encoding with and without special tokens, and both ways of decoding, equal transformers'."""
    token_ids = theirs(text).input_ids
    assert ours.encode(text) == token_ids
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.decode(token_ids, skip_special_tokens=False) == theirs.decode(token_ids) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60))
def test_any_text_equals(ours: Tokenizer, theirs: Any, text: str) -> None:
    """Whatever Unicode holds: equal ids and equal text, at once and token by token.

    Not always the same text as before: this model's vocabulary lacks a few control bytes.
    """
    token_ids = ours.encode(text)
    assert token_ids == theirs(text).input_ids
    detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=False)
    shown = "".join([detokenizer.push([each]) for each in token_ids]) + detokenizer.flush()
    assert shown == ours.decode(token_ids, skip_special_tokens=False) == theirs.decode(token_ids)


def test_digits_are_words_of_their_own(ours: Tokenizer) -> None:
    """The rule a GGUF file only names: 1234 is four tokens, as the model was trained."""
    assert [ours.decode([token_id]) for token_id in ours.encode("x 1234")] == ["x", " ", "1", "2", "3", "4"]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_prompts_equal(
    ours: Tokenizer, theirs: Any, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    """The rendered text, and the ids a chat request becomes, equal apply_chat_template."""
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours.render_chat(messages, add_generation_prompt) == expected
    token_ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == token_ids


TEMPLATES = {
    "tools": "{% for t in tools %}{{ t | tojson(indent=2) }}\n{% endfor %}{{ messages[-1]['content'] }}",
    "blocks": (
        "{{ bos_token }}\n  {% for m in messages %}\n  {{ m.role | upper }}: {{ m.content | trim }}\n"
        "  {% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{% set who = m.role %}{{ m.content }}{% endgeneration %}"
        "{{ who }}{{ eos_token }}{% endfor %}"
    ),
    "undefined": "{% if enable_thinking is defined %}think{% endif %}{{ pad_token }}{{ tools is none }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_models_templates_render_equally(tmp_path: Path, name: str) -> None:
    """What templates of other models use - tools, trimmed blocks, namespaces, marks - renders the same."""
    tools = [{"type": "function", "function": {"name": "<é>", "description": 'say "hi"'}}]
    write_folder(tmp_path, chat_template=TEMPLATES[name])
    expected = load_theirs(tmp_path).apply_chat_template(
        CHATS[2], tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert Tokenizer(tmp_path).render_chat(CHATS[2], tools=tools) == expected


def write_folder(folder: Path, with_post_processor: bool = False, **config: object) -> None:
    """A tiny tokenizer with this tokenizer_config.json, optionally adding BOS and EOS by itself."""
    raw = build_tokenizer()
    raw.add_tokens([AddedToken("plain")])
    if with_post_processor:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{SPECIALS[0]} $A {SPECIALS[1]}",
            special_tokens=[(SPECIALS[0], BOS_ID), (SPECIALS[1], EOS_ID)],
        )
    raw.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def load_theirs(folder: Path) -> Any:
    """transformers' tokenizer of `folder`."""
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("with_post_processor", [True, False])
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"pad_token": "plain"}]
)
def test_begin_and_end_tokens_follow_transformers(
    tmp_path: Path, with_post_processor: bool, config: dict[str, object]
) -> None:
    """Whether BOS and EOS are added, and what counts as special, is decided by the same files."""
    write_folder(tmp_path, with_post_processor, **config)
    ours, theirs = Tokenizer(tmp_path), load_theirs(tmp_path)
    for text in ("the end", "a plain<|eos|> text"):
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def model() -> Any:
    """The converted weights in transformers, in float32."""
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


def test_the_converted_model_knows_paris(theirs: Any, model: Any) -> None:
    """Greedy continuation is sensible, so scales, rows and names of all tensors are right."""
    prompt = theirs("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert theirs.decode(output[0]).startswith("The capital of France is Paris")


def test_the_converted_model_has_low_perplexity(theirs: Any, model: Any) -> None:
    """An English paragraph: 9.4 (16.3 where the rows of q and k are left interleaved)."""
    paragraph = (
        "The water cycle describes how water moves around the Earth. Water evaporates from the oceans, rises"
        " into the atmosphere, cools and condenses into clouds, and falls back to the ground as rain or snow."
        " Some of it flows in rivers back to the sea."
    )
    token_ids = theirs(paragraph, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert math.exp(model(token_ids, labels=token_ids).loss.item()) < 10
