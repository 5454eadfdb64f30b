"""Execution and rendering of the whole book: the press against `jupyter-book build`."""

from paperbook.bench import run

__all__ = ["run"]
