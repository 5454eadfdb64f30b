"""Rendering a tiny book with the real Sphinx: what it makes, what it leaves alone, and how it fails."""

import shutil
from pathlib import Path

import nbformat
import pytest
from pybtex.database import parse_string

from paperbook.errors import PressError
from paperbook.site import build, check_site, render, vendor
from paperbook.site.sphinx_ext import AuthorYearLabels

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ("notebooks/memory/alpha", "notebooks/memory/beta", "book/api/index", "book/references")
TOC = "format: jb-book\nroot: book/index\nchapters:\n" + "".join(f"- file: {name}\n" for name in CHAPTERS)
INDEX = "# A tiny book\n\n{{ totals }}\n\n**{{ papers }}** papers, **{{ pages }}** pages.\n\n{{ cards }}\n"


def notebook(title: str, text: str) -> nbformat.NotebookNode:
    """A page with a formula and a figure."""
    picture = '<img class="paperlab-figure" alt="A picture of it" src="data:image/webp;base64,QUJD">'
    outputs = [nbformat.v4.new_output("display_data", data={"text/html": picture})]
    cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\n{text} $x^2$ {{cite}}`alpha`\n\n## The problem\n\nSmall."),
             nbformat.v4.new_code_cell("show(fig)", outputs=outputs)]  # fmt: skip
    for k, cell in enumerate(cells):
        cell["id"] = f"cell-{k}"
    return nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


@pytest.fixture
def book(tiny_book):
    """A book of two pages with stand-ins for the vendored scripts."""
    for name in vendor.ASKED:
        shutil.copy(ROOT / "book" / name, tiny_book / "book")
    shutil.copy(ROOT / "_config.yml", tiny_book)
    shutil.copytree(ROOT / "book" / "_static", tiny_book / "book" / "_static")
    (tiny_book / "_toc.yml").write_text(TOC)
    (tiny_book / "book" / "index.md").write_text(INDEX)
    (tiny_book / "book" / "references.md").write_text("# References\n\n```{bibliography}\n```\n")
    (tiny_book / "book" / "ledger.md").write_text("---\norphan: true\n---\n# Ledger\n")
    (tiny_book / "book" / "references.bib").write_text(
        "@article{alpha, title = {T}, author = {Ada Lovelace}, year = {1843}, journal = {J}}\n")  # fmt: skip
    module = tiny_book / "lib" / "paperlab" / "memory" / "alpha.py"
    module.parent.mkdir(parents=True)
    module.write_text('"""The method."""\n\n\ndef step(x):\n    r"""One step, $x^2$."""\n')
    scripts = tiny_book / "_build" / "scripts" / "vendor" / "mathjax" / "es5"
    scripts.mkdir(parents=True)
    (scripts / "tex-mml-chtml.js").write_text("// stands in for MathJax\n")
    (tiny_book / "_build" / "vendor.stamp").write_text(vendor.fingerprint(tiny_book))
    put(tiny_book, "alpha", notebook("The first works", "Zebrafish."))
    put(tiny_book, "beta", notebook("The second does not", "Okapi."))
    return tiny_book


def put(book: Path, slug: str, page: nbformat.NotebookNode) -> None:
    """Place a notebook and its execution."""
    for path in (book / "notebooks" / "memory", book / "_build" / "executed" / "memory"):
        path.mkdir(parents=True, exist_ok=True)
        nbformat.write(page, path / f"{slug}.ipynb")


def go(book: Path, **options) -> Path:
    """Render it."""
    html = book / "_build" / "html"
    render(book, book / "_build" / "executed", html, **options)
    return html


def times(html: Path) -> dict[str, int]:
    """When each page was written."""
    pages = (path for path in html.rglob("*.html") if "_static" not in path.parts)
    return {path.relative_to(html).as_posix(): path.stat().st_mtime_ns for path in pages}


