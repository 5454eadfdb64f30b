"""Execute many pages: what may have changed runs again, two at a time, and one that fails stops no other.

Snakemake decides what runs and where. This module writes the plan that its Snakefile reads (each page with the files
that it depends on), watches what Snakemake says, and turns it into one line of progress and a list of failures.
"""

import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from paperbook.catalog import Catalog, CatalogError, Paper
from paperbook.dependencies import page_files
from paperbook.errors import MACHINE, USAGE, PressError
from paperbook.execute import TIME_LIMIT, Failure, die_with_parent, load_failure
from paperbook.paths import Build, unwritable, write_whole

JOBS = {"pocket": 2, "full": 1}  # side by side on this machine: two cores, or one GPU
LIBRARY = Path(__file__).resolve().parent.parent
EVENTS = {
    "start": re.compile(r"Job (\d+): (\S+)$"),
    "done": re.compile(r"Finished jobid: (\d+)\b"),
    "failed": re.compile(r"    jobid: (\d+)$"),  # only printed below "Error in rule"
    "total": re.compile(r"total +(\d+)$"),
}


def choose(catalog: Catalog, root: Path, slugs: Sequence[str] = ()) -> tuple[Paper, ...]:
    """The papers asked for, or all that have a page.

    Raises:
        PressError: no such paper, or no page of it yet.
    """
    written = catalog.with_page(root)
    try:
        chosen = tuple(catalog.paper(slug) for slug in dict.fromkeys(slugs)) or written
    except CatalogError as error:
        raise PressError(str(error), USAGE) from None
    for paper in chosen:
        if paper not in written:
            raise PressError(f"{paper.slug} has no page yet: `python -m paperbook new {paper.slug}` starts one", USAGE)
    if not chosen:
        raise PressError("no page to execute: `python -m paperbook new SLUG` starts one", USAGE)
    return chosen


def plan(root: Path, papers: Sequence[Paper], profile: str, time_limit: float | None = None) -> dict:
    """What the Snakefile reads: each page with everything that a change of its results can come from.

    Paths are relative to the build folder, so that a checkout may be moved, or its build be restored from a cache.
    The time limit is no part of the key: a page that ended within it would not differ.
    """
    build = Build(root).folder

    def entry(paper: Paper) -> dict:
        notebook = root / paper.notebook
        return {
            "notebook": os.path.relpath(notebook, build),
            "modules": [os.path.relpath(path, build) for path in page_files(notebook, root / "lib")],
            "claims": hashlib.sha256(repr(paper.claims).encode()).hexdigest()[:16],  # the page shows their text
        }

    pages = {page_name(paper): entry(paper) for paper in papers}
    return {"profile": profile, "time_limit": time_limit or TIME_LIMIT[profile], "pages": pages}


def page_name(paper: Paper) -> str:
    """`<part>/<slug>`: the page's place below `notebooks/`, `_build/executed/` and `_build/logs/`."""
    return f"{paper.part}/{paper.slug}"


def run(
    root: Path,
    papers: Sequence[Paper],
    *,
    profile: str = "pocket",
    jobs: int | None = None,
    time_limit: float | None = None,
    extra: Sequence[str] = (),
    out: TextIO | None = None,
) -> list[Failure]:
    """Bring the executed notebooks of ``papers`` up to date; the failures, in the papers' order.

    ``extra`` goes to Snakemake as it is, for example `--executor slurm --jobs 20`.

    Raises:
        PressError: the build folder cannot be written, or Snakemake did not start.
    """
    build = Build(root)
    build.prepare()
    if not (root / "requirements.txt").is_file():
        raise PressError(f"{root / 'requirements.txt'} is missing: it is part of every page's key; restore it")
    for orphan in build.executed.glob("*/*.ipynb"):  # of a page that was removed or renamed
        if not (root / "notebooks" / orphan.relative_to(build.executed)).exists():
            orphan.unlink()
    write_whole(build.folder / "plan.json", json.dumps(plan(root, papers, profile, time_limit), indent=1) + "\n")
    names = [page_name(paper) for paper in papers]
    durations = _Durations(build.folder / "durations.json")
    side_by_side = jobs or JOBS[profile]
    progress = Progress(names, side_by_side, durations.known, out or sys.stdout)
    command = [sys.executable, "-m", "snakemake", *(f"executed/{name}.ipynb" for name in names)]
    command += ["--snakefile", str(Path(__file__).with_name("Snakefile")), "--directory", str(build.folder)]
    command += ["--jobs", str(side_by_side), "--keep-going", "--rerun-incomplete", "--nolock", "--nocolor", *extra]
    code = None
    try:
        code = _watch(command, build, progress)
    finally:
        if progress.total or code == 0:
            progress.close()
        durations.save(progress.seconds)
    failures = [_failure(build, name) for name in names if name in progress.failed]
    if code and not failures:
        build.prepare(enough=0)  # a folder that became full or read-only explains itself better than Snakemake does
        log = build.logs / "snakemake.log"
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        hint = "; executors are packages of their own: pip install snakemake-executor-plugin-NAME" * (
            "executor" in last
        )
        raise PressError(f"Snakemake did not run the pages: {last}{hint}\n    log: {log}", MACHINE)
    return failures


