"""Paperbook: the press. What a notebook imports stands here; the rest builds the book from the notebooks."""

from paperbook.claims import Ledger, compare, exact, not_tested, size, trend, within
from paperbook.explore import explore
from paperbook.figures import colors, figure, say, show, show_source
from paperbook.profile import start

__all__ = [
    "Ledger",
    "colors",
    "compare",
    "exact",
    "explore",
    "figure",
    "not_tested",
    "say",
    "show",
    "show_source",
    "size",
    "start",
    "trend",
    "within",
]
