"""Rendering: stage everything that Sphinx reads, run it, put the notebooks for download beside their pages.

What is staged is compared by content, so that Sphinx reads only what changed. What it cannot see for itself (our own
code, the configuration, a run that was killed half way) stands in a fingerprint that is removed before it starts and
written when it is done: without it, or with another, everything is rendered afresh.
"""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

from paperbook.catalog import Catalog, load_catalog
from paperbook.errors import PressError
from paperbook.paths import unwritable
from paperbook.site import api, pages, zoo
from paperbook.site.harvest import Page, harvest
from paperbook.site.stage import Stage, write
from paperbook.site.vendor import vendor

FIRST = "run `python -m paperbook execute` first"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PLOTTING_LINES = 12  # a figure's code of up to this length may stand open
FIELD = re.compile(r"\{\{ ([a-z ]+?)(?: ([a-z0-9-]+(?: C\d+(?: \d+)?)?))? \}\}")


def render(root: Path, executed: Path, html: Path, *, slugs: list[str] | None = None) -> None:
    """Render the executed notebooks below ``executed`` (`<part>/<slug>.ipynb`) and the book around them into ``html``.

    With ``slugs`` only these pages are staged anew; the others stay as an earlier build staged them.

    Raises:
        PressError: nothing to render, a notebook or the bibliography that cannot be read, prose that asks for something
            unknown, a folder that cannot be written, or Sphinx failing.
    """
    began = time.monotonic()
    folder = root / "_build"
    catalog = load_catalog(root)
    wanted = {catalog.paper(slug).slug for slug in slugs or ()}
    found = harvest(catalog.with_page(root), executed)
    if missing := wanted - {page.paper.slug for page in found}:
        raise PressError(f"no executed notebook of {', '.join(sorted(missing))}: {FIRST}")
    if not found:
        raise PressError(f"no executed notebook below {executed}: {FIRST}")
    try:
        scripts = vendor(root)
        stage = Stage(folder / "stage")
        _stage_all(stage, root, catalog, found, wanted)
        everything = _fingerprint(stage, scripts)
        titles = hashlib.sha256("\n".join(page.headline for page in found).encode()).hexdigest()
        stamp = folder / "site.stamp"
        before = stamp.read_text().split() if stamp.exists() else ["", ""]
        if before == [everything, titles] and not stage.written and not stage.removed and _complete(stage.folder, html):
            _downloads(root, html, found)
            print(f"site: nothing changed, open {html / 'index.html'}", flush=True)
            return
        stamp.unlink(missing_ok=True)
        how = "fresh" if before[0] != everything else "all" if before[1] != titles else "changed"
        print(f"site: {len(found)} pages; {len(stage.written)} staged files changed, rendering {_say(how)}", flush=True)
        _sphinx(stage.folder, html, folder / "doctrees", how)
        _downloads(root, html, found)
        _tidy(stage.folder, html)
        write(stamp, f"{everything}\n{titles}\n")
    except OSError as error:
        raise unwritable(Path(error.filename or folder), error) from None
    print(f"site: rendered in {time.monotonic() - began:.1f} s, open {html / 'index.html'}", flush=True)


def _complete(stage: Path, html: Path) -> bool:
    """Does every staged document have its page?"""
    sources = (path for path in stage.rglob("*") if path.suffix in (".md", ".ipynb"))
    return all((html / path.relative_to(stage)).with_suffix(".html").exists() for path in sources)


def _say(how: str) -> str:
    return {"fresh": "everything afresh", "all": "every page, as titles changed", "changed": "what changed"}[how]


def _fingerprint(stage: Stage, scripts: Path | None) -> str:
    """Of everything that changes pages without changing their sources."""
    ours = sorted(Path(__file__).parent.glob("*.py"))
    configs = [stage.folder / "_config.yml", stage.folder / "_toc.yml"]
    styles = sorted(path for path in (stage.folder / "_static").glob("*") if path.suffix in (".css", ".js"))
    content = b"".join(path.read_bytes() for path in [*ours, *configs, *styles])
    return hashlib.sha256(content + str(scripts).encode()).hexdigest()