def _failure(build: Build, name: str) -> Failure:
    log = build.logs / f"{name}.log"
    silent = Failure(f"notebooks/{name}.ipynb", "its process ended without a report", os.path.relpath(log, build.root))
    return load_failure(log) or silent


def _watch(command: list[str], build: Build, progress: "Progress") -> int:
    """Run Snakemake in a process group of its own, so that one signal ends it with all its jobs; its exit code."""
    shutil.rmtree(
        build.folder / ".snakemake" / "log", ignore_errors=True
    )  # one more file a run, for ever; ours is enough
    path = os.pathsep.join([str(LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        log = (build.logs / "snakemake.log").open("w")
    except OSError as error:
        raise unwritable(build.logs / "snakemake.log", error) from None
    with log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},  # absolute: the jobs run in another folder
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, log, lines), daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=0.5)
                except queue.Empty:
                    progress.refresh()
                    continue
                if line is None:
                    return process.wait()
                progress.hear(line)
        except KeyboardInterrupt:
            _end(process, patience=10)
            raise
        finally:
            _end(process, patience=0)


def _pump(source: TextIO, log: TextIO, lines: "queue.Queue[str | None]") -> None:
    for line in source:
        lines.put(line.rstrip("\n"))
        try:
            log.write(line)
            log.flush()
        except (OSError, ValueError):  # a full disk must not stop the reading, or Snakemake would wait for ever
            continue
    lines.put(None)


def _end(process: subprocess.Popen, patience: float) -> None:
    """End the group: with SIGTERM, so that kernels are taken down in order, then for certain."""
    if process.poll() is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(patience)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Durations:
    """How long each page took the last time, from which the time left is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, float] = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            self.known = {}

    def save(self, seconds: dict[str, float]) -> None:
        if seconds and self.path.parent.is_dir():
            write_whole(self.path, json.dumps({**self.known, **seconds}, indent=1, sort_keys=True) + "\n")


@dataclass
class Progress:
    """Snakemake's messages as one live line on a terminal, and as one line a finished page elsewhere."""

    names: Sequence[str]
    jobs: int
    known: dict[str, float]
    out: TextIO
    total: int | None = None
    began: float = field(default_factory=time.monotonic)
    running: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    _of_job: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.live = self.out.isatty()

    def hear(self, line: str) -> None:
        """Take in one line that Snakemake printed."""
        for event, pattern in EVENTS.items():
            found = pattern.match(line)
            if not found:
                continue
            if event == "total":
                self.total = self.total or int(found[1])
                self._say(f"to execute: {self.total} of {pages(len(self.names))}, {self.jobs} at a time")
            elif event == "start":
                self._of_job[found[1]] = found[2]
                self.failed.discard(found[2])  # Snakemake was asked to try again
                self.running[found[2]] = time.monotonic()
            elif (name := self._of_job.get(found[1])) in self.running:
                self._finish(name, event)
            self.refresh()
            return

    def _finish(self, name: str, event: str) -> None:
        spent = time.monotonic() - self.running.pop(name)
        if event == "done":
            self.seconds[name] = round(spent, 2)
        else:
            self.failed.add(name)
        if event == "failed" or not self.live:
            word = "FAILED" if event == "failed" else f"{spent:.1f} s"
            self._say(f"  {self._count()}  {name}  {word}{'' if self.live else self._left()}")

    def refresh(self) -> None:
        """Redraw the live line."""
        if self.live and self.total:
            line = f"  {self._count()}  {clock(time.monotonic() - self.began)}{self._left()}{self._now()}"
            width = shutil.get_terminal_size().columns - 1
            self.out.write(f"\r\033[K{line[:width]}")
            self.out.flush()

    def close(self) -> None:
        """Say how it went."""
        done, failed = len(self.seconds), len(self.failed)
        same = len(self.names) - (self.total or 0)
        words = [f"{done} executed", f"{same} up to date"] + [f"{failed} failed"] * bool(failed)
        left = (self.total or 0) - done - failed
        words += [f"{left} not finished"] * bool(left)
        self._say(f"{', '.join(words)} in {clock(time.monotonic() - self.began)}")

    def left(self) -> float | None:
        """Seconds until all is done, as far as one can know: pages take what they took, or what the others took."""
        spent = {**self.known, **self.seconds}
        if not spent or not self.total:
            return None
        typical = sum(spent.values()) / len(spent)
        now = time.monotonic()
        waiting = self.total - len(self.seconds) - len(self.failed) - len(self.running)
        work = [max(spent.get(name, typical) - (now - since), 0.0) for name, since in self.running.items()]
        return max((sum(work) + waiting * typical) / self.jobs, max(work, default=0.0))

    def _count(self) -> str:
        return f"{len(self.seconds) + len(self.failed):>{len(str(self.total))}}/{self.total}"

    def _now(self) -> str:
        return f" · {', '.join(self.running)}" if self.running else ""

    def _left(self) -> str:
        left = self.left()
        return f", about {clock(left)} left" if left and left >= 1 else ""

    def _say(self, text: str) -> None:
        self.out.write(f"\r\033[K{text}\n" if self.live else f"{text}\n")
        self.out.flush()


def pages(n: int) -> str:
    """`1 page`, `8 pages`."""
    return f"{n} page{'s' * (n != 1)}"


def clock(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
