"""The press against `jupyter-book build` with `execute_notebooks: force`: the same pages, side by side in one run.

Both get the same staged sources, the same kernels with one thread, and their own defaults otherwise: the press executes
two pages at a time, jupyter-book one after another. The site's scripts are fetched before the clocks start.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import psutil
import yaml

from paperbook.catalog import Paper, find_root, load_catalog
from paperbook.errors import PressError
from paperbook.execute import THREADS
from paperbook.notebook import read

ROUNDS = 3
COPIED = ("book", "lib", "_config.yml", "_toc.yml", "requirements.txt", "pyproject.toml")
CASES = ("cold", "no change", "one page changed")
KEPT = {"scripts", "vendor.stamp"}  # of the build folder, before a cold start


def run(quick: bool = False) -> None:
    """Three rounds over all pages, or one over two pages; prints seconds, ratios and the peak of memory."""
    from paperbook.site.vendor import vendor

    root = find_root()
    papers = load_catalog(root).with_page(root)[: 2 if quick else None]
    if not papers:
        raise PressError("no page to measure: `python -m paperbook new SLUG` starts one")
    seconds: dict[tuple[str, str], list[float]] = {(who, case): [] for who in ("press", "peer") for case in CASES}
    memory = {"press": 0, "peer": 0}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ours, peer = Path(folder) / "press", Path(folder) / "peer"
        _copy(root, ours, papers)
        vendor(ours)
        environment = {
            **os.environ,
            **dict.fromkeys(THREADS, "1"),
            "PYTHONPATH": str(ours / "lib"),
            "PAPERLAB_ROOT": str(ours),  # the peer's notebooks lie where no catalogue is above them
            "PAPERLAB_PRESS": "1",
        }

        def measure(who: str, case: str) -> None:
            command = [sys.executable, "-m", "paperbook", "build"] if who == "press" else _peer_command(peer)
            spent, peak = timed(command, ours, environment)
            seconds[who, case].append(spent)
            memory[who] = max(memory[who], peak)
            print(f"  {case}, {who}: {spent:.1f} s, {peak / 2**20:.0f} MB", flush=True)

        for number in range(1 if quick else ROUNDS):
            print(f"round {number + 1}: {len(papers)} pages", flush=True)
            _clean(ours / "_build")
            measure("press", "cold")
            _peer(ours, peer, papers)
            measure("peer", "cold")
            for case in CASES[1:]:
                if case == "one page changed":
                    for place in (ours, peer / "stage"):
                        _edit(place / papers[0].notebook, f"Changed in round {number + 1}.")
                for who in ("press", "peer"):
                    measure(who, case)
            _executed(peer)
    _table(seconds, memory)


def timed(command: Sequence[str], cwd: Path, environment: dict[str, str]) -> tuple[float, int]:
    """Seconds that a command takes, and the most resident memory of all its processes together, in bytes.

    Raises:
        PressError: it fails.
    """
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, cwd=cwd, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.1)
        spent = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise PressError(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    return spent, peak


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def _copy(root: Path, target: Path, papers: Sequence[Paper]) -> None:
    for name in COPIED:
        source = root / name
        copy: Callable = shutil.copytree if source.is_dir() else shutil.copy
        target.mkdir(parents=True, exist_ok=True)
        copy(source, target / name)
    for paper in papers:
        (target / paper.notebook).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / paper.notebook, target / paper.notebook)


def _clean(build: Path) -> None:
    for path in build.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _peer(ours: Path, peer: Path, papers: Sequence[Paper]) -> None:
    """What the press staged, with the notebooks as they are committed and the order to execute them."""
    shutil.rmtree(peer, ignore_errors=True)
    shutil.copytree(ours / "_build" / "stage", peer / "stage")
    shutil.copytree(ours / "_build" / "scripts", peer / "scripts")
    for paper in papers:
        shutil.copy(ours / paper.notebook, peer / "stage" / paper.notebook)
    path = peer / "stage" / "_config.yml"
    config = yaml.safe_load(path.read_text())
    config["execute"] = {"execute_notebooks": "force", "timeout": -1}
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def _peer_command(peer: Path) -> list[str]:
    call = "from jupyter_book.cli.main import main; main()"
    return [sys.executable, "-c", call, "build", str(peer / "stage"), "--path-output", str(peer)]


def _executed(peer: Path) -> None:
    """jupyter-book goes on when a notebook fails, and leaves a report."""
    if reports := list((peer / "_build" / "html" / "reports").rglob("*.log")):
        raise PressError(f"jupyter-book could not execute {reports[0].stem}:\n{reports[0].read_text()[-2000:]}")


def _edit(notebook: Path, sentence: str) -> None:
    page = read(notebook)
    last = [cell for cell in page.cells if cell.cell_type == "markdown"][-1]
    last.source += f"\n\n{sentence}"
    nbformat.write(page, notebook)


def _table(seconds: dict[tuple[str, str], list[float]], memory: dict[str, int]) -> None:
    print(f"\n{'':18}{'press':>10}{'jupyter-book':>14}   jupyter-book / press")
    for case in CASES:
        ours, theirs = seconds["press", case], seconds["peer", case]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
        print(
            f"{case:18}{statistics.median(ours):>8.1f} s{statistics.median(theirs):>12.1f} s"
            f"   {statistics.median(ratios):.2f}{spread}"
        )
    print(
        f"{'peak memory':18}{memory['press'] / 2**20:>7.0f} MB{memory['peer'] / 2**20:>11.0f} MB"
        f"   {memory['peer'] / memory['press']:.2f}"
    )
