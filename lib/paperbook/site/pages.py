"""What the site generates: the ledger, the index of papers, totals, cards, and the line under each headline.

Fragments are HTML (tables that our own script sorts and filters, readable as they are without it) or MyST. The prose
around them stands in `book/*.md`, which asks for a fragment by its name in double braces.
"""

import html
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from paperbook.catalog import Catalog, Paper, Part
from paperbook.claims import ALPHA, CONTRADICTED, RULES, SUPPORTED, VERDICTS, rich
from paperbook.errors import PressError
from paperbook.site.harvest import Page

FENCE = "`" * 5
AUTHORS_SHOWN = 4
# The chance that one measurement supports its claim although nothing is there; as large that it contradicts it.
CHANCE = {"compare": ALPHA / 2, "within": ALPHA / 2, "size": ALPHA / 2, "trend": ALPHA}


def raw(fragment: str) -> str:
    """HTML as a MyST block, so that no Markdown rule touches it."""
    return f"{FENCE}{{raw}} html\n{fragment}\n{FENCE}"


def chip(verdict: str, count: int | None = None) -> str:
    """A verdict in its colour, and in words."""
    number = "" if count is None else f"<b>{count}</b> "
    return f'<span class="verdict {verdict.replace(" ", "-")}">{number}{verdict}</span>'


def chips(page: Page) -> str:
    """How a page's claims ended."""
    return " ".join(chip(verdict, n) for verdict, n in page.verdicts.items() if n)


def short(title: str) -> str:
    """The name that people use: what stands before a colon or a dash in a title."""
    return re.split(r": | -- | – ", title)[0]


def _url(page: Page, up: str = "") -> str:
    return f"{up}{page.docname}.html"


# --- the ledger ------------------------------------------------------------------------------------------------------


def _measured(row: dict) -> str:
    items = []
    for m in row["measurements"]:
        ours = f": <b>{html.escape(m['ours'])}</b>" if m["ours"] else ""
        beside = f' <span class="beside">(paper: {rich(m["paper"])})</span>' if m["paper"] else ""
        items.append(f"<li>{rich(m['label'])}{ours}{beside}</li>")
    return f'<ul class="measured">{"".join(items)}</ul>'


def _replicates(row: dict) -> str:
    sizes = sorted({m["n"] for m in row["measurements"] if m["n"]})
    return f"{sizes[0]}–{sizes[-1]}" if len(sizes) > 1 else str(*sizes) if sizes else "–"


def _notes(row: dict) -> str:
    said = {"depends on the machine": row["machine"], "near its threshold": row["near"]}
    return "".join(f" <small>{note}</small>" for note, so in said.items() if so)


def _filters(legend: str, choices: dict[str, tuple[str, dict[str, str]]]) -> str:
    """The controls above a table: a text field and one list a property; hidden until the script is there to answer."""
    lists = "".join(
        f'<label>{label} <select name="{name}"><option value="">any</option>'
        + "".join(f'<option value="{html.escape(v)}">{html.escape(text)}</option>' for v, text in options.items())
        + "</select></label>"
        for name, (label, options) in choices.items()
    )
    return (
        f'<form class="paperlab-filters" hidden aria-label="{legend}"><label>Text <input type="search" name="text"'
        f' placeholder="any words" autocomplete="off"></label>{lists}<button type="reset">Show all</button>'
        '<output aria-live="polite"></output></form>'
    )


