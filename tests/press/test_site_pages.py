"""What the site generates from the executed notebooks: ledger, index, totals, cards, bylines."""

import base64
import io
import json
import re

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

from paperbook.catalog import load_catalog
from paperbook.claims import MIME, Ledger, compare, exact, trend
from paperbook.errors import PressError
from paperbook.site import pages, zoo
from paperbook.site.harvest import harvest

FIGURE = (
    '<figure><img class="paperlab-figure dark-light" alt="A &lt;rising&gt; line" width="2" height="2"'
    ' src="data:image/webp;base64,QUJD"></figure>'
)
NAMES = "Sch{\\\"a}fl, Bernhard and van der Maaten, Laurens and Pavlovi{\\'c}, M."


@pytest.fixture
def executed(tiny_book, monkeypatch):
    """The tiny book with its first paper executed: C1 supported, C2 contradicted."""
    monkeypatch.setenv("PAPERLAB_ROOT", str(tiny_book))
    ledger = Ledger("alpha")
    ledger.claim("C1", exact("error <b>", observed=0.0, tolerance=1e-9))
    ledger.claim("C2", compare("speed", [1.0, 1.1, 1.2], [2.0, 2.2, 2.1], better="higher"),
                 trend("speed with size", range(6), range(6), direction="rising"))  # fmt: skip
    output = nbformat.v4.new_output
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# It *works* <here>\n\nText."),
        nbformat.v4.new_code_cell("show()", outputs=[output("display_data", data={"text/html": FIGURE})]),
        nbformat.v4.new_code_cell("table()", outputs=[output("display_data", data={MIME: ledger.data()})]),
    ])  # fmt: skip
    path = tiny_book / "_build" / "executed" / "memory" / "alpha.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    return tiny_book


@pytest.fixture
def found(executed):
    """The harvested pages."""
    return harvest(load_catalog(executed).papers, executed / "_build" / "executed")


def test_harvest_reads_headline_verdicts_and_picture(found):
    (page,) = found
    assert page.headline == "It *works* <here>"
    assert page.verdicts == {"supported": 1, "contradicted": 1}
    assert page.picture == (b"ABC", "webp", "A <rising> line")
    assert page.docname == "notebooks/memory/alpha"


def test_a_broken_notebook_is_named(executed):
    path = executed / "_build" / "executed" / "memory" / "beta.ipynb"
    path.write_text("{half a notebo")
    with pytest.raises(PressError, match=r"beta\.ipynb.*execute beta again"):
        harvest(load_catalog(executed).papers, path.parent.parent)


def test_a_page_without_headline_is_an_error(executed):
    path = executed / "_build" / "executed" / "memory" / "beta.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("no heading")]), path)
    second = harvest(load_catalog(executed).papers, path.parent.parent)[1]
    with pytest.raises(PressError, match=r"beta\.ipynb: no headline"):
        _ = second.headline


def test_the_ledger_has_a_row_for_every_claim(executed, found):
    table = pages.ledger_table(load_catalog(executed), found)
    rows = re.findall(r"<tr data-part.*?</tr>", table)
    assert len(rows) == 2
    assert 'data-verdict="supported"' in rows[0]
    assert 'data-kind="compare trend"' in rows[1]
    assert "2 times" in rows[1]
    assert "notebooks/memory/alpha.html#claims" in rows[0]
    assert r'<span class="math notranslate nohighlight">\(x^2\)</span>' in rows[0]
    assert "error &lt;b&gt;" in rows[0], "text of a page is text and not HTML"
    assert "3–6" in rows[1], "n of both measurements"


def test_totals_count_every_verdict_once(found):
    assert {v: int(n) for n, v in re.findall(r"<b>(\d+)</b> ([a-z ]+)<", pages.totals(found))} == {
        "supported": 1, "contradicted": 1, "inconclusive": 0, "not tested": 0}  # fmt: skip
    assert 'href="../ledger.html?verdict=not+tested"' in pages.totals(found, "../")


