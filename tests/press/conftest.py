"""A book small enough to test the press on."""

from pathlib import Path

import pytest

ORDER = "parts:\n- memory\n"
MEMORY = """\
part: memory
title: Associative memories
papers:
- slug: alpha
  title: The first paper
  year: 2020
  arxiv: "2001.00001"
  summary: A first summary.
  claims:
  - id: C1
    kind: exact
    text: The square $x^2$ is what it is.
  - id: C2
    kind: [compare, trend]
    text: It is faster.
    paper: "2 times"
- slug: beta
  title: The second paper
  year: 2021
"""


@pytest.fixture
def tiny_book(tmp_path: Path) -> Path:
    """A checkout with a catalogue of two papers and no pages."""
    folder = tmp_path / "book" / "catalog"
    folder.mkdir(parents=True)
    (folder / "order.yml").write_text(ORDER)
    (folder / "memory.yml").write_text(MEMORY)
    return tmp_path
