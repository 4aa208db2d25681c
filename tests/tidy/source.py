"""The project's own files, parsed once: what the style tests look at."""

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("anabranch", "cluster", "controller", "deploy", "workers", "loadgen")


@functools.cache
def tracked(*suffixes: str) -> tuple[Path, ...]:
    """Files git knows (or would: untracked, not ignored), relative to the root, generated stubs left out."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (Path(line) for line in listing.stdout.splitlines())
    return tuple(
        path
        for path in paths
        if path.suffix in suffixes and (ROOT / path).is_file() and path.parts[:2] != ("anabranch", "v1")
    )


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file relative to the root."""
    return ast.parse((ROOT / path).read_text(), str(path))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, nested ones too."""
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last one."""
    return (node.end_lineno or node.lineno) - node.lineno + 1
