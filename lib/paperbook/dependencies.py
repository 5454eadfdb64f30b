"""Which files a page's results depend on: the modules of this repository that it imports, and all that these import.

Found by reading, not by importing: it takes milliseconds, and a module that is broken can still be named. Where reading
cannot decide, a file too many is listed rather than one too few: a page then runs again for nothing, but never shows
results of code that is no longer there.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("paperlab", "paperbook")
CODE = {".py", ".pyc", ".pyi"}
DOTTED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
POCKET, SHELF = re.compile(r"pocket-[a-z0-9-]+"), "paperlab.zoo"  # a model of the zoo by its name, and where it stands


def page_files(notebook: Path, library: Path) -> list[Path]:
    """Every file below ``library`` on which the page depends, sorted: its modules, their packages, and their data.

    A file that is no notebook depends on nothing: the press reports it when it tries to run it.
    """
    return files_of(_notebook_imports(notebook), library)


def files_of(names: Iterable[str], library: Path) -> list[Path]:
    """The files behind these dotted names, and behind everything that they import."""
    seen: set[Path] = set()
    waiting = list(names)
    while waiting:
        for path in _locate(waiting.pop(), library):
            if path not in seen:
                seen.add(path)
                if path.suffix == ".py":
                    waiting.extend(_imports_of(path, library, path.stat().st_mtime_ns))
    return sorted(seen)


def _notebook_imports(notebook: Path) -> set[str]:
    """What the code cells import. Lines for IPython (`%`, `!`) do not count, nor a cell that is no Python."""
    names: set[str] = set()
    try:
        cells = json.loads(notebook.read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError):
        return names
    for source in sources:
        plain = re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
        names |= _names(source, package="") or _names(plain, package="")
    return names


@cache
def _imports_of(path: Path, library: Path, _version: int) -> frozenset[str]:
    """What a module imports; ``_version`` makes a changed file a new question.

    The zoo's own modules name every model; only what a page and its module name themselves is loaded.
    """
    package = ".".join(path.relative_to(library).with_suffix("").parts[:-1])
    found = _names(path.read_text(), package)
    return frozenset(name for name in found if package != SHELF or not name.startswith(f"{SHELF}.weights."))


def _names(source: str, package: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    return {name for name in _mentioned(tree, package) if name.partition(".")[0] in PACKAGES}


def _mentioned(tree: ast.AST, package: str) -> Iterator[str]:
    """Every dotted name that is imported anywhere (in functions too), or that a string spells out for a lazy import;
    a string that names a pocket model stands for its weights.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # a module, or a name in one: _locate knows
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and POCKET.fullmatch(node.value):
            yield f"{SHELF}.weights.{node.value}"


def _locate(name: str, library: Path) -> Iterator[Path]:
    """The files that importing ``name`` reads: the `__init__` of each package on the way, the module, its data.

    Beside a module `kernel.py` its data may lie: `kernel.c`, `kernel.npz`. A name that is neither a package nor a
    module may be data alone: `weights/pocket-gpt.safetensors`.
    """
    folder = library
    for part in name.split("."):
        module = folder / f"{part}.py"
        folder = folder / part
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
        elif module.is_file():
            yield module
            yield from (path for path in module.parent.glob(f"{part}.*") if path.suffix not in CODE)
            return
        elif not folder.is_dir():
            yield from folder.parent.glob(f"{part}.*")
            return
