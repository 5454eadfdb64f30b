"""`new SLUG`: the three files of a paper, with the fixed sections and the catalogue's claims, and where it is listed.

What it writes does not pass the contract, and the page does not run: nothing of it can be mistaken for a finished page.
"""

import re
import textwrap
from pathlib import Path

import nbformat

from paperbook.catalog import Catalog, CatalogError, Paper
from paperbook.errors import USAGE, PressError
from paperbook.notebook import CHECK
from paperbook.paths import write_whole

PAPERS = "- caption: The papers\n"  # the section of _toc.yml that follows from the catalogue
TODO = "TODO"


def create(root: Path, catalog: Catalog, slug: str) -> list[Path]:
    """Write the files of the paper ``slug``; every path that was written, relative to ``root``.

    Raises:
        PressError: the catalogue has no such paper, or one of its three files exists.
    """
    try:
        paper = catalog.paper(slug)
    except CatalogError as error:
        raise PressError(str(error), USAGE) from None
    for path in (paper.notebook, paper.module, paper.tests):
        if (root / path).exists():
            raise PressError(f"{path} exists already: edit it, or delete the paper's three files to begin again", USAGE)
    part = next(part for part in catalog.parts if part.slug == paper.part)
    introduction = (
        f"# {{{{ part title {part.slug} }}}}\n\n{TODO}: what unites these papers.\n\n{{{{ part {part.slug} }}}}\n"
    )
    files = {
        paper.module.parent / "__init__.py": f'"""{part.title}: one module a paper."""\n',
        Path("book/parts") / f"{part.slug}.md": introduction,
    }
    written = {path: text for path, text in files.items() if not (root / path).exists()}
    written |= {
        paper.notebook: nbformat.writes(page(paper)) + "\n",
        paper.module: module(paper),
        paper.tests: tests(paper),
    }
    for path, text in written.items():
        write_whole(root / path, text)
    return [*written, *_entries(root, catalog, paper)]


def _entries(root: Path, catalog: Catalog, paper: Paper) -> list[Path]:
    """The paper in the table of contents and in the bibliography."""
    changed = []
    toc, bib = Path("_toc.yml"), Path("book/references.bib")
    before = (root / toc).read_text()
    if (after := contents(before, catalog, root)) != before:
        write_whole(root / toc, after)
        changed.append(toc)
    known = (root / bib).read_text() if (root / bib).exists() else ""
    if f"{{{paper.cite_key}," not in known:
        write_whole(root / bib, f"{known.rstrip()}\n\n{reference(paper)}".lstrip())
        changed.append(bib)
    return changed


def contents(toc: str, catalog: Catalog, root: Path) -> str:
    """`_toc.yml` with the papers' section made anew: the pages that exist or are listed, in the catalogue's order.

    Raises:
        PressError: there is no such section.
    """
    head, caption, rest = toc.partition(PAPERS)
    if not caption:
        raise PressError(f"_toc.yml has no line {PAPERS.strip()!r}, below which the pages belong: put it back")
    after = re.search(r"^- caption:.*", rest, re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r"file: (\S+)", rest))
    lines = ["  chapters:"]
    for part in catalog.parts:
        names = {paper.notebook.with_suffix("").as_posix(): (root / paper.notebook).exists() for paper in part.papers}
        if pages := [name for name, exists in names.items() if exists or name in listed]:
            lines += [f"  - file: book/parts/{part.slug}", "    sections:", *(f"    - file: {name}" for name in pages)]
    return head + caption + "\n".join(lines) + "\n" + (after[0] if after else "")


def reference(paper: Paper) -> str:
    """The paper's entry in the bibliography, its authors left to be filled in."""
    fields = {"title": paper.title.replace("&", r"\&"), "author": f"{TODO}, Authors"}
    fields |= {"journal": f"arXiv:{paper.arxiv}"} if paper.arxiv else {}
    fields |= {"year": str(paper.year)}
    fields |= {"url": f"https://arxiv.org/abs/{paper.arxiv}"} if paper.arxiv else {}
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@article{{{paper.cite_key},\n{body}\n}}\n"


def module(paper: Paper) -> str:
    """The method's module: what its docstrings must say, and no method yet."""
    link = f", https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
    source = textwrap.fill(f'{TODO}: authors, "{paper.title}" ({paper.year}){link}.', 118, break_on_hyphens=False)
    why = f"{TODO}: why anyone should care, in two sentences."
    return (
        f'"""{TODO}: what this is, in one line.\n\n{why}\n\n{source}\n"""\n\n\n'
        f'def method() -> None:\n    """{TODO}: what it computes (equation), shapes, limits, errors."""\n'
    )


def tests(paper: Paper) -> str:
    """The proof, which fails until it is one."""
    return (
        f'"""{paper.slug}: against something independent (a closed form, a limit, an invariance, a library)."""\n\n'
        "import pytest\n\n\n"
        "def test_against_an_oracle():\n"
        f'    pytest.fail("{TODO}: compare paperlab with something that shares no code with it")\n'
    )


def page(paper: Paper) -> nbformat.NotebookNode:
    """The page with its sections, a ledger of the catalogue's claims, and an experiment that refuses to run."""
    name = paper.module_name.rpartition(".")
    claims = "\n".join(
        f'ledger.claim("{claim.id}", not_tested("{TODO}"))  # {" or ".join(claim.kinds)}: {claim.text}'
        for claim in paper.claims
    )
    absent = f"# {TODO}: the claims, in book/catalog/{paper.part}.yml, before the experiment is run"
    cells = [
        f"# {TODO}: what was found, in one sentence\n\n"
        f"*{paper.title}* {{cite}}`{paper.cite_key}`, {paper.year}.\n\n{TODO}: the answer, in two lines.",
        'code:profile = "pocket"\nseed = 0',
        "code:from paperbook import Ledger, explore, figure, not_tested, say, show, show_source, start\n"
        f"from {name[0]} import {name[2]}\n\nrun = start(profile, seed)",
        "## The problem",
        "## The idea",
        "## The method in code",
        f"code:show_source({name[2]}.method)",
        "## The experiment",
        f'code:raise NotImplementedError("{TODO}: the experiment, its baselines, its ablation")',
        "## Explore",
        "code:explore(draw, knob=[1, 2, 3])",
        "## Claims",
        f'code:ledger = Ledger("{paper.slug}")\n{claims or absent}\nledger.table()',
        f"code:{CHECK}\nledger.verdicts()",
        "## What is different from the paper",
        "## Try it yourself",
    ]
    made = [
        nbformat.v4.new_code_cell(cell.removeprefix("code:"))
        if cell.startswith("code:")
        else nbformat.v4.new_markdown_cell(cell if cell.startswith("# ") else f"{cell}\n\n{TODO}")
        for cell in cells
    ]
    made[1].metadata["tags"] = ["parameters"]
    for number, cell in enumerate(made):
        cell["id"] = f"{paper.slug[:40]}-{number:02d}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
