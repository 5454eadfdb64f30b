"""nbval on the pages where it is worth its time: those that changed, and a rotating eighth of the rest.

As a pytest plugin (`-p paperbook.nbval`) this module also lets pass what nbval cannot know about: a verdict that stands
near its threshold, or that depends on the machine.
"""

import datetime
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from nbformat import NotebookNode

from paperbook.catalog import Paper, load_catalog
from paperbook.execute import THREADS, TIME_LIMIT
from paperbook.verdicts import changes, claims_data

SHARES = 8
FLIPS = pytest.StashKey[list[str]]()


def choose(root: Path, *, base: str | None = None, turn: int | None = None) -> list[str]:
    """The slugs of the pages whose notebook or module changed since ``base``, and of every eighth other page.

    ``base`` is by default where this branch left `origin/main`, else the previous commit; where git knows neither, all
    pages count as changed. ``turn`` says which eighth; by default it goes round day by day.
    """
    pages = load_catalog(root).with_page(root)
    changed = changed_files(root, base)
    if changed is None:
        return [paper.slug for paper in pages]
    turn = datetime.date.today().toordinal() if turn is None else turn
    return [
        paper.slug
        for place, paper in enumerate(pages)
        if place % SHARES == turn % SHARES or {str(paper.notebook), str(paper.module)} & changed
    ]


def changed_files(root: Path, base: str | None = None) -> set[str] | None:
    """What differs from ``base``, with what git does not track yet; None if there is nothing to compare with."""
    left, head = _git(root, "merge-base", "HEAD", "origin/main"), _git(root, "rev-parse", "HEAD")
    here = left == head  # on main itself, or in a fresh clone of it: the last commit is what is new
    for candidate in filter(None, [base] if base else [None if here else left, "HEAD~1"]):
        names = _git(root, "diff", "--name-only", "--relative", candidate.strip())
        if names is not None:
            return {*names.splitlines(), *(_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()}
    return None


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def run(root: Path, papers: Sequence[Paper]) -> bool:
    """Run nbval over these pages; True if all pass."""
    library = os.pathsep.join([str(root / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PAPERLAB_PRESS": "1", "PYTHONPATH": library}
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "-p", "paperbook.nbval"]
    command += ["-p", "no:cacheprovider", "--timeout", "0", "--nbval-cell-timeout", str(TIME_LIMIT["pocket"])]
    return not subprocess.run(
        [*command, *(str(paper.notebook) for paper in papers)], cwd=root, env=environment
    ).returncode


# --- the plugin ------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a failed comparison into a pass if every difference has an excuse in the data of the same run's ledger."""
    report = yield
    outputs = getattr(item, "test_outputs", None)
    if call.when != "call" or outputs is None:
        return report
    claims = item.parent.stash.setdefault(CLAIMS, [])
    claims += claims_data(outputs)
    if report.failed and _only_text(outputs) and _only_text(item.cell.outputs):
        found = changes(_text(item.cell.outputs), _text(outputs), claims)
        if found and all(change.excuse for change in found):
            report.outcome, report.longrepr = "passed", None
            item.config.stash.setdefault(FLIPS, []).extend(f"{item.path.stem}: {change}" for change in found)
    return report


CLAIMS = pytest.StashKey[list[dict]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which flips passed."""
    for flip in config.stash.get(FLIPS, []):
        terminalreporter.write_line(flip)


def _only_text(outputs: Sequence[NotebookNode]) -> bool:
    return all(output["output_type"] == "stream" for output in outputs)


def _text(outputs: Sequence[NotebookNode]) -> str:
    return "".join(output["text"] for output in outputs)
