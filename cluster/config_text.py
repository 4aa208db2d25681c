"""The configuration file with every key, its default and what it is: what `anabranch config` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import yaml
from pydantic.fields import FieldInfo

from cluster.config import Config
from cluster.config_section import Section
from cluster.config_values import parse_bytes

_WIDTH = 100
_INDENT = "  "
_UNITS = ("TiB", "GiB", "MiB", "KiB")


def commented(config: Config) -> str:
    """A YAML file that loads to `config`, with a comment above each section and key."""
    return "\n".join(_section(config, "")) + "\n"


def default_of(dotted: str) -> str:
    """A key's default as the file shows it. `dotted` must name a key."""
    section: object = Config()
    *names, key = dotted.split(".")
    for name in names:
        section = getattr(section, name)
    assert isinstance(section, Section)
    return _value(type(section).model_fields[key], getattr(section, key))


def _section(section: Section, indent: str) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            if not indent:
                yield ""
            yield from _comment(type(value).__doc__ or "", indent)
            yield f"{indent}{key}:"
            yield from _section(value, indent + _INDENT)
        else:
            yield from _comment(field.description or "", indent)
            yield f"{indent}{key}: {_value(field, value)}"


def _comment(text: str, indent: str) -> list[str]:
    first = text.strip().partition("\n")[0]
    return textwrap.wrap(first, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _value(field: FieldInfo, value: object) -> str:
    """A value on one line, in YAML; sizes in the largest unit that divides them."""
    if isinstance(value, int) and any(getattr(item, "func", None) is parse_bytes for item in field.metadata):
        return _size(value)
    plain = [_plain(item) for item in value] if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10**6)).removesuffix("\n...\n").strip()


def _plain(item: object) -> object:
    return item.model_dump(mode="json") if isinstance(item, Section) else item


def _size(count: int) -> str:
    for power, unit in zip((4, 3, 2, 1), _UNITS, strict=True):
        if count and count % 1024**power == 0:
            return f"{count // 1024**power}{unit}"
    return str(count)
