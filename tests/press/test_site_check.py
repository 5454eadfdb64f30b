"""The checks of a built site, each on a site with exactly one thing wrong."""

import json

import pytest

from paperbook.site import check_site

GOOD = """<html><head><link rel="stylesheet" href="_static/a.css"><link rel="canonical" href="https://elsewhere.example/">
</head><body><h1 id="top">x</h1><a href="sub/b.html?verdict=supported#deep">in</a> <a href="#top">up</a>
<a href="https://arxiv.org/abs/1">a link is no request</a> <a href="mailto:a@b.example">mail</a>
<img src="_static/p.png" alt="a picture"><img src="_static/p.png" alt="">
<img src="data:image/webp;base64,AAAA" alt="frame">
</body></html>"""


@pytest.fixture
def site(tmp_path):
    """A site with nothing wrong."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "sub" / "b.html").write_text('<p id="deep"><a href="../index.html">back</a><a href="../">home</a></p>')
    (tmp_path / "_static" / "a.css").write_text("/* url(https://x.example/comment) */ p { background: url(p.png) }")
    (tmp_path / "_static" / "p.png").write_bytes(b"x")
    return tmp_path


def widget(value: str) -> str:
    state = {"state": {"m": {"state": {"value": value}}}}
    return f'<script type="application/vnd.jupyter.widget-state+json">{json.dumps(state)}</script>'


def test_a_good_site_has_no_problems(site):
    assert check_site(site) == []


@pytest.mark.parametrize(("added", "said"), [
    ('<script src="https://cdn.example/x.js"></script>', "third-party"),
    ('<link rel="preload" href="//cdn.example/x.woff">', "third-party"),
    ('<img alt="x" src="http://pictures.example/x.png">', "third-party"),
    ('<img alt="x" srcset="_static/p.png 1x, https://pictures.example/x.png 2x">', "third-party"),
    ('<p style="background: url(https://x.example/a.png)">', "third-party"),
    ('<style>@import "https://fonts.example/css";</style>', "third-party"),
    ('<iframe src="https://video.example"></iframe>', "third-party"),
    ('<a href="nowhere.html">x</a>', "leads nowhere"),
    ('<a href="/sub/c.html">x</a>', "leads nowhere"),
    ('<script src="_static/lost.js"></script>', "leads nowhere"),
    ('<a href="sub/b.html#shallow">x</a>', "no such place"),
    ('<a href="#bottom">x</a>', "no such place"),
    ('<img src="_static/p.png">', "without alternative text"),
    ('<img src="_static/p.png" alt="_static/p.png">', "without alternative text"),
    ('<img class="paperlab-figure" src="_static/p.png" alt=" ">', "without alternative text"),
    (widget('<img class="paperlab-figure" src="data:image/webp;base64,AA">'), "without alternative text"),
    (widget('<img alt="x" src="https://pictures.example/x.png">'), "third-party"),
])  # fmt: skip
def test_each_fault_is_found_and_named(site, added, said):
    (site / "index.html").write_text(GOOD.replace("</body>", added + "</body>"))
    (problem,) = check_site(site)
    assert problem.startswith("index.html: ")
    assert said in problem


def test_style_sheets_and_deep_pages_are_followed(site):
    style = "p { background: url('https://x.example/a.png') } q { background: url(../lost.png) }"
    (site / "_static" / "a.css").write_text(style)
    (site / "sub" / "b.html").write_text('<a href="b.html#deep">x</a>')
    problems = check_site(site)
    assert {p.split(":")[0] for p in problems} == {"_static/a.css", "sub/b.html", "index.html"}


def test_no_site_is_a_problem(tmp_path):
    assert "index.html is missing" in check_site(tmp_path)[0]