# --- staging ---------------------------------------------------------------------------------------------------------


def _stage_all(stage: Stage, root: Path, catalog: Catalog, found: list[Page], wanted: set[str]) -> None:
    library = api.modules(root)
    authors = pages.authors_of(root)
    for page in found:
        name = page.paper.notebook
        if wanted and page.paper.slug not in wanted and (stage.folder / name).exists():
            stage.keep(name)
        else:
            stage.put(name, _notebook(page, root, library, authors))
        if page.picture:
            stage.put(pages.thumbnail(page), page.picture[0])
    for path in sorted((root / "book").rglob("*")):
        name = path.relative_to(root / "book")
        if path.suffix == ".md":
            stage.put(name, _fill(path, root, catalog, found))
        elif path.is_file() and (path.suffix == ".bib" or name.parts[0] == "_static"):
            stage.put(name, path.read_bytes())
    papers = {page.paper.module_name: page.paper for page in found}
    for module in library.values():
        stage.put(f"{module.docname}.md", api.module_page(root, module, papers.get(module.name)))
    stage.put("api/index.md", api.index_page(library, catalog))
    stage.put("_config.yml", _from_root((root / "_config.yml").read_text()))
    stage.put("_toc.yml", _toc(root, catalog, found))
    stage.prune()


def _from_root(text: str) -> str:
    """Paths as the stage has them, where what is in `book/` stands at the root."""
    return re.sub(r"(?<![\w/.-])book/", "", text)


def _toc(root: Path, catalog: Catalog, found: list[Page]) -> str:
    """The table of contents, without pages that are not executed, and with the papers' names in the side bar."""
    toc = yaml.safe_load(_from_root((root / "_toc.yml").read_text()))
    present = {page.docname: page.paper for page in found}
    absent = {paper.notebook.with_suffix("").as_posix() for paper in catalog.papers} - set(present)

    def kept(entries: list[dict]) -> list[dict]:
        return [_entry(entry) for entry in entries if entry["file"] not in absent]

    def _entry(entry: dict) -> dict:
        title = {"title": pages.short(present[entry["file"]].title)} if entry["file"] in present else {}
        sections = kept(entry.get("sections", []))
        rest = {key: value for key, value in entry.items() if key != "sections"}
        return {**rest, **title, **({"sections": sections} if sections else {})}

    for holder in (toc, *toc.get("parts", ())):
        if "chapters" in holder:
            holder["chapters"] = kept(holder["chapters"])
    if skipped := sorted(set(re.findall(r"notebooks/\S+", (root / "_toc.yml").read_text())) & absent):
        print(f"site: not executed and therefore left out: {', '.join(skipped)}", flush=True)
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def _notebook(page: Page, root: Path, library: dict[str, api.Module], authors: dict[str, list[str]]) -> str:
    """The executed notebook as it is rendered: a line about the paper below the headline, links below shown sources."""
    paper, cells = page.paper, copy.deepcopy(page.notebook.cells)
    module = library.get(paper.module_name)
    symbols = [node.name for node in module.public] if module else []
    tested = (root / paper.tests).exists()
    line = pages.byline(paper, authors.get(paper.cite_key, []), symbols, module is not None, tested)
    for cell in cells:
        if cell.cell_type == "markdown" and re.search(r"^#\s", cell.source, re.M):
            cell.source = re.sub(r"^(#\s+.+)$", lambda m: f"{m[1]}\n\n{line}\n", cell.source, count=1, flags=re.M)
            break
    for cell in cells:
        if cell.cell_type == "markdown":  # a link that works in the repository works on the site
            cell.source = cell.source.replace("](../../book/", "](../../")
        elif _is_plotting(cell.source):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        for output in cell.get("outputs", ()):
            name = output.get("metadata", {}).get("paperlab", {}).get("source", "")
            if any(name == f"{m.name}.{node.name}" for m in library.values() for node in m.public):
                output.data["text/markdown"] += f"\n\n:::{{div}} paperlab-source\n[`{name}`](#{name})\n:::"
    return json.dumps({**page.notebook, "cells": cells}, ensure_ascii=False)


