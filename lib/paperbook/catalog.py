"""The one list of papers: `book/catalog/<part>.yml`, read and checked.

Everything that enumerates papers (the table of contents, the index, the ledger, the contract test) asks here, so that a
paper is in all of them or in none.
"""

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

KINDS = ("exact", "compare", "within", "trend", "size", "not_tested")
PAPER_KEYS = {"slug", "title", "year", "arxiv", "code", "summary", "claims"}
CLAIM_KEYS = {"id", "kind", "text", "paper"}


class CatalogError(ValueError):
    """The catalogue contradicts itself, or was asked for a paper that it does not hold."""


@dataclass(frozen=True)
class ClaimText:
    """A claim as it was written down before the experiment: our words, and the paper's number where it has one."""

    id: str
    text: str
    kinds: tuple[str, ...]
    paper: str = ""


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue, and where its three files belong."""

    slug: str
    part: str
    title: str
    year: int
    arxiv: str = ""
    code: str = ""
    summary: str = ""
    claims: tuple[ClaimText, ...] = ()

    @property
    def module_name(self) -> str:
        """The importable name of the paper's module."""
        return f"paperlab.{self.part.replace('-', '_')}.{self.slug.replace('-', '_')}"

    @property
    def notebook(self) -> Path:
        """The page, relative to the repository's root."""
        return Path("notebooks") / self.part / f"{self.slug}.ipynb"

    @property
    def module(self) -> Path:
        """The method, relative to the repository's root."""
        return Path("lib", *self.module_name.split(".")).with_suffix(".py")

    @property
    def tests(self) -> Path:
        """The proof, relative to the repository's root."""
        return Path("tests") / self.part.replace("-", "_") / f"test_{self.slug.replace('-', '_')}.py"

    @property
    def cite_key(self) -> str:
        """The paper's key in `book/references.bib`."""
        return self.slug.replace("-", "")


@dataclass(frozen=True)
class Part:
    """A part of the book, its papers in reading order, and the questions that they answer, each with its papers."""

    slug: str
    title: str
    papers: tuple[Paper, ...]
    questions: tuple[tuple[str, tuple[Paper, ...]], ...] = ()


