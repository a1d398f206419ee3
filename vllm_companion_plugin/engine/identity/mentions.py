"""What a source file mentions: the modules that it imports, at whatever time, and its texts in quotation marks."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LONGEST = 1024
_VALUES = re.compile("\0+")
_IMPORTING = ("import_module", "__import__")


@dataclass(frozen=True)
class Mentions:
    """What one source file mentions.

    Attributes:
        modules: full names, or names that begin with dots (`from .a import b` is ".a.b", and b may be a module).
        texts: printable texts of one line; a value in an f-string is "*".
    """

    modules: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()


_known: dict[str, tuple[tuple[int, ...], Mentions]] = {}


def mentions_of(path: str) -> Mentions:
    """Return what a file mentions; nothing if it is no Python source. This process parses each version once."""
    try:
        version = version_of(path)
    except OSError:
        return Mentions()
    if _known.get(path, ((),))[0] != version:
        try:
            _known[path] = version, _parsed(path)
        except (OSError, ValueError, SyntaxError, RecursionError):  # Python could not import the file either
            _known[path] = version, Mentions()
    return _known[path][1]


def version_of(path: str) -> tuple[int, ...]:
    """Return what tells two versions of a file apart while a process lives. Raises OSError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _parsed(path: str) -> Mentions:
    modules: set[str] = set()
    texts: set[str] = set()
    for node in ast.walk(ast.parse(Path(path).read_bytes(), path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules.update(_imported(node))
        elif isinstance(node, ast.Call):
            modules.update(_imported_by_name(node))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)):
            texts.add(_text(node))
    return Mentions(frozenset(modules - {""}), frozenset(text for text in texts if 0 < len(text) <= _LONGEST))


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    module = "." * node.level + (node.module or "")
    for alias in node.names:
        yield module if alias.name == "*" else f"{module}{'.' if node.module else ''}{alias.name}"


def _imported_by_name(node: ast.Call) -> Iterator[str]:
    """Yield what a call such as `import_module("a.b")` names; of `import_module(f"a.{name}")` it is "a"."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    if name in _IMPORTING and arguments:
        before, star, _ = _text(arguments[0]).partition("*")
        yield before.rpartition(".")[0] if star else before


def _text(node: ast.expr) -> str:
    """Return a text as written; "" for what is none, or cannot name a file or module."""
    if isinstance(node, ast.JoinedStr):
        # Two stars would mean folders of any depth.
        return _VALUES.sub(
            "*", "".join(_text(part) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        )
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) and value.isprintable() else ""
