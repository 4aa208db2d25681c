"""Typed access to the JSON files of a model folder; every complaint names file, key and value."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import BrokenModelFolder

JSON_BYTES_MAX = 64 * 2**20
"""No JSON of a model folder we read is larger; a larger one is not what its name says."""


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """One JSON object of a model folder. A key with the value null counts as absent."""

    path: Path
    values: dict[str, object]

    @classmethod
    def open(cls, path: Path) -> ConfigReader:
        """Read the object in `path`; raises `BrokenModelFolder`."""
        try:
            if path.stat().st_size > JSON_BYTES_MAX:
                raise BrokenModelFolder(f"{path} is larger than {JSON_BYTES_MAX} bytes: download it again")
            values = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise BrokenModelFolder(
                f"{path} is missing: name a Hugging Face model folder, with config.json and *.safetensors"
            ) from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BrokenModelFolder(f"{path} cannot be read ({error}): download it again") from error
        if not isinstance(values, dict):
            raise BrokenModelFolder(f"{path} must hold a JSON object: download it again")
        return cls(path, values)

    def nested(self, key: str) -> ConfigReader:
        """The object under `key`; empty if absent."""
        value = self.values.get(key)
        if value is None:
            return ConfigReader(self.path, {})
        if not isinstance(value, dict):
            raise self.broken(key, "must be an object")
        return ConfigReader(self.path, value)

    def broken(self, key: str, what: str) -> BrokenModelFolder:
        """The error for a key with a wrong value."""
        return BrokenModelFolder(f"{self.path}: {key} is {self.values.get(key)!r}, {what}: correct the file")

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer of at least `low`; without a default the key is required."""
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.broken(key, f"must be an integer of at least {low}")
        return value

    def integer_or_none(self, key: str) -> int | None:
        """A positive integer, or None if absent."""
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number above `low`; without a default the key is required."""
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.broken(key, "must be a number")
        if not math.isfinite(value) or value <= low:
            raise self.broken(key, f"must be finite and above {low:g}")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """A finite positive number, or None if absent."""
        return None if self.values.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.broken(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.broken(key, "must be a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of non-negative integers, one alone counting as a list of one; empty if absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.broken(key, "must be a non-negative integer or a list of them")
        return tuple(items)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.broken(key, "must be a list of strings")
        return tuple(value)
