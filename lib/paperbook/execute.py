"""Execute one page, in a process of its own.

The workflow starts one such process a notebook, so that a page can crash, hang or run out of memory without touching
another. It leaves the executed notebook, or a report that says which cell failed and why; never both, never half.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from paperbook.catalog import find_root
from paperbook.errors import FAILED, INTERRUPTED, OK, PressError
from paperbook.notebook import NotebookError, read
from paperbook.paths import write_whole
from paperbook.profile import PROFILES

TIME_LIMIT = {
    "pocket": 600,
    "full": 6 * 3600,
}  # seconds a notebook; generous, as machines differ and budgets are tested
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
INJECTED = "injected-parameters"  # papermill's tag for the cell that it adds


@dataclass(frozen=True)
class Failure:
    """Why a page has no executed notebook. ``cell`` counts the cells of the source from 0; None is before the first."""

    notebook: str
    error: str
    log: str
    cell: int | None = None
    line: str = ""

    def __str__(self) -> str:
        where = self.notebook if self.cell is None else f"{self.notebook}, cell {self.cell}: {self.line}"
        return f"{where}\n    {self.error}\n    log: {self.log}"


class PageError(PressError):
    """A page that did not run to its end."""

    def __init__(self, error: str, cell: int | None = None, line: str = "", details: str = "") -> None:
        super().__init__(error, FAILED)
        self.cell, self.line, self.details = cell, line, details


def report_path(log: Path) -> Path:
    """The failure report that belongs to a log."""
    return log.with_suffix(".json")


def load_failure(log: Path) -> Failure | None:
    """The report that a failed page left, if it could leave one."""
    try:
        return Failure(**json.loads(report_path(log).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def execute(source: Path, *, profile: str = "pocket", seconds: float | None = None) -> NotebookNode:
    """Run the notebook ``source`` in its own folder and return it with its outputs; the file is not touched.

    ``seconds`` limits the whole notebook, by default to ``TIME_LIMIT`` of the profile.

    Raises:
        PageError: it is no notebook, a cell raised, the kernel died, or the time was up.
    """
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    limit = seconds or TIME_LIMIT[profile]
    try:
        read(source)
    except NotebookError as error:
        raise PageError(f"{error}; `git checkout -- {source.name}` in its folder restores the committed one") from None
    began, running = time.monotonic(), _Running()
    try:
        notebook = _papermill(source, profile, running, began + limit)
    except PapermillExecutionError as error:
        details = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        raise running.failed(f"{error.ename}: {error.evalue}", details) from None
    except CellTimeoutError:
        raise running.failed(
            f"TimeLimit: the notebook ran longer than {limit:g} s; make it faster, or raise --time-limit"
        ) from None
    except DeadKernelError:
        raise running.failed(
            "DeadKernel: the kernel died without an exception (no memory left, a crash in compiled code, os._exit)"
        ) from None
    except (NoSuchKernel, RuntimeError) as error:
        raise running.failed(f"{type(error).__name__}: {error}") from None
    duration = round(time.monotonic() - began, 2)
    kernel = resource.getrusage(resource.RUSAGE_CHILDREN)  # it has ended, and this process has started no other
    cpu = round(kernel.ru_utime + kernel.ru_stime, 2)  # what a budget can be held against on a busy machine
    notebook.metadata["papermill"] = {"duration": duration, "cpu": cpu, "parameters": {"profile": profile}}
    return notebook


class _Running:
    """The cell that runs now, told by nbclient: a dead kernel cannot say where it was."""

    def __init__(self) -> None:
        self.cell: NotebookNode | None = None
        self.index: int | None = None
        self.injected = 0

    def begin(self, cell: NotebookNode, cell_index: int) -> None:
        self.cell, self.index = cell, cell_index
        self.injected += INJECTED in cell.metadata.get("tags", [])

    def failed(self, error: str, details: str = "") -> PageError:
        if self.cell is None or self.index is None:
            return PageError(error, details=details)
        return PageError(error, self.index - self.injected, (self.cell.source.strip().splitlines() or [""])[0], details)


def _papermill(source: Path, profile: str, running: _Running, deadline: float) -> NotebookNode:
    from papermill import execute_notebook
    from traitlets.config import Config

    # Sockets in the file system: two kernels that start at once can be given the same TCP port. The path is short
    # because a Unix socket's name may have about 100 characters.
    sockets = Path(tempfile.mkdtemp(prefix="press-"))
    config = Config(KernelManager={"transport": "ipc", "connection_file": str(sockets / "k.json")})
    try:
        with _environment(source, profile):
            return execute_notebook(
                source,
                None,
                parameters={"profile": profile} if profile != "pocket" else None,  # pocket is what the page says anyway
                kernel_name="python3",
                language="python",
                cwd=source.parent,
                progress_bar=False,
                request_save_on_cell_execute=False,
                config=config,
                timeout_func=lambda _: max(deadline - time.monotonic(), 0.01),  # 0 would mean no limit
                iopub_timeout=60,
                shutdown_kernel="immediate",
                on_cell_execute=running.begin,
            )
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


@contextlib.contextmanager
def _environment(source: Path, profile: str) -> Iterator[None]:
    """What the kernel inherits: this checkout's library, the profile, and one thread, as pages run side by side."""
    before = dict(os.environ)
    library = find_root(source.parent) / "lib"
    path = [str(library), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PAPERLAB_PRESS="1", PAPERLAB_PROFILE=profile, PYTHONPATH=os.pathsep.join(path))
    for name in THREADS:
        if profile == "pocket":
            os.environ[name] = "1"
        else:
            os.environ.pop(name, None)  # Snakemake sets them to the job's share; a page beside a GPU may use the cores
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_page(
    source: Path, target: Path, log: Path | None = None, *, profile: str = "pocket", seconds: float | None = None
) -> Failure | None:
    """Execute ``source`` into ``target``; on failure leave ``target`` alone, and a report beside ``log``."""
    if log:
        report_path(log).unlink(missing_ok=True)
    try:
        notebook = execute(source, profile=profile, seconds=seconds)
        write_whole(target, nbformat.writes(notebook) + "\n")
    except PressError as error:
        root = find_root(source.parent)
        failure = Failure(
            notebook=str(source.relative_to(root)),
            error=str(error),
            log=os.path.relpath(log, root) if log else "none kept",
            cell=getattr(error, "cell", None),
            line=getattr(error, "line", ""),
        )
        print(failure, getattr(error, "details", ""), sep="\n\n", flush=True)
        if log:
            with contextlib.suppress(PressError):  # a full disk: the log and the exit code must do
                write_whole(report_path(log), json.dumps(asdict(failure), indent=1, ensure_ascii=False) + "\n")
        return failure
    return None


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, so that `kill -9` on the press leaves nothing running."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(argv: list[str] | None = None) -> int:
    """`python -m paperbook.execute SOURCE TARGET`: what the workflow runs for each page."""
    parser = argparse.ArgumentParser(prog="python -m paperbook.execute", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--log", type=Path, help="a file for all that the page's processes print")
    parser.add_argument("--profile", choices=PROFILES, default="pocket")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS")
    args = parser.parse_args(argv)
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind, so that the kernel is taken down as well
    log = args.log and args.log.resolve()
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:  # file descriptors, not sys.stdout: a crash in compiled code writes to them
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    logging.basicConfig(level=logging.WARNING)
    source, target = args.source.resolve(), args.target.resolve()
    try:
        return FAILED if run_page(source, target, log, profile=args.profile, seconds=args.time_limit) else OK
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
