"""What is wrong with a configuration, in the words of its own file instead of the validator's."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_PLAIN = {"a valid integer": "an integer", "a valid tuple": "a list", "a valid ": "a "}
_SECTION_EXPECTED = ("model_type", "model_attributes_type")


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One clause per key, with the nearest valid one where a key of `root` is unknown; of several forms
    that a value might have had, all are named.
    """
    said: dict[str, list[str]] = {}
    inputs: dict[str, object] = {}
    for item in error.errors():
        location = _key(item["loc"], root)
        dotted = ".".join(location)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location[-1], _keys_at(location[:-1], root), n=1, cutoff=0.0)
            said[f"unknown key {dotted}"] = [f"did you mean {'.'.join([*location[:-1], *near])}?"]
            continue
        words, names_input = _in_our_words(item)
        said.setdefault(dotted, []).append(words)
        if names_input:
            inputs[dotted] = item["input"]
    return "; ".join(_clause(key, words, inputs) for key, words in said.items())


def _clause(key: str, words: Sequence[str], inputs: dict[str, object]) -> str:
    first, *others = dict.fromkeys(words)
    text = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    if key in inputs:
        text = f"{text}, not {inputs[key]!r}"
    if key.startswith("unknown key "):
        return f"{key}; {text}"
    return f"{key}: {text}" if key else text


def _in_our_words(item: Any) -> tuple[str, bool]:
    """What is wrong with a value, and whether it should be shown."""
    if item["type"] in _SECTION_EXPECTED:
        return "must be a section with keys below it", True
    if item["type"] == "missing":
        return "is missing", False
    if item["type"] == "value_error":
        return str(item["msg"]).removeprefix("Value error, "), False
    words = str(item["msg"]).replace("Input should be", "must be")
    for theirs, ours in _PLAIN.items():
        words = words.replace(theirs, ours)
    return words, True


def _key(location: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """The key without the validator's names for the forms its value may have."""
    key: list[str] = []
    section: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            key.append(str(part))  # of a list
            continue
        if section is None:
            continue
        key.append(part)
        field = section.model_fields.get(part)
        section = _section_of(field.annotation) if field is not None else None
    return key


def _section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a key is, or a list of which it is."""
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return typing.cast("type[BaseModel]", annotation) if is_section else None


def _keys_at(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    section = root
    for key in location:
        if key.isdecimal():
            continue  # of a list
        inner = _section_of(section.model_fields[key].annotation)
        assert inner is not None
        section = inner
    return list(section.model_fields)
