"""The Sphinx extension of the site: what `_config.yml` cannot say.

It points MathJax and the widgets' loader at the scripts that the site serves itself, loads MathJax where mathematics
stands in generated HTML, and falls back to a CDN (the extensions' defaults) when the press could not vendor them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import ascii_lowercase

from docutils import nodes
from myst_nb.core.config import ipywidgets_js_factory
from myst_nb.sphinx_ import NbMetadataCollector
from myst_nb.sphinx_ext import add_global_html_resources
from pybtex.database import Entry
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style
from pybtex.style.labels import BaseLabelStyle
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.ext.mathjax import MATHJAX_URL


class AuthorYearLabels(BaseLabelStyle):
    """What a page calls a work is what the list of references calls it: ``Li et al., 2025``."""

    def format_labels(self, sorted_entries: Iterable[Entry]) -> Iterator[str]:
        """One label an entry; of equal ones, the second and later have a letter behind them."""
        seen = Counter()
        for entry in sorted_entries:
            names = [" ".join(map(str, p.rich_prelast_names + p.rich_last_names)) for p in entry.persons["author"]]
            who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
            label = f"{who}, {entry.fields['year']}"
            yield label + (ascii_lowercase[seen[label]] if seen[label] else "")
            seen[label] += 1


class AuthorYear(Style):
    """The plain style, sorted by author, with these labels instead of numbers."""

    default_label_style = AuthorYearLabels


register_plugin("pybtex.style.formatting", "author_year", AuthorYear)


def serve_scripts(app: Sphinx, config: Config) -> None:
    """Serve the vendored scripts below `_static/vendor`, or take MathJax and the widgets from their CDN without them.

    They lie beside the stage and not in its `_static`: jupyter-book puts every script it finds there on all pages.
    """
    scripts = Path(app.srcdir).parent / "scripts"
    if (scripts / "vendor").is_dir():
        config.html_static_path.append(str(scripts))
    else:
        config.mathjax_path = MATHJAX_URL
        config.nb_ipywidgets_js = ipywidgets_js_factory()


def read_in_parallel(app: Sphinx, config: Config) -> None:
    """Vouch for an extension that does not say so itself: it works after reading, and pages come out identical."""
    if extension := app.extensions.get("sphinx_multitoc_numbering"):
        extension.parallel_read_safe = extension.parallel_write_safe = True


def copy_styles_early(app: Sphinx) -> None:
    """myst-nb copies its style sheet last, so a first build lacks the checksum that every later one has."""
    Path(app.outdir, "_static").mkdir(parents=True, exist_ok=True)
    add_global_html_resources(app, None)


def note_mathematics(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx loads MathJax on pages with equations; it cannot see those inside our tables."""
    if any('class="math' in node.astext() for node in doctree.findall(nodes.raw)):
        app.env.get_domain("math").data["has_equations"][app.env.docname] = True


# The widgets ask MathJax 2 to typeset their labels; under MathJax 3 that call is an exception in the middle of drawing.
HUB = """(() => {
  const quiet = {Queue() {}};
  const ready = () => { MathJax.Hub = quiet; MathJax.startup.defaultReady(); };
  window.MathJax = {...window.MathJax, Hub: quiet, startup: {ready}};
})();"""


def prepare_widgets(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """On pages with widgets: say where require.js finds their modules and fonts, and keep MathJax 2 and 3 apart."""
    if NbMetadataCollector.get_js_files(app.env, page):
        base = context["pathto"]("_static/vendor/", 1)
        app.add_js_file(None, body=f"window.require = {{baseUrl: '{base}'}};", priority=100)
        app.add_js_file(None, body=HUB, priority=900)  # after Sphinx has written MathJax' settings


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.connect("config-inited", serve_scripts, priority=100)
    app.connect("config-inited", read_in_parallel)
    app.connect("builder-inited", copy_styles_early)
    app.connect("doctree-read", note_mathematics)
    app.connect("html-page-context", prepare_widgets, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
