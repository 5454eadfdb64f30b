"""The contract: a paper is in the catalogue, the contents, the notebooks, the library, the tests and the bibliography,
or in none of them; and every page has the anatomy that makes 220 pages one book."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from paperbook.catalog import load_catalog
from paperbook.notebook import checked_text, is_checked, read

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog(ROOT)
PAGES = CATALOG.with_page(ROOT)
SECTIONS = ["The problem", "The idea", "The method in code", "The experiment", "Explore", "Claims",
            "What is different from the paper", "Try it yourself"]  # fmt: skip
LIBRARY = sorted((ROOT / "lib" / "paperlab").rglob("*.py"))

each_page = pytest.mark.parametrize("paper", PAGES, ids=lambda p: p.slug)
each_module = pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT / "lib")))


@cache
def page_of(paper):
    return read(ROOT / paper.notebook)


def sources(paper, kind):
    return [cell.source for cell in page_of(paper).cells if cell.cell_type == kind]


def toc_files():
    found = []

    def walk(node):
        if isinstance(node, dict):
            if "file" in node:
                found.append(node["file"])
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                walk(child)

    walk(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    return found


def test_there_are_pages():
    assert PAGES


def test_contents_list_the_pages_that_exist_in_catalogue_order():
    listed = [f for f in toc_files() if f.startswith("notebooks/")]
    assert listed == [str(paper.notebook.with_suffix("")) for paper in PAGES]


def test_no_file_without_its_catalogue_entry():
    assert {p.relative_to(ROOT) for p in (ROOT / "notebooks").rglob("*.ipynb")} == {p.notebook for p in PAGES}
    part_folders = {part.slug.replace("-", "_") for part in CATALOG.parts}
    modules = {p.relative_to(ROOT) for p in LIBRARY if p.parent.name in part_folders and p.name != "__init__.py"}
    assert modules == {p.module for p in PAGES}
    tests = {p.relative_to(ROOT) for f in part_folders for p in (ROOT / "tests" / f).glob("test_*.py")}
    assert tests == {p.tests for p in PAGES}


@each_page
def test_three_files_and_their_entries(paper):
    for path in (paper.notebook, paper.module, paper.tests):
        assert (ROOT / path).exists(), f"{path} is missing"
    assert paper.summary, f"{paper.slug} has no summary in the catalogue"
    assert paper.claims, f"{paper.slug} has no claims in the catalogue"
    assert f"{{{paper.cite_key}," in (ROOT / "book" / "references.bib").read_text()
    assert (ROOT / "book" / "parts" / f"{paper.part}.md").exists()


@each_page
def test_anatomy(paper):
    prose = "\n".join(sources(paper, "markdown"))
    assert re.match(r"# \S", page_of(paper).cells[0].source), "the first cell starts with the headline"
    assert re.findall(r"^## (.+?)\s*$", prose, re.M) == SECTIONS
    assert f"`{paper.cite_key}`" in page_of(paper).cells[0].source, "the first cell cites the paper"
    tagged = [c for c in page_of(paper).cells if "parameters" in c.metadata.get("tags", [])]
    assert [c.source for c in tagged] == ['profile = "pocket"\nseed = 0']


@each_page
def test_code_cells_read_like_prose(paper):
    code = sources(paper, "code")
    assert all(len(source.splitlines()) <= 45 for source in code), "move the algorithm into the library"
    whole = "\n".join(code)
    for call in ("show_source(", "explore(", "ledger.table()", "ledger.verdicts()"):
        assert call in whole, f"{call} is missing"
    assert paper.module_name in whole, "the page must use the paper's own module"


@each_page
def test_every_claim_is_measured_and_committed_with_its_verdict(paper):
    (text,) = checked_text(page_of(paper))
    assert [line.split()[0] for line in text.splitlines()] == [claim.id for claim in paper.claims]


@each_page
def test_no_other_output_is_committed(paper):
    for cell in page_of(paper).cells:
        if cell.cell_type == "code" and not is_checked(cell):
            assert not cell.outputs
            assert cell.execution_count is None


@each_page
def test_citations_resolve(paper):
    keys = set(re.findall(r"\{cite[a-z:]*\}`([^`]+)`", "\n".join(sources(paper, "markdown"))))
    known = set(re.findall(r"@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text()))
    cited = {key.strip() for group in keys for key in group.split(",")}
    assert cited <= known


def test_every_reference_has_what_the_rendering_needs():
    entries = re.findall(r"@\w+\{([^,]+),(.*?)\n\}", (ROOT / "book" / "references.bib").read_text(), re.DOTALL)
    for key, fields in entries:
        assert {"title", "author", "year"} <= set(re.findall(r"^\s*(\w+)\s*=", fields, re.MULTILINE)), key
    assert len(entries) >= len(PAGES)


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def own_name(path):
    return ".".join(path.relative_to(ROOT / "lib").with_suffix("").parts)


@each_module
def test_imports_point_downwards(path):
    imported = set(imports_of(ast.parse(path.read_text())))
    assert not any(name.split(".")[0] == "paperbook" for name in imported), "the library knows nothing of the press"
    papers = {p.module_name for p in CATALOG.papers} - {own_name(path)}
    assert not imported & papers, "what two papers need moves into the shared modules"


@each_module
def test_no_device_is_hard_coded(path):
    assert not re.search(r"\.cuda\(|['\"]cuda['\"]", path.read_text())


@each_module
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says why anyone should care"
    public = [
        node
        for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_a_function_that_raises_says_so():
    """A public function that checks its arguments documents the error."""
    silent = []
    for path in LIBRARY:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and path.stem != "checks":
                calls = {c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
                raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                checks = any(name.startswith("require_") for name in calls)
                if (raises or checks) and "Raises:" not in (ast.get_docstring(node) or ""):
                    silent.append(f"{own_name(path)}.{node.name}")
    assert not silent


@each_page
def test_a_module_can_be_read_in_one_sitting(paper):
    """The budget is 40 to 200 lines of code; a paper of three variants may take a quarter more. Docstrings are free."""
    code = ast.unparse(_without_docstrings(ast.parse((ROOT / paper.module).read_text())))
    assert 30 <= len(code.splitlines()) <= 250


def _without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_requirements_are_pinned_exactly():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines if line)


def test_the_shared_code_has_no_paper_names():
    shared = [p for p in LIBRARY if p.parent.name in ("data", "nn", "zoo", "paperlab")]
    slugs = {p.slug.replace("-", "_") for p in PAGES if "-" in p.slug}
    for path in shared:
        assert not [slug for slug in slugs if slug in path.read_text()], path
