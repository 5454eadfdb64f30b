"""The comparison of verdicts: a flip near its threshold passes, any other difference fails."""

import nbformat
import pytest

from paperbook.catalog import load_catalog
from paperbook.claims import MIME
from paperbook.notebook import NotebookError
from paperbook.paths import Build, write_whole
from paperbook.verdicts import Change, changes, check, compare

CHECKED = "# NBVAL_CHECK_OUTPUT\nledger.verdicts()"


def page(text, *, near=(), machine=(), source=CHECKED):
    """A page whose checked cell printed ``text``, with the claims' data that belongs to it."""
    rows = [{"id": f"C{k}", "near": f"C{k}" in near, "machine": f"C{k}" in machine} for k in range(1, 4)]
    table = nbformat.v4.new_output("display_data", {MIME: {"slug": "alpha", "claims": rows}})
    printed = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("ledger.table()", outputs=[table]),
            nbformat.v4.new_code_cell(source, outputs=printed, execution_count=1 if printed else None),
        ]
    )


BEFORE = "C1 supported\nC2 inconclusive\nC3 depends on the machine\n"


def test_the_same_is_no_change():
    assert compare(page(BEFORE), page(BEFORE)) == []
    assert compare(page(BEFORE), page(BEFORE, near=("C1", "C2"))) == []


def test_a_flip_fails_unless_its_measurement_stands_near_the_threshold():
    flipped = page(BEFORE.replace("inconclusive", "supported"))
    assert compare(page(BEFORE), flipped) == [Change("C2", "inconclusive", "supported")]
    near = page(BEFORE.replace("inconclusive", "supported"), near=("C2",))
    assert compare(page(BEFORE), near) == [Change("C2", "inconclusive", "supported", "near its threshold")]
    other = page(BEFORE.replace("inconclusive", "supported"), near=("C1",))
    assert compare(page(BEFORE), other) == [Change("C2", "inconclusive", "supported")]


def test_a_claim_that_came_to_depend_on_the_machine_passes():
    now = page(BEFORE.replace("C1 supported", "C1 depends on the machine"), machine=("C1",))
    assert [change.excuse for change in compare(page(BEFORE), now)] == ["depends on the machine"]


@pytest.mark.parametrize(
    "after",
    [
        BEFORE + "C4 supported\n",
        "C1 supported\n",
        "",
        BEFORE + "and something else\n",
        BEFORE.replace("C2 inconclusive", "Traceback"),
    ],
)
def test_more_or_less_than_verdicts_is_never_excused(after):
    claims = [{"id": f"C{k}", "near": True, "machine": True} for k in range(1, 5)]
    found = changes(BEFORE, after, claims)
    assert found
    assert all(not change.excuse for change in found)


@pytest.mark.parametrize(
    ("committed", "executed", "message"),
    [
        (page(""), page(BEFORE), "not committed yet"),
        (page(BEFORE), page(BEFORE, source=CHECKED + "  # new"), "execute it again"),
        (page(BEFORE, source="1"), page(BEFORE, source="1"), "no checked cell"),
    ],
)
def test_pages_that_cannot_be_compared(committed, executed, message):
    with pytest.raises(NotebookError, match=message):
        compare(committed, executed)


def test_the_whole_book(tiny_book, capsys):
    catalog = load_catalog(tiny_book)

    def put(slug, committed, executed=None):
        write_whole(tiny_book / "notebooks" / "memory" / f"{slug}.ipynb", nbformat.writes(committed))
        if executed:
            write_whole(Build(tiny_book).executed / "memory" / f"{slug}.ipynb", nbformat.writes(executed))

    put("alpha", page(BEFORE), page(BEFORE.replace("inconclusive", "supported"), near=("C2",)))
    put("beta", page(BEFORE), page(BEFORE))
    assert check(tiny_book, catalog.papers)
    said = capsys.readouterr().out
    assert "alpha: C2: committed 'inconclusive', now 'supported' (passes: near its threshold)" in said
    assert "1 of 2 pages say what is committed, 1 flips that may be, 0 wrong" in said
    put("beta", page(BEFORE), page(BEFORE.replace("C1 supported", "C1 contradicted")))
    assert not check(tiny_book, catalog.papers)
    assert "accept beta" in capsys.readouterr().out
    (Build(tiny_book).executed / "memory" / "beta.ipynb").unlink()
    assert not check(tiny_book, catalog.papers)
    assert "beta: it is not executed" in capsys.readouterr().out
