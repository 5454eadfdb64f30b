"""The API reference, made from sources without importing them."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from paperbook.catalog import load_catalog
from paperbook.site import api

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''\
r"""A module that says $x^2$.

More, see https://arxiv.org/abs/2001.00001.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What comes out."""

    value: float
    names: dict[str, "a, b"] = None

    def halved(self, by: int = 2) -> float:
        """The ``value`` divided."""
        return self.value / by

    def _hidden(self):
        pass


def method(x: Float[Tensor, "batch d"], w: tuple[int, ...] = (1, 2), *rest: str, kind: str = "a,b", **more) -> Result:
    r"""Equation 3: $y = \\beta x$.

    Args:
        x: the ``input``, in metres,
            on two lines.
        kind: which one.

    Raises:
        ValueError: ``x`` is not finite.
    """


def _private():
    pass
'''


@pytest.fixture
def book(tiny_book):
    """The tiny book with a module for its first paper."""
    folder = tiny_book / "lib" / "paperlab" / "memory"
    folder.mkdir(parents=True)
    (folder / "alpha.py").write_text(SOURCE)
    (folder / "__init__.py").write_text('"""Nothing public."""\n')
    (folder.parent / "stats.py").write_text('"""Shared by all."""\ndef mean():\n    """M."""\n')
    return tiny_book


def test_a_page_has_every_public_name_its_prose_and_its_links(book):
    modules = api.modules(book)
    assert set(modules) == {"paperlab.memory.alpha", "paperlab.stats"}
    paper = load_catalog(book).paper("alpha")
    page = api.module_page(book, modules["paperlab.memory.alpha"], paper)
    for name in ("", ".Result", ".Result.halved", ".method"):
        assert f"(paperlab.memory.alpha{name})=" in page
    assert "_private" not in page.split("(source-")[0]
    assert "_hidden" not in page.split("(source-")[0]
    assert "/notebooks/memory/alpha.ipynb" in page
    assert r"Equation 3: $y = \beta x$." in page
    assert "<https://arxiv.org/abs/2001.00001>." in page
    assert "**Args** \n\n- `x`: the `input`, in metres, on two lines.\n- `kind`: which one." in page
    assert "**Raises** `ValueError`: `x` is not finite." in page
    assert "(tests-" not in page
    (book / "tests" / "memory").mkdir(parents=True)
    (book / paper.tests).write_text("def test_it(): ...\n")
    assert "def test_it" in api.module_page(book, modules["paperlab.memory.alpha"], paper)


def test_the_index_puts_papers_under_their_part(book):
    page = api.index_page(api.modules(book), load_catalog(book))
    shared, part = page.split("## Associative memories")
    assert "[`stats`](/api/stats.md)" in shared
    assert "[`memory.alpha`](/api/memory/alpha.md): A module that says $x^2$." in part


@pytest.mark.parametrize("node", ast.parse(SOURCE).body[2:], ids=lambda n: n.name)
def test_signatures_parse_back_to_what_they_came_from(node):
    """Python's own parser is the oracle: adding a body gives the same arguments and result."""
    if isinstance(node, ast.ClassDef):
        text = api._signature(node)
        assert text == '@dataclass(frozen=True)\nclass Result\n    value: float\n    names: dict[str, "a, b"] = None'
    else:
        again = ast.parse(api._signature(node) + ": ...").body[0]
        assert ast.dump(again.args) == ast.dump(node.args)
        assert ast.dump(again.returns or ast.Constant(None)) == ast.dump(node.returns or ast.Constant(None))


def test_every_module_of_the_library_has_a_page_with_every_documented_name():
    """Against `inspect`: what a reader can import and use is what the reference lists."""
    import importlib

    found = api.modules(ROOT)
    for name in ("paperlab.stats", "paperlab.checks", "paperlab.training"):
        module = importlib.import_module(name)
        things = inspect.getmembers(module, lambda thing: inspect.isfunction(thing) or inspect.isclass(thing))
        functions = {n for n, thing in things if thing.__module__ == name and not n.startswith("_")}
        assert functions == {node.name for node in found[name].public}
        page = api.module_page(ROOT, found[name], None)
        for function in functions:
            assert f"({name}.{function})=" in page
            first = textwrap.dedent(getattr(module, function).__doc__ or "").strip().split("\n")[0]
            assert api._prose(first) in page
