"""One run of Sphinx with jupyter-book's configuration: `python -m paperbook.site.sphinx_run STAGE HTML DOCTREES HOW`.

HOW is `changed`, `all` (write every page) or `fresh` (read and write every page). A process of its own, because Sphinx
leaves traces in docutils, and so that an interrupt ends it and nothing else.
"""

import sys
from pathlib import Path

from jupyter_book import config
from jupyter_book.sphinx import build_sphinx

# jupyter-book always loads it, this book has no use for it, and it puts the same script on every page twice.
UNUSED = "sphinx_thebe"


def main(stage: str, html: str, doctrees: str, how: str) -> int:
    """Sphinx's exit status."""
    defaults = config.get_default_sphinx_config()
    defaults["extensions"] = [name for name in defaults["extensions"] if name != UNUSED]
    config.get_default_sphinx_config = lambda: defaults
    result = build_sphinx(
        stage,
        html,
        noconfig=True,
        path_config=Path(stage) / "_config.yml",
        confoverrides={"external_toc_path": "_toc.yml", "latex_individualpages": False},
        doctreedir=doctrees,
        force_all=how != "changed",
        freshenv=how == "fresh",
        jobs=2,
    )
    return result if isinstance(result, int) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