def ledger_table(catalog: Catalog, pages: list[Page]) -> str:
    """Every claim of every page: the paper's number, ours with its interval, n, and the verdict."""
    heads = {"Paper": "text", "Claim": "text", "Paper's number": "", "Measured here": "", "n": "number",
             "Rule": "text", "Verdict": "number"}  # fmt: skip
    head = "".join(f'<th scope="col" data-sort="{kind}">{name}</th>' for name, kind in heads.items())
    rows, kinds = [], Counter()
    for page in pages:
        for row in page.claims:
            of = sorted({m["kind"] for m in row["measurements"]})
            kinds.update(of)
            n = max(m["n"] for m in row["measurements"])
            name = html.escape(short(page.paper.title))
            rows.append(
                f'<tr data-part="{page.paper.part}" data-paper="{page.paper.slug}" data-verdict="{row["verdict"]}"'
                f' data-kind="{" ".join(of)}"><td><a href="{_url(page)}#claims">{name}</a></td>'
                f'<td data-key="{row["id"]}"><b>{row["id"]}</b> {rich(row["text"])}</td>'
                f"<td>{rich(row['paper']) or '–'}</td><td>{_measured(row)}</td>"
                f'<td data-key="{n}">{_replicates(row)}</td>'
                f"<td>{', '.join(k.replace('_', ' ') for k in of)}</td>"
                f'<td data-key="{VERDICTS.index(row["verdict"])}">{chip(row["verdict"])}{_notes(row)}</td></tr>'
            )
    parts = {part.slug: part.title for part in catalog.parts if any(page.paper.part == part.slug for page in pages)}
    choices = {
        "part": ("Part", parts),
        "paper": ("Paper", {page.paper.slug: short(page.paper.title) for page in pages if page.claims}),
        "verdict": ("Verdict", {verdict: verdict for verdict in VERDICTS}),
        "kind": ("Rule", {kind: kind.replace("_", " ") for kind in RULES if kinds[kind]}),
    }
    return raw(
        f'<div class="paperlab-filtered" data-noun="claim">{_filters("Filter the claims", choices)}'
        '<div class="paperlab-scroll" tabindex="0" role="region" aria-label="All claims"><table class="paperlab-all">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def rules() -> str:
    """The rule of every kind of measurement, in the words of the code that applies it."""
    return "\n\n".join(f"{kind.replace('_', ' ')}\n: {text}" for kind, text in RULES.items())


def by_chance(pages: Iterable[Page]) -> tuple[int, float, float, Counter]:
    """(claims decided by statistics, how many chance alone would support, and contradict, how they really ended).

    A claim is supported when all its measurements are and contradicted when one is; what is decided without chance (an
    exact check, a part that is not tested) stays as it is. Measurements of one claim are taken as independent, which
    they are not quite: shared seeds make joint luck a little likelier than the product says.
    """
    support = contradict = 0.0
    ended: Counter = Counter()
    for page in pages:
        for row in page.claims:
            chances = [CHANCE[m["kind"]] for m in row["measurements"] if m["kind"] in CHANCE]
            without = {m["verdict"] for m in row["measurements"] if m["kind"] not in CHANCE}
            if chances and CONTRADICTED not in without:
                support += math.prod(chances) if without <= {SUPPORTED} else 0.0
                contradict += 1 - math.prod(1 - c for c in chances)
                ended[row["verdict"]] += 1
    return ended.total(), support, contradict, ended


def chance(pages: list[Page]) -> str:
    """What luck alone would have written into the ledger, beside what stands there."""
    total, support, contradict, ended = by_chance(pages)
    if not total:
        return "No claim of the ledger is decided by statistics yet."
    return (
        f"**{total}** of the claims are decided by statistics over replicates. Were there nothing behind any of them,"
        f" chance alone would still give about **{support:.1f}** verdicts “supported” and **{contradict:.1f}**"
        f" “contradicted”. The ledger holds **{ended[SUPPORTED]}** and **{ended[CONTRADICTED]}**."
    )


def totals(pages: list[Page], up: str = "") -> str:
    """Four numbers, each a link to the ledger filtered by it."""
    counts = sum((page.verdicts for page in pages), Counter())
    boxes = "".join(
        f'<li class="{v.replace(" ", "-")}"><a href="{up}ledger.html?verdict={v.replace(" ", "+")}"><b>{counts[v]}</b>'
        f" {v}</a></li>"
        for v in VERDICTS
    )
    return raw(f'<ul class="paperlab-totals" aria-label="Verdicts over all pages">{boxes}</ul>')


# --- papers ----------------------------------------------------------------------------------------------------------


def _outside(paper: Paper) -> str:
    links = [(f"arXiv:{paper.arxiv}", f"https://arxiv.org/abs/{paper.arxiv}")] if paper.arxiv else []
    links += [("authors' code", paper.code)] if paper.code else []
    return "".join(f' · <a href="{html.escape(url)}">{label}</a>' for label, url in links)


def _index_row(paper: Paper, page: Page | None) -> str:
    title = html.escape(paper.title)
    verdicts = " ".join(v.replace(" ", "-") for v, n in page.verdicts.items() if n) if page else ""
    name = f'<a class="title" href="{_url(page)}">{title}</a>' if page else f'<span class="title">{title}</span>'
    state = chips(page) if page else '<span class="coming">still to come</span>'
    gist = f'<p class="finding">{rich(page.headline)}</p>' if page else ""
    gist += f"<p>{rich(paper.summary)}</p>" if paper.summary else ""
    return (
        f'<li data-part="{paper.part}" data-year="{paper.year}" data-verdict="{verdicts}"'
        f' data-state="{"page" if page else "coming"}">{name}<p class="facts">{paper.year}{_outside(paper)} {state}</p>'
        f"{gist}</li>"
    )


def paper_index(catalog: Catalog, pages: list[Page]) -> str:
    """All papers by part; those without a page are named and not linked."""
    by_slug = {page.paper.slug: page for page in pages}
    choices = {
        "part": ("Part", {part.slug: part.title for part in catalog.parts}),
        "year": ("Year", {str(y): str(y) for y in sorted({paper.year for paper in catalog.papers}, reverse=True)}),
        "verdict": ("With a claim", {v.replace(" ", "-"): v for v in VERDICTS}),
        "state": ("State", {"page": "has its page", "coming": "still to come"}),
    }
    blocks = [raw(f'<div class="paperlab-filtered" data-noun="paper">{_filters("Filter the papers", choices)}</div>')]
    for part in catalog.parts:
        rows = "".join(_index_row(paper, by_slug.get(paper.slug)) for paper in part.papers)
        blocks += [f"## {part.title}", raw(f'<ul class="paperlab-papers">{rows}</ul>')]
    return "\n\n".join(blocks)


def thumbnail(page: Page) -> str | None:
    """Where the picture on a page's card lies."""
    return f"_static/cards/{page.paper.slug}.{page.picture[1]}" if page.picture else None


def cards(pages: Iterable[Page], up: str = "") -> str:
    """One card a page: its first figure, the finding, the paper, how its claims ended."""
    items = []
    for page in pages:
        picture = f'<img src="{up}{thumbnail(page)}" alt="" loading="lazy">' if page.picture else ""
        items.append(
            f'<li><a href="{_url(page, up)}"><span class="picture">{picture}</span><span class="finding">'
            f'{rich(page.headline)}</span><span class="paper">{html.escape(page.paper.title)}, {page.paper.year}</span>'
            f"</a><p>{chips(page)}</p></li>"
        )
    return raw(f'<ul class="paperlab-cards">{"".join(items)}</ul>')


def part_list(part: Part, pages: list[Page]) -> str:
    """What stands at the end of a part's introduction: its pages as cards, then the papers that are still to come."""
    here = [page for page in pages if page.paper.part == part.slug]
    done = {page.paper.slug for page in here}
    coming = [paper for paper in part.papers if paper.slug not in done]
    blocks = ["## Pages of this part", cards(here, "../")] if here else []
    if coming:
        rows = "".join(_index_row(paper, None) for paper in coming)
        blocks += ["## Still to come", raw(f'<ul class="paperlab-papers">{rows}</ul>')]
    return "\n\n".join(blocks)


def _squares(page: Page, up: str) -> str:
    """One square a claim, in its verdict's colour, that leads to the claim."""
    return "".join(
        f'<a class="verdict {row["verdict"].replace(" ", "-")}" href="{_url(page, up)}#claim-{row["id"]}"'
        f' title="{html.escape(row["text"])}">{row["id"]}<span class="visually-hidden"> {row["verdict"]}</span></a>'
        for row in page.claims
    )


def part_map(part: Part, pages: list[Page]) -> str:
    """A part at one look: its questions in reading order, under each its papers, and how their claims ended."""
    by_slug = {page.paper.slug: page for page in pages}
    groups = []
    for question, papers in part.questions:
        items = []
        for paper in papers:
            page, name = by_slug.get(paper.slug), html.escape(short(paper.title))
            items.append(
                f'<li><a href="{_url(page, "../")}">{name}</a><span class="squares">{_squares(page, "../")}</span></li>'
                if page
                else f'<li class="coming">{name}</li>'
            )
        groups.append(f"<li><b>{rich(question)}</b><ul>{''.join(items)}</ul></li>")
    return raw(f'<ol class="paperlab-map" aria-label="The questions of this part">{"".join(groups)}</ol>')


def measured(pages: list[Page], slug: str, claim: str, number: str = "1") -> str:
    """One measurement of the ledger inside a sentence: its value as the executed page has it, with a link to its claim.

    ``number`` counts the claim's measurements from 1. A page that is not executed says so instead, and so does a claim
    about the machine that could not be tested on this one.

    Raises:
        PressError: the page has no such claim, or the claim no such measurement with a value.
    """
    page = next((page for page in pages if page.paper.slug == slug), None)
    if page is None:
        return "(not executed)"
    row = next((row for row in page.claims if row["id"] == claim), None)
    values = [m["ours"] for m in row["measurements"]] if row else []
    if not 1 <= int(number) <= len(values) or not values[int(number) - 1]:
        if row and row["machine"]:  # it may lack what the measurement needs: a compiler, say
            return "(not measured on this machine)"
        raise PressError(f"{slug} has no measurement {number} of {claim}")
    value = html.escape(values[int(number) - 1].removeprefix("difference "))  # the sentence says what it is
    return f'<a class="measured" href="{_url(page, "../")}#claim-{claim}">{value}</a>'


def authors_of(root: Path) -> dict[str, list[str]]:
    """The authors behind every key of `book/references.bib`, their LaTeX accents turned into letters.

    Raises:
        PressError: the file cannot be read as a bibliography.
    """
    from pybtex.database import parse_file
    from pybtex.exceptions import PybtexError

    try:
        entries = parse_file(str(root / "book" / "references.bib")).entries
    except (PybtexError, OSError) as error:
        raise PressError(f"book/references.bib: {error}") from None
    return {
        key: [_name(person) for person in entry.persons.get("author", [])] for key, entry in entries.items()
    }  # fmt: skip


def _name(person: object) -> str:
    """First names and last names as plain text; pybtex keeps a name as marked-up pieces."""
    pieces = (*person.rich_first_names, *person.rich_middle_names, *person.rich_prelast_names, *person.rich_last_names)
    return " ".join(str(piece) for piece in pieces)


def byline(paper: Paper, authors: list[str], symbols: list[str], has_module: bool, has_tests: bool) -> str:
    """Who wrote the paper and when, and where it, its code and ours are."""
    more = len(authors) - AUTHORS_SHOWN
    shown = [*authors[:AUTHORS_SHOWN], f"{more} others"] if more > 1 else authors
    who = " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))
    links = [f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"] if paper.arxiv else []
    links += [f"[authors' code]({paper.code})"] if paper.code else []
    name = paper.module_name
    ours = [f'<a href="{paper.slug}.ipynb" download>notebook</a>']
    ours += [f"[source](#source-{name})"] if has_module else []
    ours += [f"[tests](#tests-{name})"] if has_module and has_tests else []
    ours += [f"[library](#{name})"] if has_module else []
    lines = [":::{div} paperlab-byline", " · ".join(filter(None, [who, str(paper.year), *links])), "", " · ".join(ours)]
    if symbols:
        used = ", ".join(f"[`{symbol}`](#{name}.{symbol})" for symbol in symbols)
        summary = f"{len(symbols)} functions and classes of this page in the library"
        lines += ["", f"<details><summary>{summary}</summary>", "", used, "", "</details>"]
    return "\n".join([*lines, ":::"])
