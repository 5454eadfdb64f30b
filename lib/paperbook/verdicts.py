"""Do the executed pages say what the committed ones say? The comparison that nbval makes, without a second execution.

A verdict that stands near its threshold may come out otherwise on another processor, and one that wall-clock time
decides may on any. Such a flip is reported and passes; any other difference fails.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from paperbook.catalog import Paper
from paperbook.claims import MIME
from paperbook.notebook import NotebookError, checked_text, is_checked, read
from paperbook.paths import Build

LINE = re.compile(r"(C\d+) (.+)")


@dataclass(frozen=True)
class Change:
    """One claim whose verdict differs. Without an ``excuse`` it is a failure."""

    claim: str
    before: str
    after: str
    excuse: str = ""

    def __str__(self) -> str:
        why = f" (passes: {self.excuse})" if self.excuse else ""
        return f"{self.claim}: committed {self.before!r}, now {self.after!r}{why}"


def changes(before: str, after: str, claims: Iterable[dict] = ()) -> list[Change]:
    """What differs between two texts of a checked cell. ``claims`` is the data that the new run's ledger emitted."""
    old, new = _lines(before), _lines(after)
    excuses = {row["id"]: _excuse(row) for row in claims}
    return [
        Change(
            key,
            old.get(key, "nothing"),
            new.get(key, "nothing"),
            excuses.get(key, "") if key in old.keys() & new else "",
        )
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _excuse(row: dict) -> str:
    return "depends on the machine" if row["machine"] else "near its threshold" if row["near"] else ""


def _lines(text: str) -> dict[str, str]:
    """The verdict of each claim; a line of another form stands for itself, by its number."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.fullmatch(line.strip())
        found.update({match[1]: match[2]} if match else {f"line {number}": line})
    return found


def claims_data(outputs: Iterable[NotebookNode]) -> list[dict]:
    """The claims that ledgers emitted among these outputs."""
    return [row for output in outputs for row in output.get("data", {}).get(MIME, {}).get("claims", ())]


def compare(committed: NotebookNode, executed: NotebookNode) -> list[Change]:
    """What the executed page says otherwise than the committed one.

    Raises:
        NotebookError: the two cannot be compared; says what to run.
    """
    sources = [[cell.source for cell in notebook.cells if is_checked(cell)] for notebook in (committed, executed)]
    if sources[0] != sources[1]:
        raise NotebookError("its checked cells changed since it was executed: execute it again")
    if not sources[0]:
        raise NotebookError(
            "it has no checked cell: end the ledger with `# NBVAL_CHECK_OUTPUT` and `ledger.verdicts()`"
        )
    before, after = checked_text(committed), checked_text(executed)
    if not all(before):
        raise NotebookError("its verdicts are not committed yet: accept them")
    claims = claims_data(output for cell in executed.cells for output in cell.get("outputs", ()))
    return [change for pair in zip(before, after, strict=True) for change in changes(*pair, claims)]


def check(root: Path, papers: Sequence[Paper]) -> bool:
    """Compare all these pages, print what differs, and say whether that passes."""
    wrong, same, flips = [], 0, 0
    for paper in papers:
        executed = Build(root).executed / paper.part / f"{paper.slug}.ipynb"
        try:
            if not executed.exists():
                raise NotebookError("it is not executed: execute it first")
            found = compare(read(root / paper.notebook), read(executed))
        except NotebookError as error:
            print(f"{paper.slug}: {error}")
            wrong.append(paper.slug)
            continue
        for change in found:
            print(f"{paper.slug}: {change}")
        if any(not change.excuse for change in found):
            wrong.append(paper.slug)
        same += not found
        flips += sum(bool(change.excuse) for change in found)
    print(
        f"verdicts: {same} of {len(papers)} pages say what is committed, {flips} flips that may be, {len(wrong)} wrong"
    )
    if wrong:
        print(
            f"  to execute again: python -m paperbook execute {' '.join(wrong)}\n"
            f"  to commit what they say now, if you can explain it: python -m paperbook accept {' '.join(wrong)}"
        )
    return not wrong