def test_the_index_never_links_to_a_page_that_is_not_there(executed, found):
    index = pages.paper_index(load_catalog(executed), found)
    first, second = re.findall(r"<li data-part.*?</li>", index)
    assert '<a class="title" href="notebooks/memory/alpha.html">' in first
    assert 'data-verdict="supported contradicted"' in first
    assert "https://arxiv.org/abs/2001.00001" in first
    assert 'data-state="coming"' in second
    assert "still to come" in second
    assert "href" not in second


def test_chance_agrees_with_a_simulation(found):
    """A claim by `compare` and `trend` under no effect: how often it is supported and contradicted by luck."""
    total, support, contradict, ended = pages.by_chance(found)
    assert (total, dict(ended)) == (1, {"contradicted": 1})
    rng, counts = np.random.default_rng(0), {"supported": 0, "contradicted": 0, "inconclusive": 0}
    trials = 1500
    for _ in range(trials):
        a = compare("x", rng.normal(size=5), rng.normal(size=5), better="higher").verdict
        b = trend("y", range(7), rng.normal(size=7), direction="rising").verdict
        both = "contradicted" if "contradicted" in (a, b) else "supported" if a == b == "supported" else "inconclusive"
        counts[both] += 1
    assert counts["contradicted"] / trials == pytest.approx(contradict, abs=0.02)
    assert counts["supported"] / trials == pytest.approx(support, abs=0.005)


@pytest.mark.parametrize(("kind", "verdict", "counted", "support"), [
    ("exact", "supported", 1, 0.025),
    ("exact", "contradicted", 0, 0.0),
    ("not_tested", "not tested", 1, 0.0),
])  # fmt: skip
def test_what_needs_no_luck_is_no_luck(found, kind, verdict, counted, support):
    """An exact check beside a comparison leaves its luck as it is, or has decided already."""
    row = {"verdict": verdict, "measurements": [{"kind": kind, "verdict": verdict}, {"kind": "compare", "verdict": ""}]}
    found[0].__dict__["claims"] = [row]
    assert pages.by_chance(found)[:2] == (counted, support)


def test_authors_lose_their_latex(tiny_book):
    (tiny_book / "book" / "references.bib").write_text(f"@article{{alpha, title = {{T}}, author = {{{NAMES}}}}}")
    assert pages.authors_of(tiny_book)["alpha"] == ["Bernhard Schäfl", "Laurens van der Maaten", "M. Pavlović"]
    (tiny_book / "book" / "references.bib").write_text("@article{alpha, title = {T")
    with pytest.raises(PressError, match=r"references\.bib"):
        pages.authors_of(tiny_book)


@pytest.mark.parametrize(("n", "said"), [(1, "A0 ·"), (2, "A0 and A1 ·"), (5, "A3 and A4 ·"), (9, "A3 and 5 others ·")])
def test_a_byline_names_at_most_a_few(tiny_book, n, said):
    paper = load_catalog(tiny_book).paper("alpha")
    line = pages.byline(paper, [f"A{k}" for k in range(n)], ["energy"], True, False)
    assert said in line
    assert "[arXiv:2001.00001](https://arxiv.org/abs/2001.00001)" in line
    assert "[`energy`](#paperlab.memory.alpha.energy)" in line
    assert '<a href="alpha.ipynb" download>' in line
    assert "tests-" not in line


@pytest.fixture
def shelf(tmp_path):
    """A repository with one model's card."""
    folder = tmp_path / "lib" / "paperlab" / "zoo" / "weights"
    folder.mkdir(parents=True)
    score = {"value": 0.9, "low": 0.85, "high": 0.93, "n": 100}
    card = {"name": "pocket-x", "parameters": 2_500_000, "bytes": 5_000_000, "unit": "tokens", "seen": 3_000_000,
            "seconds": 120, "device": "CPU",
            "scores": {"easy": {**score, "bar": 0.8}, "hard": {**score, "bar": 0.95}, "free": score},
            "heads": {"induction": [[0.1234, 1.2], [0.0, 0.5]]}, "stream": {"median": [1.0, 2.04], "largest": [3, 40]},
            "samples": [["def", " f(<x>):\n    pass"]],
            "pictures": [["a <dot>.", g, base64.b64encode(bytes(range(12))).decode()] for g in (1.0, 3.0)]}  # fmt: skip
    (folder / "pocket-x.json").write_text(json.dumps(card))
    return tmp_path