def test_a_book_from_notebooks_to_a_clean_site(book, capsys):
    html = go(book)
    assert check_site(html) == []
    page = (html / "notebooks/memory/alpha.html").read_text()
    assert "Ada Lovelace" in page
    assert 'href="../../api/memory/alpha.html#paperlab-memory-alpha"' in page
    assert 'href="../../notebooks/memory/alpha.html"' in (html / "api/memory/alpha.html").read_text()
    assert (html / "notebooks/memory/alpha.ipynb").exists()
    assert "Lovelace, 1843" in page
    assert "Lovelace, 1843" in (html / "references.html").read_text()  # not a number
    assert "<strong>2</strong> papers, <strong>2</strong> pages" in (html / "index.html").read_text()
    said = capsys.readouterr().out
    assert "2 pages" in said
    assert "WARNING" not in said

    # Nothing changed: no page is written again, and Sphinx is not even asked.
    before = times(html)
    go(book)
    assert times(html) == before
    assert "nothing changed" in capsys.readouterr().out

    # A page of the site was lost: it comes back.
    (html / "notebooks/memory/alpha.html").unlink()
    go(book)
    assert times(html).keys() == before.keys()
    before = times(html)

    # One page changed: it is written, with the page whose contents list it and the two that Sphinx always writes.
    put(book, "beta", notebook("The second does not", "Quagga."))
    go(book, slugs=["beta"])
    after = times(html)
    changed = {name for name in after if after[name] != before[name]}
    assert changed - {"genindex.html", "search.html"} == {"notebooks/memory/beta.html", "index.html"}
    assert "Quagga" in (html / "notebooks/memory/beta.html").read_text()

    # Killed half way: the stamp is missing, a page is half written; the next build mends it.
    whole = (html / "notebooks/memory/alpha.html").read_text()
    (html / "notebooks/memory/alpha.html").write_text(whole[:1000])
    (book / "_build" / "site.stamp").unlink()
    go(book)
    assert (html / "notebooks/memory/alpha.html").read_text() == whole

    # A page that was taken out leaves the site's contents, and its address, though its execution still lies there.
    (book / "notebooks" / "memory" / "beta.ipynb").unlink()
    go(book)
    assert "not executed and therefore left out: notebooks/memory/beta" in capsys.readouterr().out
    assert "memory/beta.html" not in (html / "index.html").read_text()
    assert not (html / "notebooks/memory/beta.html").exists()
    assert check_site(html) == []


def test_without_npm_pages_load_from_a_cdn_and_the_check_says_so(book, monkeypatch):
    shutil.rmtree(book / "_build" / "scripts")
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    problems = check_site(go(book))
    assert problems
    assert all("third-party reference: https://cdn.jsdelivr.net/npm/mathjax" in problem for problem in problems)


def test_nothing_executed_is_an_error_that_says_what_to_do(book):
    shutil.rmtree(book / "_build" / "executed")
    with pytest.raises(PressError, match="run `python -m paperbook execute` first"):
        go(book)
    with pytest.raises(PressError, match="no executed notebook of beta"):
        go(book, slugs=["beta"])


def test_prose_that_asks_for_something_unknown_is_an_error(book):
    (book / "book" / "index.md").write_text("# T\n\n{{ total }}\n")
    with pytest.raises(PressError, match=r"book/index\.md asks for \{\{ total \}\}"):
        go(book)


def test_a_stage_that_cannot_be_written_is_an_error_with_advice(book):
    (book / "_build" / "stage").write_text("in the way")
    with pytest.raises(PressError, match=r"cannot write .*stage"):
        go(book)


def test_sphinx_failing_is_an_error_with_its_last_words(book):
    (book / "_toc.yml").write_text("format: jb-book\nroot: book/nowhere\n")
    with pytest.raises(PressError, match=r"(?s)Sphinx could not render.*nowhere"):
        go(book)
    assert not (book / "_build" / "site.stamp").exists()


def test_labels_name_up_to_two_authors_and_tell_equal_ones_apart():
    works = parse_string(
        """@article{a, author = {Lee, Ann and van Dyk, Bo}, year = {2020}}
        @article{b, author = {{\\'E}mile, Jo and Lee, Ann and Kim, Chris}, year = {2021}}
        @article{c, author = {{\\'E}mile, Jo and Kim, Chris and Lee, Ann}, year = {2021}}
        @article{d, author = {Lee, Ann}, year = {2020}}""",
        "bibtex",
    )
    labels = list(AuthorYearLabels().format_labels(works.entries.values()))
    assert labels == ["Lee and van Dyk, 2020", "Émile et al., 2021", "Émile et al., 2021b", "Lee, 2020"]


def test_paths_of_the_repository_become_paths_of_the_stage():
    assert build._from_root("file: book/index\nlogo: book/_static/x") == "file: index\nlogo: _static/x"
    assert build._from_root("https://x.example/jupyter-book/y") == "https://x.example/jupyter-book/y"


@pytest.mark.parametrize(
    ("source", "folded"),
    [
        ("x = 1\n" * 12 + 'show(fig, alt="…")', True),
        ("x = 1\n" * 5 + 'show(fig, alt="…")', False),  # short enough to stand open
        ("if x:\n" + "    x = 1\n" * 12 + '    show(fig, alt="…")', True),
        ("x = 1\n" * 20, False),  # an experiment, no picture
        ('say("It is {a}.",\n    a=1)', True),  # a sentence
        ('a = 1\nsay("It is {a}.", a=a)', False),
    ],
)
def test_long_code_of_figures_is_folded(source, folded):
    assert build._is_plotting(source) == folded
