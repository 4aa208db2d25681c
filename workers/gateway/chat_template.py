"""Chat messages to prompt text, by the model's own Jinja template.

The environment follows the conventions of Hugging Face chat templates: blocks are trimmed, loop controls
exist, `tojson` does not escape HTML, `raise_exception` refuses a conversation, `strftime_now` tells the
date. Templates come with a model and are code of others, so they run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from cluster.errors import BrokenModelFolder, InvalidRequest

Message = Mapping[str, object]
"""One chat message: `role`, `content` and whatever else the model's template reads."""


class ChatTemplate:
    """The chat templates of one model folder, compiled: usually one, sometimes another for tools.

    `special_tokens` (`bos_token`, `eos_token`, ...) are variables of every rendering.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        environment = _environment()
        try:
            self._compiled = {name: environment.from_string(text) for name, text in templates.items()}
        except jinja2.TemplateSyntaxError as error:
            raise BrokenModelFolder(f"the chat template of {origin} does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._origin = origin

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt for `messages`; it contains its own special tokens, so encode it without adding any.

        Raises `InvalidRequest` where the model has no template or its template refuses the messages.
        """
        try:
            return self._choose(tools is not None).render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            # A template meets whatever shape the messages have; what it stumbles over is theirs to change.
            message = f"the model's chat template does not accept these messages: {error}"
            raise InvalidRequest(message) from error

    def _choose(self, with_tools: bool) -> jinja2.Template:
        if with_tools and "tool_use" in self._compiled:
            return self._compiled["tool_use"]
        if "default" in self._compiled:
            return self._compiled["default"]
        raise InvalidRequest(
            f"the model in {self._origin} has no chat template, so it does not take messages: send a prompt"
        )


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, object]) -> dict[str, str]:
    """The folder's chat templates by name; empty where it has none.

    Template files (`chat_template.jinja`, `additional_chat_templates/*.jinja`) go before the entry
    `chat_template` of tokenizer_config.json, which is one text or a list of named ones.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    entry = tokenizer_config.get("chat_template")
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    try:
        return {str(named["name"]): str(named["template"]) for named in cast("list[dict[str, str]]", entry)}
    except (TypeError, LookupError) as error:
        path = folder / "tokenizer_config.json"
        message = f"{path}: chat_template is neither a text nor a list of name and template"
        raise BrokenModelFolder(message) from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; serving only prints them."""

    tags = {"generation"}  # noqa: RUF012  the attribute's type is Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The tag's body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., object]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(functions)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(date_format: str) -> str:
    return datetime.now().strftime(date_format)
