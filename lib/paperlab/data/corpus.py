"""English and Python that are on every machine with CPython: its manual, its docstrings, its standard library.

Nothing is downloaded and nothing is imported to be read: docstrings come out of the sources' syntax trees. What is held
out is decided by a document's name alone, so that the docstrings of a held-out file are held out together with it.

The texts are those of the interpreter that runs: another minor version of Python has a slightly different library.
"""

import ast
import os
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from paperlab.checks import require_between, require_nonempty
from paperlab.data.held_out import is_held_out

# Not prose and not ordinary code: tests, generated tables, and files that differ between machines.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__phello__"}
LONG = 60  # characters; a paragraph of that length that comes back is a copy


class Document(NamedTuple):
    """A text and where it comes from: a file below the library's folder, or ``topics/NAME`` of the manual."""

    name: str
    text: str


@cache
def _sources() -> tuple[Document, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED and not name.startswith("config-")]
        for file in files:
            if not file.endswith(".py") or file.startswith("_sysconfigdata"):
                continue
            path = Path(folder, file)
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a handful declare another encoding
                continue
            if text.strip():
                found.append(Document(path.relative_to(root).as_posix(), text.replace("\t", "    ")))
    return tuple(sorted(found))


def _docstrings(source: str) -> str:
    """All docstrings of a file, in the order of their places, a blank line between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold escape sequences that newer parsers complain about
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    return "\n\n".join(filter(None, map(ast.get_docstring, _documented(tree))))


def _documented(tree: ast.Module) -> list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, its classes and functions, however deep, in the order of their places.

    Only statements are visited: most of a syntax tree is expressions, which hold none.
    """
    found, waiting = [tree], [tree]
    while waiting:
        node = waiting.pop()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, name, ())
            waiting += inside if isinstance(inside, list) else ()  # the body of a lambda is one expression
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node)
    return [tree, *sorted(found[1:], key=lambda node: (node.lineno, node.col_offset))]


def _without_copies(documents: list[Document]) -> list[Document]:
    """Every long paragraph once, where it first stands.

    The manual's topics contain each other ("compound" holds all of "if"); left in, half of what is held out would
    have been trained on.
    """
    seen: set[str] = set()
    kept = []
    for name, text in documents:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            bare = " ".join(paragraph.split())
            if len(bare) < LONG or bare not in seen:
                paragraphs.append(paragraph)
            seen.add(bare)
        if body := "\n\n".join(paragraphs).strip():
            kept.append(Document(name, body + "\n"))
    return kept


def manual() -> list[Document]:
    """The manual's topics alone, sorted by name: a fifth of `english`, without the seconds that docstrings take.

    Split as `english` is; a paragraph that a docstring holds as well may be missing there.
    """
    return _without_copies(sorted(_topics()))


def _topics() -> list[Document]:
    return [Document(f"topics/{name}", text) for name, text in topics.items()]


@cache
def _english() -> tuple[Document, ...]:
    documents = _topics() + [Document(name, _docstrings(text)) for name, text in _sources()]
    return tuple(_without_copies(sorted(documents)))


def english() -> list[Document]:
    """The manual's topics and the docstrings of the standard library (one document a file), sorted by name."""
    return list(_english())


def python() -> list[Document]:
    """The standard library's source files without its tests and code tables, sorted by name; tabs are four spaces."""
    return list(_sources())


def split(documents: list[Document], held_out: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by name; a larger share holds out a superset of what a smaller one does.

    Raises:
        ValueError: no documents, or ``held_out`` is not within 0 to 1.
    """
    require_nonempty(documents=documents)
    require_between(0, 1, held_out=held_out)
    marked = [(document, is_held_out(document.name, held_out)) for document in documents]
    return [d for d, held in marked if not held], [d for d, held in marked if held]