@dataclass(frozen=True)
class Catalog:
    """All parts in the order of `book/catalog/order.yml`."""

    parts: tuple[Part, ...]
    _by_slug: dict[str, Paper] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for paper in self.papers:
            if paper.slug in self._by_slug:
                raise CatalogError(f"the slug {paper.slug!r} stands in the catalogue twice")
            self._by_slug[paper.slug] = paper

    @property
    def papers(self) -> tuple[Paper, ...]:
        """Every paper, part by part."""
        return tuple(paper for part in self.parts for paper in part.papers)

    def paper(self, slug: str) -> Paper:
        """The paper with this slug.

        Raises:
            CatalogError: there is none; names the nearest slugs.
        """
        if slug not in self._by_slug:
            near = difflib.get_close_matches(slug, self._by_slug, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise CatalogError(f"no paper {slug!r} in the catalogue{hint}")
        return self._by_slug[slug]

    def with_page(self, root: Path) -> tuple[Paper, ...]:
        """The papers whose notebook exists below ``root``."""
        return tuple(paper for paper in self.papers if (root / paper.notebook).exists())


def find_root(start: Path | None = None) -> Path:
    """The repository that holds ``start`` (by default the working directory, or `PAPERLAB_ROOT` where it is set).

    Raises:
        CatalogError: no folder above it has `book/catalog`.
    """
    here = Path(start or os.environ.get("PAPERLAB_ROOT") or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "book" / "catalog").is_dir():
            return folder
    raise CatalogError(f"no book/catalog at or above {here}: run this inside a checkout, or set PAPERLAB_ROOT")


def _claim(raw: dict, where: str) -> ClaimText:
    if not isinstance(raw, dict) or not CLAIM_KEYS >= set(raw) >= {"id", "kind", "text"}:
        raise CatalogError(f"{where}: a claim has the keys id, kind, text and maybe paper, got {raw!r}")
    kinds = (raw["kind"],) if isinstance(raw["kind"], str) else tuple(raw["kind"])
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise CatalogError(f"{where}, {raw['id']}: kind must be of {', '.join(KINDS)}, got {raw['kind']!r}")
    return ClaimText(str(raw["id"]), " ".join(str(raw["text"]).split()), kinds, str(raw.get("paper") or ""))


def _paper(raw: dict, part: str, where: str) -> Paper:
    if not isinstance(raw, dict) or not PAPER_KEYS >= set(raw) >= {"slug", "title", "year"}:
        raise CatalogError(f"{where}: a paper has the keys {', '.join(sorted(PAPER_KEYS))}, got {raw!r}")
    slug = raw["slug"]
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(slug)):
        raise CatalogError(f"{where}: slug must be lower-case words joined by hyphens, got {slug!r}")
    where = f"{where}, {slug}"
    if not isinstance(raw["year"], int) or not 1940 <= raw["year"] <= 2100:
        raise CatalogError(f"{where}: year must be a year, got {raw['year']!r}")
    if raw.get("arxiv") and not re.fullmatch(r"\d{4}\.\d{4,5}", str(raw["arxiv"])):
        raise CatalogError(f"{where}: arxiv must look like '2008.02217' (in quotes), got {raw['arxiv']!r}")
    claims = tuple(_claim(claim, where) for claim in raw.get("claims") or ())
    ids = [claim.id for claim in claims]
    if ids != [f"C{k}" for k in range(1, len(ids) + 1)]:
        raise CatalogError(f"{where}: claims must be numbered C1, C2, … in order, got {', '.join(ids)}")
    text = {key: " ".join(str(raw.get(key) or "").split()) for key in ("title", "arxiv", "code", "summary")}
    return Paper(slug=slug, part=part, year=raw["year"], claims=claims, **text)


def _questions(raw: list[dict] | None, papers: tuple[Paper, ...], where: str) -> tuple:
    if raw is None:
        return ()
    by_slug = {paper.slug: paper for paper in papers}
    if not all(isinstance(group, dict) and set(group) == {"asks", "papers"} for group in raw):
        raise CatalogError(f"{where}: each of questions has the keys asks and papers, got {raw!r}")
    named = [slug for group in raw for slug in group["papers"]]
    if sorted(named) != sorted(by_slug):
        odd = sorted(set(named) ^ set(by_slug)) or sorted({slug for slug in named if named.count(slug) > 1})
        raise CatalogError(f"{where}: questions must name every paper of the part once; look at {', '.join(odd)}")
    return tuple((str(group["asks"]), tuple(by_slug[slug] for slug in group["papers"])) for group in raw)


def load_catalog(root: Path | None = None) -> Catalog:
    """Read and check every `book/catalog/<part>.yml`, parts in the order of `order.yml`.

    Raises:
        CatalogError: a file is missing or wrong; the message names file, paper and key.
    """
    folder = (root or find_root()) / "book" / "catalog"
    try:
        order = yaml.safe_load((folder / "order.yml").read_text())["parts"]
    except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CatalogError(f"{folder / 'order.yml'} must list the parts in reading order: {error}") from None
    extra = {path.stem for path in folder.glob("*.yml")} - {"order", *order}
    if extra:
        raise CatalogError(f"{folder / 'order.yml'} does not list {', '.join(sorted(extra))}")
    parts = []
    for slug in order:
        path = folder / f"{slug}.yml"
        try:
            raw = yaml.safe_load(path.read_text())
            if raw["part"] != slug:
                raise CatalogError(f"{path}: part must be {slug!r} like the file's name, got {raw['part']!r}")
            papers = tuple(_paper(entry, slug, path.name) for entry in raw["papers"])
            parts.append(Part(slug, raw["title"], papers, _questions(raw.get("questions"), papers, path.name)))
        except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
            raise CatalogError(f"{path} cannot be read as a part of the catalogue: {error!r}") from None
    return Catalog(tuple(parts))
