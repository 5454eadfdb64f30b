"""What several test modules need and no fixture can be."""

from pathlib import Path

import nbformat


def write_page(root: Path, slug: str, *cells: str | nbformat.NotebookNode, tags: tuple[str, ...] = ()) -> Path:
    """A notebook in the part "memory" of the checkout ``root``; text is a code cell, ``tags`` are the first cell's."""
    path = root / "notebooks" / "memory" / f"{slug}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [nbformat.v4.new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    if tags:
        made[0].metadata["tags"] = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path
