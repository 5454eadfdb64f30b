"""The built site in a real browser, with no way out: whatever is asked of another host fails, and fails the test."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("PAPERLAB_SITE") or ROOT / "_build" / "html")
# Only the loopback address resolves. (Playwright's own request blocking would switch the browser's cache off.)
ISOLATED = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip


def missing(what: str) -> None:
    """Where something is not there: a failure in CI, which must not pass by leaving out, a skip elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def pages() -> list[str]:
    """Every page of the site; those of the papers first, as they have the most to go wrong."""
    names = [p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.relative_to(SITE).parts]
    return sorted(names, key=lambda name: (not name.startswith("notebooks/"), name))


def papers() -> list[str]:
    """The pages of the papers."""
    return [name for name in pages() if name.startswith("notebooks/")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, keeps connections open, says nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where the site is served, on a free port of the loopback interface."""
    if not (SITE / "index.html").exists():
        missing(f"no site at {SITE}: run `make book` first")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Debian's Chromium, the one that CHROMIUM names, or Playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(path).exists():
            missing("no Chromium: apt-get install chromium, or python -m playwright install chromium, or set CHROMIUM")
        chromium = playwright.chromium.launch(executable_path=path, args=ISOLATED)
        yield chromium
        chromium.close()


@dataclass
class Opened:
    """A page in the browser, and everything that went wrong since it was opened."""

    page: object
    name: str
    troubles: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Collect console errors, uncaught exceptions, failed answers, and requests that leave this machine."""
        page, note = self.page, self.troubles.append
        page.on("console", lambda m: note(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: note(f"exception: {e}"))
        page.on("requestfailed", lambda r: note(f"failed: {r.url} {r.failure}"))
        page.on("response", lambda r: note(f"status {r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: note(f"third party: {r.url}") if self._foreign(r.url) else None)

    @staticmethod
    def _foreign(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1"

    def ready(self) -> "Opened":
        """Wait until mathematics is typeset and every interactive figure is drawn."""
        self.page.wait_for_function("() => document.readyState === 'complete'")
        if self.page.locator('script[src*="mathjax"]').count():
            self.page.wait_for_function("() => window.MathJax?.startup?.promise")
            self.page.evaluate("() => MathJax.startup.promise.then(() => 0)")
        views = self.page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count()
        if views:
            drawn = ".paperlab-explore:has(img):has(.noUi-handle[aria-label])"
            self.page.wait_for_function(f"n => document.querySelectorAll('{drawn}').length === n", arg=views)
        return self


@pytest.fixture(scope="session")
def context(browser: object) -> Iterator[object]:
    """One browsing session for all tests: scripts come from its cache, as for a reader who walks around."""
    session = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    session.set_default_timeout(20_000)
    yield session
    session.close()


@pytest.fixture
def visit(context: object, address: str) -> Iterator[object]:
    """Open a page of the site by its name; the test fails at its end if anything went wrong there."""
    all_opened: list[Opened] = []

    def open_page(name: str) -> Opened:
        opened = Opened(context.new_page(), name)
        all_opened.append(opened)
        opened.watch()
        opened.page.goto(address + name)
        return opened.ready()

    yield open_page
    for opened in all_opened:
        opened.page.close()
    assert [trouble for opened in all_opened for trouble in opened.troubles] == []
