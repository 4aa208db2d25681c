"""Style as tests: sizes, names, docstrings, and what must not be in the tree."""

import ast
import re
from pathlib import Path

import pytest

from tests.tidy.source import PACKAGES, ROOT, functions, length, tracked, tree

PYTHON = tracked(".py")
OURS = tuple(path for path in PYTHON if path.parts[0] in PACKAGES)


def test_no_function_is_longer_than_70_lines() -> None:
    """A function fits on a screen."""
    long = [
        f"{path}:{node.name} {length(node)}"
        for path in PYTHON
        for node in functions(path)
        if length(node) > 70
    ]
    assert long == []


def test_nine_functions_in_ten_are_under_35_lines() -> None:
    """Most functions are short."""
    sizes = sorted(length(node) for path in OURS for node in functions(path))
    assert sizes[len(sizes) * 9 // 10] < 35


def test_no_file_is_longer_than_400_lines() -> None:
    """A file holds one idea."""
    sizes = {str(path): (ROOT / path).read_text().count("\n") for path in PYTHON}
    assert {path: size for path, size in sizes.items() if size > 400} == {}


def test_no_module_is_named_after_nothing() -> None:
    """A name says what is inside."""
    empty_names = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [
        str(path) for path in PYTHON if path.stem in empty_names or set(path.parts[:-1]) & empty_names
    ] == []


@pytest.mark.parametrize("path", OURS, ids=str)
def test_public_things_have_docstrings(path: Path) -> None:
    """Every public module, class and function says what it is, those of protocols and classes included."""
    bare = [] if ast.get_docstring(tree(path)) else [f"{path}: module"]
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
            continue
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not child.name.startswith("_") and not ast.get_docstring(child):
                bare.append(f"{path}:{child.lineno} {child.name}")
    assert bare == []


def test_nothing_is_left_for_later() -> None:
    """No reminders and no stubs in the tree."""
    words = re.compile(
        r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b"
    )
    paths = tracked(".py", ".proto", ".md", ".toml", ".yaml")
    assert [str(path) for path in paths if words.search((ROOT / path).read_text())] == []


def test_no_exception_is_swallowed() -> None:
    """An `except` does something, or `contextlib.suppress` names what is expected."""
    found = [
        f"{path}:{node.lineno}"
        for path in PYTHON
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
    ]
    assert found == []


def test_no_path_of_one_machine() -> None:
    """Nothing in the tree points at a place that exists on one machine only."""
    places = re.compile(
        r"(?<![\w.])/(" + "|".join(("wo" + "rk", "ho" + "me", "far" + "m", "ro" + "ot")) + r")/"
    )
    paths = tracked(".py", ".md", ".toml", ".yaml", ".proto", ".sh", "")
    assert [str(path) for path in paths if places.search((ROOT / path).read_text(errors="replace"))] == []


def test_every_test_states_its_claim() -> None:
    """A test's docstring is the claim it checks."""
    bare = [
        f"{path}:{node.lineno} {node.name}"
        for path in PYTHON
        if path.parts[0] == "tests"
        for node in functions(path)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert bare == []


def test_the_contract_folder_is_no_package() -> None:
    """`proto/` stays out of Python's way, so that Google's package of that name stays importable."""
    assert list((ROOT / "proto").rglob("__init__.py")) == []