def _is_plotting(source: str) -> bool:
    """Is the cell mostly about drawing, or nothing but a sentence? What it shows then stands there, and its code
    unfolds on demand: beside its own output, the code of a sentence would say it twice.
    """
    long = len(source.splitlines()) > PLOTTING_LINES and bool(re.search(r"^\s*(show|say)\(", source, re.M))
    return long or bool(re.fullmatch(r"(say\((.|\n)*\)\s*)+", source))


def _fill(path: Path, root: Path, catalog: Catalog, found: list[Page]) -> str:
    """A page of the book's prose with what it asks for in double braces."""
    parts = {part.slug: part for part in catalog.parts}
    rows = [row for page in found for row in page.claims]
    known = {
        "papers": lambda _: str(len(catalog.papers)),
        "parts": lambda _: str(len(catalog.parts)),
        "pages": lambda _: str(len(found)),
        "claims": lambda _: str(len(rows)),
        "totals": lambda _: pages.totals(found),
        "cards": lambda _: pages.cards(found),
        "ledger": lambda _: pages.ledger_table(catalog, found),
        "rules": lambda _: pages.rules(),
        "chance": lambda _: pages.chance(found),
        "zoo": lambda _: zoo.scores(root),
        "heads": lambda name: zoo.heads(root, name),
        "stream": lambda name: zoo.stream(root, name),
        "samples": lambda name: zoo.samples(root, name),
        "pictures": lambda name: zoo.pictures(root, name),
        "index": lambda _: pages.paper_index(catalog, found),
        "part": lambda slug: pages.part_list(parts[slug], found),
        "part title": lambda slug: parts[slug].title,
        "map": lambda slug: pages.part_map(parts[slug], found),
        "measured": lambda asked: pages.measured(found, *asked.split()),
    }

    def field(match: re.Match) -> str:
        try:
            return known[match[1]](match[2])
        except KeyError:
            where = path.relative_to(root)
            raise PressError(f"{where} asks for {match[0]}; it may ask for {', '.join(sorted(known))}") from None

    return FIELD.sub(field, path.read_text())


# --- rendering -------------------------------------------------------------------------------------------------------


def _sphinx(stage: Path, html: Path, doctrees: Path, how: str) -> None:
    """Run Sphinx in a process of its own; its progress on one line, its warnings as they come."""
    lib = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(lib), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "paperbook.site.sphinx_run", str(stage), str(html), str(doctrees), how]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:  # fmt: skip
        log, live = [], sys.stdout.isatty()
        for line in running.stdout:
            line = COLOUR.sub("", line).replace(f"{stage}/", "")
            log.append(line)
            if progress := re.match(r"(reading sources|writing output)\.\.\. \[\s*(\d+)%\]", line):
                if live:
                    print(f"\rsite: {progress[1]} {progress[2]:>3}%", end="", flush=True)
            elif re.search(r"WARNING|ERROR", line):
                print(("\r" if live else "") + line.rstrip(), flush=True)
        if live:
            print("\r\033[K", end="")
    write(stage.parent / "sphinx.log", "".join(log))
    if running.returncode:
        tail = "".join(log[-15:])
        raise PressError(f"Sphinx could not render the book; the end of {stage.parent / 'sphinx.log'}:\n{tail}")


def _downloads(root: Path, html: Path, found: list[Page]) -> None:
    """The notebooks as they are committed, for readers to run: without outputs, and a tenth of the size."""
    for page in found:
        write(html / page.paper.notebook, (root / page.paper.notebook).read_bytes())


def _tidy(stage: Path, html: Path) -> None:
    """Remove pages that the book no longer has; Sphinx would leave them where old links find them."""
    sources = {path.relative_to(stage).with_suffix("") for path in stage.rglob("*") if path.suffix in (".md", ".ipynb")}
    for path in [*html.rglob("*.html"), *html.rglob("*.ipynb")]:
        name = path.relative_to(html).with_suffix("")
        if name not in sources and "_static" not in name.parts and str(name) not in ("search", "genindex"):
            path.unlink()
