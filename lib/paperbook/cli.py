"""The command line of the press. Each command's work is done elsewhere; here are words, options and exit codes."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paperbook.catalog import CatalogError, Paper, find_root, load_catalog
from paperbook.errors import FAILED, INTERRUPTED, MACHINE, OK, USAGE, PressError
from paperbook.notebook import NotebookError
from paperbook.paths import Build
from paperbook.profile import PROFILES, resolve

CODES = """\
exit codes:
  0    all is well
  1    the work was done and something in it is wrong (a notebook failed, a verdict changed)
  2    the command was wrong (an unknown paper, an option that does not exist)
  3    the machine is not ready (a full disk, a taken port, something that is not installed)
  130  interrupted; run the same command again to resume
"""
CLUSTER = """\
What stands after `--` goes to Snakemake, which also runs the pages on a cluster:
  python -m paperbook build --profile full -- --executor slurm --jobs 20 --default-resources slurm_partition=gpu
"""


def _papers(root: Path, slugs: Sequence[str]) -> tuple[Paper, ...]:
    from paperbook.workflow import choose

    return choose(load_catalog(root), root, slugs)


def _execute(root: Path, papers: Sequence[Paper], args: argparse.Namespace) -> int:
    """Execute, and report what failed; the number of pages that did."""
    from paperbook.workflow import pages, run

    profile = args.profile or _profile()
    failures = run(root, papers, profile=profile, jobs=args.jobs, time_limit=args.time_limit, extra=args.extra)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    if failures:
        print(f"\n{pages(len(failures))} failed; mend them and run the same command again", file=sys.stderr)
    return len(failures)


def _profile() -> str:
    try:
        return resolve()
    except ValueError as error:
        raise PressError(str(error), USAGE) from None


def build(root: Path, args: argparse.Namespace) -> int:
    """Execute every page that may have changed, and render the site."""
    from paperbook.site import render

    papers = _papers(root, ())
    with Build(root).claimed():
        failed = _execute(root, papers, args)
        if failed < len(papers):
            render(root, Build(root).executed, Build(root).html)
    return FAILED if failed else OK


def execute(root: Path, args: argparse.Namespace) -> int:
    """Execute the pages named, or all, where something that they depend on has changed."""
    papers = _papers(root, args.slugs)
    with Build(root).claimed():
        return FAILED if _execute(root, papers, args) else OK


def page(root: Path, args: argparse.Namespace) -> int:
    """Execute and render one page."""
    from paperbook.site import render

    (paper,) = _papers(root, [args.slug])
    with Build(root).claimed():
        if _execute(root, [paper], args):
            return FAILED
        render(root, Build(root).executed, Build(root).html, slugs=[paper.slug])
    return OK


def serve(root: Path, args: argparse.Namespace) -> int:
    """Serve the built site on this machine; opens nothing."""
    from paperbook.serve import serve as run

    run(Build(root).html, args.port)
    return OK


def new(root: Path, args: argparse.Namespace) -> int:
    """Begin the page of a paper: notebook, module, tests, and its entries in the contents and the bibliography."""
    from paperbook.scaffold import create

    catalog = load_catalog(root)
    for path in create(root, catalog, args.slug):
        print(f"wrote {path}")
    paper = catalog.paper(args.slug)
    print(f"Next: {'' if paper.claims else f'write its claims into book/catalog/{paper.part}.yml, then '}"
          f"the module, the tests, the page; `python -m paperbook page {args.slug}` shows it.")  # fmt: skip
    return OK


def check(root: Path, args: argparse.Namespace) -> int:
    """Check the catalogue, the contract of the pages, and the built site where there is one."""
    from paperbook.site import check_site

    catalog = load_catalog(root)
    print(f"catalogue: {len(catalog.papers)} papers, {len(catalog.with_page(root))} with a page")
    contract = root / "tests" / "test_contract.py"
    if not contract.exists():
        raise PressError(f"{contract} is missing: it says what a page must have; restore it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(contract)]
    broken = subprocess.run(command, cwd=root, env=_with_library(root)).returncode
    html = Build(root).html
    problems = check_site(html) if html.is_dir() else []
    for problem in problems:
        print(f"site: {problem}")
    print(f"site: {len(problems)} problems" if html.is_dir() else "site: not built")
    return FAILED if broken or problems else OK


def _with_library(root: Path) -> dict[str, str]:
    path = [str(root / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def doctor(root: Path, args: argparse.Namespace) -> int:
    """Say what this machine lacks, and how to get it."""
    from paperbook.doctor import doctor as examine

    return OK if examine(root) else MACHINE


def strip(root: Path, args: argparse.Namespace) -> int:
    """Remove from notebooks what is not committed; exit code 1 if a file changed, as pre-commit wants it."""
    from paperbook.notebook import strip_file

    files = args.files or [root / paper.notebook for paper in load_catalog(root).with_page(root)]
    changed = [path for path in files if strip_file(path)]
    for path in changed:
        print(f"stripped {path}")
    return FAILED if changed else OK


def accept(root: Path, args: argparse.Namespace) -> int:
    """Copy the verdicts of executed pages into the committed notebooks."""
    from paperbook.notebook import accept as copy

    for paper in _papers(root, args.slugs):
        executed = Build(root).executed / paper.part / f"{paper.slug}.ipynb"
        print(f"{paper.notebook}: {'updated' if copy(root / paper.notebook, executed) else 'unchanged'}")
    return OK


def nbval(root: Path, args: argparse.Namespace) -> int:
    """Run nbval on the pages that changed and a rotating eighth of the rest, or on those named."""
    from paperbook.nbval import choose, run
    from paperbook.workflow import pages

    chosen = _papers(root, args.slugs)
    if not (args.all or args.slugs):
        wanted = choose(root, base=args.base, turn=args.turn)
        chosen = tuple(paper for paper in chosen if paper.slug in wanted)
    if not chosen:
        print("nbval: no page changed, and none has its turn")
        return OK
    print(f"nbval: {pages(len(chosen))}: {', '.join(paper.slug for paper in chosen)}", flush=True)
    return OK if run(root, chosen) else FAILED


def verdicts(root: Path, args: argparse.Namespace) -> int:
    """Compare the verdicts of the executed pages with the committed ones."""
    from paperbook.verdicts import check as compare

    return OK if compare(root, _papers(root, args.slugs)) else FAILED


def positive(kind: type) -> object:
    """An argparse type: a number above 0."""

    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    number.__name__ = kind.__name__
    return number


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text}")
    return port


_port.__name__ = "port"


def parser() -> argparse.ArgumentParser:
    """All commands, each with an example."""
    top = argparse.ArgumentParser(
        prog="python -m paperbook",
        description="The press of Paperlab: from notebooks to a book.",
        epilog="example: python -m paperbook page hopfield && python -m paperbook serve\n\n" + CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: object, *examples: str, more: str = "") -> argparse.ArgumentParser:
        listed = "examples:\n" + "".join(f"  python -m paperbook {run.__name__}{' ' * bool(e)}{e}\n" for e in examples)
        made = commands.add_parser(
            run.__name__,
            help=run.__doc__.splitlines()[0],
            description=run.__doc__,
            epilog="\n".join(filter(None, [listed, more, CODES])),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, extra=[])
        return made

    def execution(made: argparse.ArgumentParser) -> None:
        made.add_argument("--profile", choices=PROFILES, help="default: $PAPERLAB_PROFILE, else pocket")
        made.add_argument("--jobs", type=positive(int), metavar="N", help="pages at a time (default: 2; full: 1)")
        made.add_argument(
            "--time-limit", type=positive(float), metavar="SECONDS", help="for each page (default: 600; full: 6 hours)"
        )

    def slugs(made: argparse.ArgumentParser, many: str = "*") -> None:
        made.add_argument(
            "slugs", nargs=many, metavar="SLUG", help="papers by their slug (default: all that have a page)"
        )

    execution(command(build, "", "--jobs 4", more=CLUSTER))
    made = command(execute, "", "hopfield noprop", "hopfield --profile full", more=CLUSTER)
    slugs(made)
    execution(made)
    made = command(page, "hopfield")
    made.add_argument("slug", metavar="SLUG")
    execution(made)
    command(serve, "", "--port 8000").add_argument("--port", type=_port, default=0, help="default: a free one")
    command(new, "hopular").add_argument("slug", metavar="SLUG")
    command(check, "")
    command(doctor, "")
    made = command(strip, "", "notebooks/memory/hopfield.ipynb")
    made.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all pages")
    slugs(command(accept, "hopfield"), "+")
    made = command(nbval, "", "--base origin/main", "--all", "hopfield")
    slugs(made)
    made.add_argument("--all", action="store_true", help="every page")
    made.add_argument(
        "--base", metavar="REV", help="changed since this commit (default: where this branch left origin/main)"
    )
    made.add_argument("--turn", type=int, metavar="N", help="which eighth (default: goes round day by day)")
    slugs(command(verdicts, "", "hopfield"))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    own, extra = words[:cut], words[cut + 1 :]
    top = parser()
    args = top.parse_args(own)
    if extra and args.run not in (build, execute, page):
        top.error(f"{args.command} takes nothing after --")
    args.extra = extra
    try:
        return args.run(find_root(), args)
    except PressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (CatalogError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