def test_the_zoos_cards_say_what_was_reached(shelf, tmp_path):
    text = zoo.scores(shelf)
    assert "2.50 million parameters in 5.0 MB; 3.0 million tokens seen in 2 minutes (CPU)." in text
    assert "| easy | 0.900 [0.850, 0.930] | 100 | ≥ 0.8: reached |" in text
    assert "| hard | 0.900 [0.850, 0.930] | 100 | ≥ 0.95: **not reached** |" in text
    assert "| free | 0.900 [0.850, 0.930] | 100 |  |" in text
    assert zoo.scores(tmp_path / "nowhere") == ""


def test_a_model_shows_its_heads_its_stream_and_what_it_writes(shelf):
    heads = zoo.heads(shelf, "pocket-x")
    assert '<th scope="row">layer 1</th><td style="--score: 0.000">0.00</td>' in heads
    assert '<td style="--score: 1.000">1.20</td>' in heads
    assert "Highest: induction in layer 0, head 1 (1.20)." in heads
    stream = zoo.stream(shelf, "pocket-x")
    assert "| 1 | 2.0 | 40.0 |" in stream
    assert "The largest is 20 times its layer's median (largest, layer 1)." in stream
    assert "<b>def</b> f(&lt;x&gt;):\n    pass</pre>" in zoo.samples(shelf, "pocket-x")


def test_a_model_shows_what_it_paints(shelf):
    table = zoo.pictures(shelf, "pocket-x")
    assert '<th scope="row">a &lt;dot&gt;.</th>' in table
    assert [f"guidance {g}" in table for g in (1, 2, 3)] == [True, False, True]
    alt, source = re.findall(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', table)[1]
    assert alt == "a &lt;dot&gt;. At guidance 3."
    shown = Image.open(io.BytesIO(base64.b64decode(source)))
    assert shown.size == (2, 2)
    assert [shown.getpixel(at) for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [(k, k + 1, k + 2) for k in (0, 3, 6, 9)]


def test_the_map_of_a_part_shows_claims_as_squares_and_what_is_missing(executed):
    catalog = executed / "book" / "catalog" / "memory.yml"
    groups = [{"asks": "What fits in $n$?", "papers": ["alpha"]}, {"asks": "And then?", "papers": ["beta"]}]
    catalog.write_text(catalog.read_text() + yaml.safe_dump({"questions": groups}))
    part = load_catalog(executed).parts[0]
    text = pages.part_map(part, harvest(part.papers, executed / "_build" / "executed"))
    assert [question for question, _ in part.questions] == ["What fits in $n$?", "And then?"]
    assert re.findall(r'class="verdict ([\w-]+)" href="([^"]+)"', text) == [
        ("supported", "../notebooks/memory/alpha.html#claim-C1"),
        ("contradicted", "../notebooks/memory/alpha.html#claim-C2"),
    ]
    assert text.count('<li class="coming">') == 1


def test_a_measurement_in_a_sentence(found):
    text = pages.measured(found, "alpha", "C2")
    word, value = found[0].claims[1]["measurements"][0]["ours"].split(" ", 1)
    assert word == "difference"
    assert text.endswith(f'#claim-C2">{value}</a>')
    assert pages.measured(found, "alpha", "C2", "2") != text
    assert pages.measured(found, "beta", "C1") == "(not executed)"
    for asked in (("C3",), ("C2", "3"), ("C2", "0")):
        with pytest.raises(PressError, match="alpha has no measurement"):
            pages.measured(found, "alpha", *asked)
    found[0].claims[1]["machine"] = True
    assert pages.measured(found, "alpha", "C2", "3") == "(not measured on this machine)"
