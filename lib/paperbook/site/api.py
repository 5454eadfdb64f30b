r"""The API reference: one page a module of `paperlab`, read from its source.

The pages are made from the syntax tree and not by importing: it takes milliseconds, needs no torch, and shows
signatures as their authors broke them into lines. Docstrings keep their ``$…$`` mathematics. Every entry has a label
(its full dotted name), which is how a paper's page links to it, and every page of a paper's module links back.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from paperbook.catalog import Catalog, Paper

FENCE = "`" * 6
WIDTH = 80  # characters of a line of code that fit the column


@dataclass(frozen=True)
class Module:
    """A module of the library and where it stands."""

    name: str
    path: Path
    tree: ast.Module
    source: str

    @property
    def docname(self) -> str:
        """Its page: `api/memory/hopfield` for `paperlab.memory.hopfield`."""
        return "api/" + "/".join(self.name.split(".")[1:]) if "." in self.name else f"api/{self.name}"

    @property
    def gist(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(self.tree) or "").split("\n")[0]

    @property
    def public(self) -> list[ast.FunctionDef | ast.ClassDef]:
        """Its public functions and classes, in the order of the file."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        return [node for node in self.tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def modules(root: Path) -> dict[str, Module]:
    """Every module of `lib/paperlab` that says anything, by its dotted name."""
    found = {}
    for path in sorted((root / "lib" / "paperlab").rglob("*.py")):
        parts = path.relative_to(root / "lib").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text()
        module = Module(name, path.relative_to(root), ast.parse(source), source)
        if module.public:
            found[name] = module
    return found


def _prose(docstring: str | None) -> str:
    """A docstring as MyST: double backticks become single ones, `Raises:` and its kin become lists, addresses links."""
    text, sections = docstring or "", []
    while found := re.search(r"^(Args|Arguments|Returns|Raises|Yields|Attributes):\n((?:[ \t]+.*\n?|\n)+)", text, re.M):
        entries = []
        for line in found[2].rstrip().split("\n"):
            entry = re.match(r" {4}(\w[\w.*, ]*):\s+(.*)", line)
            if entry:
                entries.append(f"`{entry[1]}`: {entry[2]}")
            elif entries:
                entries[-1] += " " + line.strip()
            elif line.strip():
                entries.append(line.strip())
        listed = entries[0] if len(entries) == 1 else "\n\n" + "\n".join(f"- {entry}" for entry in entries)
        sections.append(f"**{found[1]}** {listed}")
        text = text[: found.start()] + text[found.end() :]
    text = re.sub(r"``(.+?)``", r"`\1`", "\n\n".join([text.strip(), *sections]))
    return re.sub(r"(?<![(<`])https?://[^\s<>)`]*[\w/]", r"<\g<0>>", text)


def _split(text: str) -> list[str]:
    """The parts of an argument list, at the commas that stand in no bracket and no string."""
    parts, depth, quoted = [""], 0, ""
    for c in text:
        if quoted or c in "'\"":
            quoted = "" if c == quoted else quoted or c
        depth += (c in "([{") - (c in ")]}") if not quoted else 0
        if c == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += c
    return [re.sub(r"^(\w+: .+?)=", r"\1 = ", part.strip()) for part in parts if part.strip()]


def _signature(node: ast.AST, indent: str = "") -> str:
    """The header of a definition, with a line for each argument if it does not fit into one."""
    rows = [f"{indent}@{ast.unparse(d)}" for d in node.decorator_list]
    if isinstance(node, ast.ClassDef):  # fields and constructor are the signature of a class
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        rows.append(f"class {node.name}{bases}")
        rows += [f"    {ast.unparse(field)}" for field in node.body if isinstance(field, ast.AnnAssign)]
        rows += [_signature(f, "    ") for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        return "\n".join(rows).replace("'", '"')
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _split(ast.unparse(node.args))
    one = f"{indent}def {node.name}({', '.join(arguments)}){result}"
    if len(one) > WIDTH:
        inner = "".join(f"{indent}    {argument},\n" for argument in arguments)
        one = f"{indent}def {node.name}(\n{inner}{indent}){result}"
    return "\n".join([*rows, one]).replace("'", '"')


def _entry(module: Module, node: ast.AST, prefix: str, level: int) -> list[str]:
    name = f"{prefix}.{node.name}"
    rows = [f"({name})=", f"{'#' * level} `{node.name}`", "", "```python", _signature(node), "```", ""]
    rows += [_prose(ast.get_docstring(node)), ""]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                rows += _entry(module, method, name, level + 1)
    return rows


def _listing(title: str, path: Path, source: str) -> list[str]:
    count = len(source.splitlines())
    return [f"## {title}", "", f":::{{dropdown}} {path.as_posix()} ({count} lines)", f"{FENCE}python", source.rstrip(),
            FENCE, ":::", ""]  # fmt: skip


def module_page(root: Path, module: Module, paper: Paper | None) -> str:
    """The MyST source of a module's page, with its source and its tests."""
    tests = root / (paper.tests if paper else _shared_tests(module))
    links = ["[the library](/api/index.md)"]
    if paper:
        links.insert(0, f"[the page: {paper.title}](/{paper.notebook.as_posix()})")
    links.append(f"[source](#source-{module.name})")
    if tests.exists():
        links.append(f"[tests](#tests-{module.name})")
    rows = ["---", "orphan: true", "---", f"({module.name})=", f"# `{module.name}`", "",
            ":::{div} paperlab-byline", " · ".join(links), ":::", ""]  # fmt: skip
    rows += [_prose(ast.get_docstring(module.tree)), ""]
    for node in module.public:
        rows += _entry(module, node, module.name, 2)
    rows += [f"(source-{module.name})=", *_listing("Source", module.path, module.source)]
    if tests.exists():
        rows += [f"(tests-{module.name})=", *_listing("Tests", tests.relative_to(root), tests.read_text())]
    return "\n".join(rows)


def _shared_tests(module: Module) -> Path:
    """Where the tests of a module lie that belongs to no paper: beside `tests/test_stats.py`, or in a folder."""
    *folders, name = module.name.split(".")[1:]
    return Path("tests", *folders, f"test_{name}.py")


def index_page(found: dict[str, Module], catalog: Catalog) -> str:
    """The library's front page: what is shared first, then the papers' modules part by part."""

    def row(module: Module) -> str:
        label = module.name.removeprefix("paperlab.")
        return f"- [`{label}`](/{module.docname}.md): {_prose(module.gist)}"

    of_papers = {paper.module_name for paper in catalog.papers}
    shared = [row(module) for name, module in found.items() if name not in of_papers]
    rows = ["(api)=", "# The library", "",
            "`paperlab` is a normal package: `pip install -e .`, then import what a page uses. It knows nothing of"
            " this book. Shapes stand in the signatures, the equation in the docstring, errors under *Raises*, and"
            " below each module stand its source and its tests.",
            "", "## Shared by all papers", "", *shared, ""]  # fmt: skip
    for part in catalog.parts:
        own = [row(found[paper.module_name]) for paper in part.papers if paper.module_name in found]
        if own:
            rows += [f"## {part.title}", "", *own, ""]
    return "\n".join(rows)
