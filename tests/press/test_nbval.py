"""Which pages nbval runs on, and what it lets pass."""

import subprocess

import nbformat
import pytest

from paperbook.catalog import load_catalog
from paperbook.nbval import choose, run
from support import write_page

SLUGS = [f"page-{k:02d}" for k in range(20)]


@pytest.fixture
def repository(tiny_book):
    """Twenty pages, committed."""
    with (tiny_book / "book" / "catalog" / "memory.yml").open("a") as catalog:
        catalog.writelines(f"- slug: {slug}\n  title: {slug}\n  year: 2022\n" for slug in SLUGS)
    for slug in SLUGS:
        write_page(tiny_book, slug)
    for name in ("page_03", "page_04"):
        module = tiny_book / "lib" / "paperlab" / "memory" / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("x = 1\n")
    git(tiny_book, "init", "-q", "-b", "main")
    commit(tiny_book)
    return tiny_book


def git(root, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "a")


def test_without_a_base_all_pages_count_as_changed(repository):
    assert choose(repository) == SLUGS  # the first commit has none before it


def test_every_page_has_its_turn_within_eight(repository):
    commit(repository)
    turns = [choose(repository, turn=turn) for turn in range(8)]
    assert sorted(slug for turn in turns for slug in turn) == SLUGS
    assert {len(turn) for turn in turns} == {2, 3}
    assert choose(repository, turn=8) == turns[0]


def test_pages_whose_notebook_or_module_changed_are_always_chosen(repository):
    commit(repository)
    (repository / "lib" / "paperlab" / "memory" / "page_03.py").write_text("x = 2\n")  # not committed
    commit_of = write_page(repository, "page-05", nbformat.v4.new_markdown_cell("new"))
    git(repository, "add", str(commit_of))
    assert choose(repository, turn=0) == ["page-00", "page-03", "page-05", "page-08", "page-16"]
    commit(repository)
    (repository / "notebooks" / "memory" / "page-07.ipynb").rename(repository / "moved.ipynb")
    write_page(repository, "page-07", nbformat.v4.new_markdown_cell("new"))
    assert choose(repository, turn=0) == ["page-00", "page-03", "page-05", "page-07", "page-08", "page-16"]
    assert choose(repository, base="HEAD", turn=0) == ["page-00", "page-07", "page-08", "page-16"]


def test_outside_git_all_pages_count_as_changed(tiny_book, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tiny_book.parent))
    write_page(tiny_book, "alpha")
    assert choose(tiny_book) == ["alpha"]


DATA = "{{'application/vnd.paperlab.claims+json': {{'claims': [{{'id': 'C1', 'near': {near}, 'machine': False}}]}}}}"


def flipped(near):
    """A page that prints another verdict than is committed."""
    source = "# NBVAL_CHECK_OUTPUT\nprint('C1 inconclusive')"
    committed = [nbformat.v4.new_output("stream", name="stdout", text="C1 supported\n")]
    return [
        nbformat.v4.new_code_cell(f"from IPython.display import display\ndisplay({DATA.format(near=near)}, raw=True)"),
        nbformat.v4.new_code_cell(source, outputs=committed, execution_count=1),
    ]


def test_a_flip_passes_exactly_if_it_is_near_its_threshold(tiny_book, capfd):
    write_page(tiny_book, "alpha", *flipped(near=True))
    write_page(tiny_book, "beta", *flipped(near=False))
    alpha, beta = load_catalog(tiny_book).papers
    assert not run(tiny_book, [alpha, beta])
    said = capfd.readouterr().out
    assert "alpha: C1: committed 'supported', now 'inconclusive' (passes: near its threshold)" in said
    assert "1 failed, 3 passed" in said
    assert "beta.ipynb::Cell 1" in said


def test_a_cell_that_raises_never_passes(tiny_book, capfd):
    cells = flipped(near=True)
    cells[1].source += "\n1 / 0"
    write_page(tiny_book, "alpha", *cells)
    assert not run(tiny_book, load_catalog(tiny_book).papers[:1])
    assert "ZeroDivisionError" in capfd.readouterr().out
