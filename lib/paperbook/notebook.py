"""What a committed notebook keeps: the text of its checked cells, and no other output.

A checked cell starts with `# NBVAL_CHECK_OUTPUT`. Its output is committed, so that a change of a verdict shows in a
diff; everything else is a product of the build. `strip` is the pre-commit hook, `accept` copies the checked outputs of
an executed notebook into its source.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

CHECK = "# NBVAL_CHECK_OUTPUT"


class NotebookError(ValueError):
    """A file that is not a notebook, or two notebooks that do not belong together."""


def read(path: Path) -> NotebookNode:
    """The notebook in ``path``.

    Raises:
        NotebookError: the file is missing or not a valid notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise NotebookError(f"{path} does not exist") from None
    except Exception as error:  # nbformat raises half a dozen unrelated types for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotebookError(f"{path} is not a valid notebook: {reason[:200]}") from None
    return notebook


def is_checked(cell: NotebookNode) -> bool:
    """Is the cell's output committed and compared?"""
    return cell.cell_type == "code" and CHECK in cell.source


def checked_text(notebook: NotebookNode) -> list[str]:
    """The text that each checked cell printed."""
    return [
        "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if is_checked(cell)
    ]


def strip(notebook: NotebookNode) -> NotebookNode:
    """Remove every output but those of checked cells, execution counts, and what editors and papermill leave behind."""
    count = 0
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in ("tags", "mystnb")})
        if cell.cell_type != "code":
            continue
        if is_checked(cell) and cell.outputs:
            count += 1
            cell.execution_count = count  # nbval takes a checked cell without one for a cell that was never run
        else:
            cell.outputs, cell.execution_count = [], None
    kept = {k: v for k, v in notebook.metadata.items() if k == "kernelspec"}
    notebook.metadata = NotebookNode({**kept, "language_info": {"name": "python"}})
    return notebook


def accept(source: Path, executed: Path) -> bool:
    """Copy the checked outputs of ``executed`` into ``source``; True if the file changed.

    Raises:
        NotebookError: the two do not have the same checked cells.
    """
    committed, fresh = read(source), read(executed)
    old = [cell for cell in committed.cells if is_checked(cell)]
    new = [cell for cell in fresh.cells if is_checked(cell)]
    if [cell.source for cell in old] != [cell.source for cell in new]:
        raise NotebookError(f"{source} and {executed} do not have the same checked cells: execute the page again")
    before = source.read_text()
    for mine, theirs in zip(old, new, strict=True):
        mine.outputs = [
            nbformat.v4.new_output("stream", name="stdout", text=output.text)
            for output in theirs.outputs
            if output.output_type == "stream" and output.name == "stdout"
        ]
    after = nbformat.writes(strip(committed)) + "\n"
    source.write_text(after)
    return after != before


def strip_file(path: Path) -> bool:
    """Strip the notebook in place; True if that changed the file."""
    before = path.read_text()
    after = nbformat.writes(strip(read(path))) + "\n"
    path.write_text(after)
    return after != before


def main(argv: list[str] | None = None) -> int:
    """`strip FILE…` (exit 1 if a file changed, as pre-commit wants it) and `accept SOURCE EXECUTED`."""
    parser = argparse.ArgumentParser(prog="python -m paperbook.notebook", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("strip", help="remove outputs that are not committed").add_argument(
        "files", nargs="+", type=Path
    )
    accepting = commands.add_parser("accept", help="commit the checked outputs of an executed notebook")
    accepting.add_argument("source", type=Path)
    accepting.add_argument("executed", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "accept":
            print(f"{args.source}: {'updated' if accept(args.source, args.executed) else 'unchanged'}")
            return 0
        changed = [path for path in args.files if strip_file(path)]
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 2
    for path in changed:
        print(f"stripped {path}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
