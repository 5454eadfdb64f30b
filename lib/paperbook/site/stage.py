"""Staging: the folder that Sphinx reads, assembled from sources, executed notebooks and generated pages.

Sphinx decides by modification time what to read again. Therefore a file is only ever written when its content differs
from what lies there; then rendering one changed page costs seconds, however many pages the book has.
"""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> bool:
    """Write ``content`` unless the file holds it already; True if it was written.

    The file appears whole or not at all, so that a build which is killed here leaves nothing half written.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.replace(path)
    return True


class Stage:
    """The staged files of one build: ``put`` what belongs there, then ``prune`` what no longer does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: set[Path] = set()
        self.written: list[str] = []
        self.removed: list[str] = []

    def put(self, name: str | Path, content: str | bytes) -> None:
        """Stage a file of this content."""
        path = self.folder / name
        if write(path, content):
            self.written.append(str(name))
        self.kept.add(path)

    def keep(self, name: str | Path) -> None:
        """Leave a file as an earlier build staged it."""
        self.kept.add(self.folder / name)

    def prune(self) -> None:
        """Remove what is staged and was neither put nor kept."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in self.kept:
                path.unlink()
                self.removed.append(str(path.relative_to(self.folder)))
