"""Paperbook: the press. What a notebook imports stands here; the rest builds the book from the notebooks.

Names are imported when they are first asked for: the command line starts many short processes, and none of them needs
matplotlib.
"""

from importlib import import_module

_HOMES = {
    "paperbook.claims": ("Ledger", "compare", "exact", "not_tested", "size", "trend", "within"),
    "paperbook.figures": ("colors", "figure", "say", "show", "show_source"),
    "paperbook.interactive": ("explore",),
    "paperbook.profile": ("start",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
