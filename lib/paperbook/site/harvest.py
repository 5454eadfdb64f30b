"""What the executed notebooks say about themselves: headline, claims with their verdicts, and a first picture.

Everything that the book reports about its own pages (ledger, index, totals, cards) starts here, so that no number of it
is typed by hand.
"""

import base64
import html
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nbformat import NotebookNode, v4

from paperbook.catalog import Paper
from paperbook.claims import MIME, VERDICTS
from paperbook.errors import PressError

FIGURE = re.compile(r'<img class="paperlab-figure[^>]*?alt="([^"]*)"[^>]*?src="data:image/(\w+);base64,([^"]+)"')


@dataclass(frozen=True)
class Page:
    """An executed page: its paper, and what its notebook emitted."""

    paper: Paper
    notebook: NotebookNode

    @property
    def docname(self) -> str:
        """The page's name in the book, which is its path without the suffix."""
        return self.paper.notebook.with_suffix("").as_posix()

    @cached_property
    def headline(self) -> str:
        """The first heading: the finding in one sentence."""
        for cell in self.notebook.cells:
            if cell.cell_type == "markdown" and (found := re.search(r"^#\s+(.+?)\s*$", cell.source, re.M)):
                return found[1]
        raise PressError(f"{self.paper.notebook}: no headline; the first cell starts with `# ` and the finding")

    @cached_property
    def claims(self) -> list[dict]:
        """The ledger's rows as `Ledger.table` emitted them; empty for a page that has not come to its ledger."""
        for output in self._outputs:
            data = output.get("data", {}).get(MIME)
            if data and data["slug"] == self.paper.slug:
                return data["claims"]
        return []

    @cached_property
    def verdicts(self) -> Counter:
        """How many claims ended in which verdict, all four always there."""
        return Counter(dict.fromkeys(VERDICTS, 0)) + Counter(row["verdict"] for row in self.claims)

    @cached_property
    def picture(self) -> tuple[bytes, str, str] | None:
        """The page's first figure as (bytes, suffix, description)."""
        for output in self._outputs:
            if found := FIGURE.search(str(output.get("data", {}).get("text/html", ""))):
                return base64.b64decode(found[3]), found[2], html.unescape(found[1])
        return None

    @property
    def _outputs(self) -> list[NotebookNode]:
        return [output for cell in self.notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def harvest(papers: Iterable[Paper], executed: Path) -> list[Page]:
    """Those of the papers that have an executed notebook below ``executed``, in their order.

    Raises:
        PressError: a file there is not a notebook.
    """
    pages = []
    for paper in papers:
        path = executed / paper.part / f"{paper.slug}.ipynb"
        if path.exists():
            try:  # without nbformat's validation: papermill wrote it, and 220 of them would take seconds each time
                pages.append(Page(paper, v4.reads(path.read_text())))
            except (ValueError, KeyError, AttributeError) as error:
                raise PressError(f"{path} is not a notebook ({error}); execute {paper.slug} again") from None
    return pages
