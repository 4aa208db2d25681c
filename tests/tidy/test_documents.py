"""The documents tell the truth about the tree."""

import ast
import re

import pytest
from pydantic import BaseModel

from cluster.config import Config
from tests.tidy.source import ROOT, tree


def _names(path: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree((ROOT / path).relative_to(ROOT))):
        if isinstance(node, ast.ClassDef):
            methods = (n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return names


def test_the_hop_table_names_functions_that_exist() -> None:
    """Every `file.py:function` in ARCHITECTURE.md is in the code."""
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) >= 10
    missing = [
        f"{path}:{name}" for path, name in named if not (ROOT / path).is_file() or name not in _names(path)
    ]
    assert missing == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_documents_name_make_targets_that_exist(document: str) -> None:
    """`make x` in a document is a target of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)", (ROOT / document).read_text()))
    assert named <= targets


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "deploy/helm/anabranch/README.md"]
)
def test_documents_link_to_files_that_exist(document: str) -> None:
    """Relative links lead somewhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
    folder = (ROOT / document).parent
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_runbook_has_a_part_for_each_alert() -> None:
    """And for no other: whoever is woken finds what to do."""
    rules = (ROOT / "deploy/helm/anabranch/templates/monitoring/prometheusrule.yaml").read_text()
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/operations/runbook.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(re.findall(r"alert: (\w+)", rules))


def test_pages_for_operators_name_keys_that_exist() -> None:
    """Every `section.key` of the configuration file in docs/operations is one."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    named = 0
    for page in (ROOT / "docs" / "operations").glob("*.md"):
        for section, key in re.findall(r"`(?:config\.)?([a-z]+)\.([a-z_]+)(?::[^`]*)?`", page.read_text()):
            part = sections.get(section)
            if isinstance(part, type) and issubclass(part, BaseModel) and key != "resources":
                named += 1
                assert key in part.model_fields, f"{page.name}: {section}.{key}"
    assert named > 10


def test_every_configuration_key_is_described() -> None:
    """`anabranch config` prints the descriptions: every key has one, and every section a docstring."""
    bare = []
    for section_name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        assert section.__doc__, section_name
        for key, inner in section.model_fields.items():
            nested = isinstance(inner.annotation, type) and issubclass(inner.annotation, BaseModel)
            if not (inner.description or nested):
                bare.append(f"{section_name}.{key}")
    assert bare == []
