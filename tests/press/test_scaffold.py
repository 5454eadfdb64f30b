"""`new SLUG`: everything that a page needs, and nothing that could pass for finished."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from paperbook.catalog import load_catalog
from paperbook.errors import USAGE, PressError
from paperbook.execute import PageError, execute
from paperbook.notebook import read, strip_file
from paperbook.scaffold import create

ROOT = Path(__file__).parents[2]
TOC = """\
format: jb-book
root: book/index
parts:
- caption: Start
  chapters:
  - file: book/ledger  # a remark that must stay
- caption: The papers
  chapters:
- caption: Reference
  chapters:
  - file: book/references
"""
BIB = "@article{beta,\n  title = {The second paper}\n}\n"


@pytest.fixture
def book(tiny_book):
    (tiny_book / "_toc.yml").write_text(TOC)
    (tiny_book / "book" / "references.bib").write_text(BIB)
    (tiny_book / "lib" / "paperlab").mkdir(parents=True)
    for path in (ROOT / "lib" / "paperlab").glob("*.py"):  # what the press itself needs
        shutil.copy(path, tiny_book / "lib" / "paperlab")
    return tiny_book


def new(root, slug):
    return {str(path) for path in create(root, load_catalog(root), slug)}


def pages_listed(root):
    papers = yaml.safe_load((root / "_toc.yml").read_text())["parts"][1]["chapters"]
    return [(entry["file"], [section["file"] for section in entry["sections"]]) for entry in papers]


def test_all_files_and_entries(book):
    assert new(book, "alpha") == {
        "notebooks/memory/alpha.ipynb", "lib/paperlab/memory/alpha.py", "tests/memory/test_alpha.py",
        "lib/paperlab/memory/__init__.py", "book/parts/memory.md", "_toc.yml", "book/references.bib",
    }  # fmt: skip
    page = read(book / "notebooks" / "memory" / "alpha.ipynb")
    assert not strip_file(book / "notebooks" / "memory" / "alpha.ipynb")  # nothing in it that would not be committed
    code = "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")
    ast.parse(code)
    assert 'ledger.claim("C1", not_tested("TODO"))  # exact: The square $x^2$ is what it is.' in code
    assert 'ledger.claim("C2", not_tested("TODO"))  # compare or trend: It is faster.' in code
    assert "{cite}`alpha`, 2020" in page.cells[0].source
    assert '"""Associative memories: one module a paper."""' in (book / "lib/paperlab/memory/__init__.py").read_text()
    assert "journal = {arXiv:2001.00001}" in (book / "book" / "references.bib").read_text()


def test_entries_stand_once_and_in_the_order_of_the_catalogue(book):
    new(book, "beta")
    assert pages_listed(book) == [("book/parts/memory", ["notebooks/memory/beta"])]
    new(book, "alpha")
    assert pages_listed(book) == [("book/parts/memory", ["notebooks/memory/alpha", "notebooks/memory/beta"])]
    bib = (book / "book" / "references.bib").read_text()
    assert (bib.count("@article{alpha,"), bib.count("@article{beta,")) == (1, 1)
    toc = (book / "_toc.yml").read_text()
    assert toc.startswith(TOC.split("  chapters:\n- caption: Ref")[0])
    assert toc.endswith("- caption: Reference\n  chapters:\n  - file: book/references\n")


def test_nothing_is_overwritten(book):
    (book / "tests" / "memory").mkdir(parents=True)
    (book / "tests" / "memory" / "test_alpha.py").write_text("precious")
    with pytest.raises(PressError, match="tests/memory/test_alpha.py exists already") as caught:
        new(book, "alpha")
    assert caught.value.code == USAGE
    assert not (book / "notebooks").exists()
    with pytest.raises(PressError, match="did you mean alpha"):
        new(book, "alfa")


def test_a_table_of_contents_without_its_section(book):
    (book / "_toc.yml").write_text("format: jb-book\n")
    with pytest.raises(PressError, match="The papers"):
        new(book, "alpha")


def test_the_scaffold_neither_runs_nor_passes_its_test_nor_the_contract(book):
    new(book, "alpha")
    with pytest.raises(PageError, match="NotImplementedError: TODO: the experiment"):
        execute(book / "notebooks" / "memory" / "alpha.ipynb")
    (book / "requirements.txt").write_text("numpy==2.4.6\n")
    contract = book / "tests" / "test_contract.py"
    contract.write_text((ROOT / "tests" / "test_contract.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=book, capture_output=True, text=True)
    assert done.returncode == 1
    failed = {line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed >= {
        "test_against_an_oracle",
        "test_every_claim_is_measured_and_committed_with_its_verdict[alpha]",
        "test_a_module_can_be_read_in_one_sitting[alpha]",
    }
