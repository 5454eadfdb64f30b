"""Checks of the built site: nothing from anybody else, no dead end, no picture without words.

The files are read as a browser would resolve them, without running scripts; `tests/browser` watches what scripts do.
"""

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

HERE = "paperlab.invalid"  # a host that exists nowhere, to resolve references against
# Attributes that make a browser fetch something; a link is followed only by a reader who wants to.
FETCHED = {"src", "srcset", "poster", "data"}
LINKED = {"stylesheet", "icon", "preload", "modulepreload", "manifest", "prefetch", "preconnect", "dns-prefetch"}
DATA = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
WIDGETS = "application/vnd.jupyter.widget-state+json"


@dataclass
class Seen(HTMLParser):
    """What one page refers to and what it can be referred to by."""

    anchors: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    wordless: list[str] = field(default_factory=list)
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note references, anchors and descriptions."""
        named = {name: value or "" for name, value in attrs}
        self.anchors.update(filter(None, (named.get("id"), named.get("name") if tag == "a" else None)))
        for name in FETCHED & set(named):
            self.fetched += [part.split()[0] for part in named[name].split(",") if part.strip()]
        href = named.get("href")
        if href and tag == "link" and LINKED & set(named.get("rel", "").split()):
            self.fetched.append(href)
        elif href and tag in ("a", "area", "link"):
            self.links.append(href)
        if tag == "img" and self._wordless(named):
            self.wordless.append(named.get("src", "")[:60])
        self.fetched += re.findall(r"url\(\s*['\"]?([^'\")]+)", named.get("style", ""))
        self.inside = named.get("type", "script") if tag == "script" else tag if tag == "style" else ""

    def handle_data(self, data: str) -> None:
        """Look into styles, and into the widgets' state for the frames of interactive figures."""
        if self.inside == "style":
            self.fetched += _of_css(data)
        elif self.inside == WIDGETS:
            for model in json.loads(data)["state"].values():
                if "<img" in str(model.get("state", {}).get("value", "")):
                    frame = Seen()
                    frame.feed(model["state"]["value"])
                    self.fetched += frame.fetched
                    self.wordless += frame.wordless

    def handle_endtag(self, tag: str) -> None:
        """Leave a script or a style."""
        if tag in ("script", "style"):
            self.inside = ""

    @staticmethod
    def _wordless(named: dict[str, str]) -> bool:
        """No description; an empty one says that a picture only decorates, which a figure never does."""
        alt = named.get("alt")
        figure = "paperlab-figure" in named.get("class", "")
        return alt is None or (figure and not alt.strip()) or (bool(alt) and alt == named.get("src"))


def _of_css(text: str) -> list[str]:
    """The addresses that a style sheet makes a browser fetch."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def _read(path: Path) -> Seen:
    page = Seen()
    page.feed(DATA.sub("data:,", path.read_text(encoding="utf-8", errors="replace")))
    page.close()
    return page


def check_site(html: Path) -> list[str]:
    """Everything wrong with the site below ``html``, one sentence each, empty if all is well.

    Third-party references (scripts, styles, images, fonts; links that a reader may follow are none), links and anchors
    inside the site that lead nowhere, pictures without alternative text.
    """
    if not (html / "index.html").exists():
        return [f"{html} holds no site: index.html is missing"]
    # Themes leave templates among their static files; no reader sees those as pages.
    names = sorted(p.relative_to(html) for p in html.rglob("*.html"))
    pages = {name.as_posix(): _read(html / name) for name in names if "_static" not in name.parts}
    problems = []
    for name, page in pages.items():
        problems += [f"{name}: picture without alternative text: {source}" for source in page.wordless]
        problems += _resolve(html, name, page.fetched, pages, fetched=True)
        problems += _resolve(html, name, page.links, pages, fetched=False)
    for path in html.rglob("*.css"):
        name = path.relative_to(html).as_posix()
        problems += _resolve(html, name, _of_css(path.read_text(errors="replace")), pages, fetched=True)
    return list(dict.fromkeys(problems))


def _resolve(html: Path, name: str, references: list[str], pages: dict[str, Seen], *, fetched: bool) -> list[str]:
    """Follow each reference from the page ``name``."""
    problems = []
    for reference in dict.fromkeys(references):
        address, anchor = urldefrag(urljoin(f"https://{HERE}/{name}", reference.strip()))
        parts = urlsplit(address)
        if parts.scheme in ("data", "mailto", "javascript", "about"):
            continue
        if parts.hostname != HERE:
            if fetched:
                problems.append(f"{name}: third-party reference: {reference}")
            continue
        target = unquote(parts.path).lstrip("/") or "index.html"
        target = target + "index.html" if target.endswith("/") else target
        if not (html / target).is_file():
            problems.append(f"{name}: leads nowhere: {reference}")
        elif anchor and not fetched and target in pages and unquote(anchor) not in pages[target].anchors:
            problems.append(f"{name}: no such place on {target}: {reference}")
    return problems
