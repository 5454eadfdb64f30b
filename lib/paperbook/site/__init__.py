"""The site: from executed notebooks and the book's prose to a folder of HTML that needs nothing from anybody else."""

from paperbook.site.build import render
from paperbook.site.check import check_site

__all__ = ["check_site", "render"]
