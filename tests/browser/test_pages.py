"""Every page of the built site, as a reader's browser sees it."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from .conftest import SITE, pages, papers

pytestmark = pytest.mark.browser

# The frame that is seen, of all that an interactive figure keeps.
VISIBLE = (
    "box => [...box.querySelectorAll('img')].filter(i => i.checkVisibility() && i.clientHeight > 20).map(i => i.alt)"
)
BROKEN = "() => [...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).map(i => i.src)"
TYPESET = "() => [...document.querySelectorAll('main .math')].every(m => m.querySelector('mjx-container'))"
# Displayed equations that are wider than their column: their ends are cut off, or hidden behind a scroll bar.
TOO_WIDE = """() => [...document.querySelectorAll('main mjx-container[display="true"]')]
    .filter(c => c.querySelector('mjx-math').getBoundingClientRect().width > c.parentElement.clientWidth + 1)
    .map(c => c.parentElement.id || c.querySelector('mjx-assistive-mml')?.textContent)"""


def wait_for_frame(page, box, test: str, alt: str) -> None:
    """Until the frame that is seen stands in this relation to one that was."""
    page.wait_for_function(f"([box, alt]) => ({VISIBLE})(box)[0] {test} alt", arg=[box.element_handle(), alt])


def follow(page, link) -> None:
    """Click a link once everything that the page asked for is there: a request that is cut off counts as failed."""
    page.wait_for_load_state("networkidle")
    link.click()


@pytest.mark.parametrize("name", pages())
def test_page_works_offline(visit, name):
    """No console error, no failed or foreign request (the fixture says so), mathematics typeset, pictures there."""
    page = visit(name).page
    assert page.locator("h1:visible").count() == 1
    assert page.evaluate(BROKEN) == []
    assert page.evaluate(TYPESET)
    assert page.evaluate(TOO_WIDE) == []
    assert page.locator("mjx-merror").count() == 0


@pytest.mark.parametrize("name", papers())
def test_sliders_by_mouse_and_keyboard(visit, name):
    """Each slider can be reached with Tab, moved with the arrows and the mouse, has a name and says its value."""
    page = visit(name).page
    boxes = page.locator(".paperlab-explore")
    assert boxes.count() >= 1
    for k in range(boxes.count()):
        box = boxes.nth(k)
        handles = box.locator(".noUi-handle")
        assert handles.count() >= 1
        for j in range(handles.count()):
            handle = handles.nth(j)
            assert handle.get_attribute("aria-label")
            handle.evaluate(
                "h => { const all = [...document.querySelectorAll('a[href], button, summary, [tabindex]')]"
                ".filter(e => e.tabIndex >= 0 && e.checkVisibility()); all[all.indexOf(h) - 1].focus(); }")  # fmt: skip
            page.keyboard.press("Tab")
            assert handle.evaluate("h => h === document.activeElement"), "Tab does not reach the slider"
            page.keyboard.press("Home")
            first, said = box.evaluate(VISIBLE), handle.get_attribute("aria-valuetext")
            assert len(first) == 1, "exactly one frame is seen"
            page.keyboard.press("ArrowRight")
            wait_for_frame(page, box, "!==", first[0])
            assert len(box.evaluate(VISIBLE)) == 1
            assert handle.get_attribute("aria-valuetext") != said
            page.keyboard.press("End")
            last = box.evaluate(VISIBLE)
            page.keyboard.press("Home")
            wait_for_frame(page, box, "===", first[0])
            bar = box.locator(".noUi-target").nth(j).bounding_box()
            page.mouse.click(bar["x"] + bar["width"] - 1, bar["y"] + bar["height"] / 2)
            wait_for_frame(page, box, "===", last[0])


def luminance(rgb) -> np.ndarray:
    """Relative luminance of sRGB colours in 0..255, as WCAG 2 defines it."""
    c = np.asarray(rgb, dtype=float) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return c @ np.array([0.2126, 0.7152, 0.0722])


def contrast(a, b) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    high, low = sorted((float(luminance(a)), float(luminance(b))), reverse=True)
    return (high + 0.05) / (low + 0.05)


# The colour of an element's text and of what lies behind it.
COLOURS = """e => {
  const parse = (s) => s.match(/[\\d.]+/g).map(Number);
  let behind = e, ground;
  do { ground = parse(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
  while (behind && ground.length > 3 && ground[3] === 0);
  return [parse(getComputedStyle(e).color).slice(0, 3), ground.slice(0, 3)];
}"""
TEXTS = ["main p", ".paperlab-byline p", ".paperlab-byline a", "figcaption", ".verdict", ".paperlab-ledger td",
         ".paperlab-explore .widget-label", ".paperlab-explore .widget-readout", ".bd-sidebar-primary a"]  # fmt: skip


@pytest.mark.parametrize("name", papers())
def test_readable_by_day_and_by_night(visit, name):
    """Figures stand on white with strong contrast, measured on what is drawn; texts have at least WCAG's 4.5."""
    page = visit(name).page
    figures = [figure for figure in page.locator("img.paperlab-figure").all() if figure.is_visible()]
    assert figures
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("s => document.documentElement.dataset.theme === s", arg=scheme)
        for selector in TEXTS:
            for element in page.locator(selector).all()[:3]:
                ink, ground = element.evaluate(COLOURS)
                assert contrast(ink, ground) >= 4.5, f"{scheme}, {selector}: {ink} on {ground}"
    for figure in figures:
        look = figure.evaluate(
            "i => { const s = getComputedStyle(i); return [s.backgroundColor, s.filter, s.opacity]; }"
        )
        assert look == ["rgb(255, 255, 255)", "none", "1"]
    for figure in (figures[0], figures[-1]):  # at night, as drawn: the first, and the frame of the interactive one
        pixels = np.asarray(Image.open(io.BytesIO(figure.screenshot())).convert("RGB")).reshape(-1, 3)
        ground = Counter(map(tuple, pixels[::7].tolist())).most_common(1)[0][0]
        ink = pixels[np.argsort(luminance(pixels))[len(pixels) // 200]]
        assert contrast(ground, ink) > 4.5, f"{figure.get_attribute('alt')[:60]}: {ground} against {ink}"


def rare_word(name: str, texts: dict[str, Counter]) -> str:
    """A long word of this page's prose that the fewest other pages use."""
    words = [w for w in texts[name] if w.isascii() and w.isalpha() and w.islower() and len(w) >= 6]
    return min(words, key=lambda w: (sum(w in text for text in texts.values()), -texts[name][w], w))


@pytest.fixture(scope="module")
def texts() -> dict[str, Counter]:
    """The words of every paper's prose."""
    found = {}
    for name in papers():
        prose = " ".join(re.findall(r"<p>(.*?)</p>", (SITE / name).read_text(), re.S))
        found[name] = Counter(word.strip(".,;:()") for word in re.sub(r"<[^>]+>", " ", prose).split())
    return found


@pytest.mark.parametrize("name", papers())
def test_search_finds_a_paper_by_a_word_of_its_text(visit, texts, name):
    """Through the search field, as a reader would."""
    page = visit("index.html").page
    page.keyboard.press("Control+k")
    page.keyboard.type(rare_word(name, texts))
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    page.locator(f'#search-results a[href*="{name}"]').first.wait_for()


def test_navigation(visit):
    """Front page to a paper by its card, on with "next", back by the side bar, and home by the logo."""
    page = visit("index.html").page
    page.keyboard.press("Tab")
    assert "skip" in page.evaluate("() => document.activeElement.textContent").lower()
    card = page.locator(".paperlab-cards a").first
    wanted = card.get_attribute("href")
    follow(page, card)
    page.wait_for_url(f"**/{wanted}")
    assert page.locator(".bd-sidebar-primary a.current").is_visible()
    heading = page.locator("h1:visible").inner_text()
    follow(page, page.locator(".prev-next-area .right-next"))
    page.wait_for_function("old => document.querySelector('article h1')?.innerText !== old", arg=heading)
    follow(page, page.locator(".bd-sidebar-primary a", has_text="The ledger"))
    page.wait_for_url("**/ledger.html")
    follow(page, page.locator(".bd-sidebar-primary a.navbar-brand"))
    page.wait_for_url("**/index.html")


def test_a_page_and_its_api_lead_to_each_other(visit):
    """From a paper to its module, to the source and the tests there, and back."""
    name = papers()[0]
    page = visit(name).page
    follow(page, page.locator(".paperlab-byline a", has_text="library").first)
    page.wait_for_url("**/api/**")
    assert page.locator("h2", has_text="Source").count() == 1
    follow(page, page.locator(f'.paperlab-byline a[href*="{name}"]'))
    page.wait_for_url(f"**/{name}*")
    with page.expect_download() as download:
        page.locator(".paperlab-byline a", has_text="notebook").click()
    assert download.value.suggested_filename == name.rsplit("/", 1)[1].replace(".html", ".ipynb")


def shown(page, selector: str) -> list:
    """The rows that a filter leaves."""
    return [row for row in page.locator(selector).all() if row.is_visible()]


def test_ledger_filters_and_sorts(visit):
    """By list, by words, by the address, back to all; sorted by a header with the keyboard alone."""
    page = visit("ledger.html").page
    rows = page.locator("table.paperlab-all tbody tr")
    total = rows.count()
    assert total > 0
    verdict = rows.first.get_attribute("data-verdict")
    page.locator("select[name=verdict]").select_option(verdict)
    kept = shown(page, "table.paperlab-all tbody tr")
    assert kept
    assert {row.get_attribute("data-verdict") for row in kept} == {verdict}
    assert page.locator(".paperlab-filters output").inner_text().startswith(f"{len(kept)} of {total}")
    page.reload()
    assert page.locator("select[name=verdict]").input_value() == verdict, "the address keeps the filter"
    assert len(shown(page, "table.paperlab-all tbody tr")) == len(kept)
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("() => !document.querySelector('tbody tr[data-filtered-out]')")
    page.locator("input[name=text]").fill("no such words anywhere")
    assert shown(page, "table.paperlab-all tbody tr") == []
    page.locator("input[name=text]").fill("")
    header = page.locator("th", has_text="Verdict")
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    keys = [int(cell.get_attribute("data-key")) for cell in page.locator("tbody td:last-child").all()]
    assert keys == sorted(keys)
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"


def test_paper_index_filters(visit):
    """All papers are there; those to come are no links; filters by state, part, year, verdict and words."""
    page = visit("papers.html").page
    every = page.locator(".paperlab-papers li")
    total = every.count()
    page.locator("select[name=state]").select_option("coming")
    coming = len(shown(page, ".paperlab-papers li"))
    assert page.locator('.paperlab-papers li[data-state="coming"] a.title').count() == 0
    page.locator("select[name=state]").select_option("page")
    there = shown(page, ".paperlab-papers li")
    assert (len(there), coming) == (len(papers()), total - len(papers()))
    for row in there:
        href = row.locator("a.title").get_attribute("href")
        assert (SITE / href).exists()
    page.get_by_role("button", name="Show all").click()
    year = every.first.get_attribute("data-year")
    part = every.first.get_attribute("data-part")
    page.locator("select[name=year]").select_option(year)
    page.locator("select[name=part]").select_option(part)
    kept = shown(page, ".paperlab-papers li")
    assert {(r.get_attribute("data-year"), r.get_attribute("data-part")) for r in kept} == {(year, part)}
    assert len(shown(page, "main section section h2")) == 1, "empty parts are hidden"
    page.get_by_role("button", name="Show all").click()
    verdict = there[0].get_attribute("data-verdict").split()[0]
    page.locator("select[name=verdict]").select_option(verdict)
    assert all(verdict in r.get_attribute("data-verdict").split() for r in shown(page, ".paperlab-papers li"))


def test_totals_lead_to_the_filtered_ledger(visit):
    """The number on the front page is the number of rows behind it."""
    page = visit("index.html").page
    box = page.locator(".paperlab-totals a").first
    number = int(box.locator("b").inner_text())
    box.click()
    page.wait_for_url("**/ledger.html?*")
    page.wait_for_function("() => document.querySelector('.paperlab-filters output').textContent")
    assert len(shown(page, "table.paperlab-all tbody tr")) == number
