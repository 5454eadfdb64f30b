"""The catalogue refuses what would contradict itself later."""

from pathlib import Path

import pytest
import yaml

from paperbook.catalog import CatalogError, find_root, load_catalog

ROOT = Path(__file__).parents[2]


def test_the_real_catalogue_is_complete():
    catalog = load_catalog(ROOT)
    assert len(catalog.parts) == 25
    assert len(catalog.papers) == 220
    assert catalog.paper("two-pass-softmax").module_name == "paperlab.output_layers.two_pass_softmax"
    assert all(paper.arxiv and paper.year == 2000 + int(paper.arxiv[:2]) for paper in catalog.papers)


def test_paths_of_a_paper(tiny_book):
    paper = load_catalog(tiny_book).paper("alpha")
    assert paper.notebook == Path("notebooks/memory/alpha.ipynb")
    assert paper.module == Path("lib/paperlab/memory/alpha.py")
    assert paper.tests == Path("tests/memory/test_alpha.py")


def test_root_is_found_from_below(tiny_book, monkeypatch, tmp_path_factory):
    below = tiny_book / "notebooks" / "memory"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find_root() == tiny_book
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(CatalogError, match="PAPERLAB_ROOT"):
        find_root()
    monkeypatch.setenv("PAPERLAB_ROOT", str(tiny_book))
    assert find_root() == tiny_book


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("slug: beta", "slug: alpha", "twice"),
        ("slug: beta", "slug: Be_ta", "lower-case words"),
        ("id: C2", "id: C3", "numbered C1, C2"),
        ("kind: exact", "kind: certain", "C1: kind must be of"),
        ("year: 2021", "year: soon", "beta: year must be a year"),
        ('arxiv: "2001.00001"', "arxiv: 2001.1", "alpha: arxiv must look like"),
        ("summary:", "sumary:", "a paper has the keys"),
        ("part: memory", "part: memories", "like the file's name"),
        ("papers:", "paper:", "cannot be read"),
    ],
)
def test_mistakes_are_named(tiny_book, old, new, words):
    path = tiny_book / "book" / "catalog" / "memory.yml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CatalogError, match=words):
        load_catalog(tiny_book)


def test_a_part_that_is_missing_or_not_listed(tiny_book):
    folder = tiny_book / "book" / "catalog"
    (folder / "vision.yml").write_text("part: vision\ntitle: V\npapers: []\n")
    with pytest.raises(CatalogError, match="does not list vision"):
        load_catalog(tiny_book)
    (folder / "order.yml").write_text("parts: [memory, vision, robustness]\n")
    with pytest.raises(CatalogError, match="robustness.yml cannot be read"):
        load_catalog(tiny_book)


def test_unknown_slug_suggests_the_nearest(tiny_book):
    with pytest.raises(CatalogError, match="did you mean alpha"):
        load_catalog(tiny_book).paper("alpa")


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"asks": "What?", "papers": ["alpha"]}], "every paper of the part once; look at beta"),
        ([{"asks": "What?", "papers": ["alpha", "beta", "alpha"]}], "look at alpha"),
        ([{"asks": "What?", "papers": ["alpha", "beta", "gamma"]}], "look at gamma"),
        ([{"asks": "What?"}], "has the keys asks and papers"),
    ],
)
def test_questions_name_every_paper_once(tiny_book, groups, words):
    path = tiny_book / "book" / "catalog" / "memory.yml"
    path.write_text(path.read_text() + yaml.safe_dump({"questions": groups}))
    with pytest.raises(CatalogError, match=words):
        load_catalog(tiny_book)
