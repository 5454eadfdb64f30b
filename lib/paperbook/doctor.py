"""What this machine lacks for building and testing the book, and how to get it."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paperbook.errors import PressError
from paperbook.paths import Build


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. If it is not there and ``needed``, the book cannot be built."""

    name: str
    there: bool
    detail: str
    needed: bool = True

    def __str__(self) -> str:
        mark = "ok     " if self.there else "MISSING" if self.needed else "absent "
        return f"{mark}  {self.name}: {self.detail}"


def examine(root: Path) -> Iterator[Finding]:
    """Look at everything, the quick things first."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")
    yield packages(root / "requirements.txt")
    yield _program("bash", "apt-get install bash (Snakemake runs its jobs with it)")
    yield _program("git", "apt-get install git (nbval asks it which pages changed)")
    yield build_folder(root)
    yield _program("npm", "apt-get install npm; without it pages load their scripts from a CDN", needed=False)
    yield _program(os.environ.get("CC", "cc"), "apt-get install gcc (pages whose method is compiled need it)")
    yield chromium()
    yield gpu()


def packages(requirements: Path) -> Finding:
    """Is everything that is pinned installed, in that version?"""
    wrong = []
    try:
        lines = requirements.read_text().splitlines()
    except OSError:
        return Finding("packages", False, f"{requirements} is missing: restore it")
    for name, wanted in re.findall(r"^([\w.-]+)==([\w.]+)", "\n".join(lines), re.MULTILINE):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found.split("+")[0] != wanted:  # torch says 2.13.0+cpu
            wrong.append(f"{name} {wanted} (installed: {found})")
    if not wrong:
        return Finding("packages", True, f"as pinned in {requirements.name}")
    return Finding("packages", False, f"{', '.join(wrong)}; {sys.executable} -m pip install -r {requirements}")


def build_folder(root: Path) -> Finding:
    """Can the build folder be written to, and is there room?"""
    try:
        Build(root).prepare()
    except PressError as error:
        return Finding("build folder", False, str(error))
    return Finding("build folder", True, f"{shutil.disk_usage(root / '_build').free / 2**30:.1f} GB free")


def chromium() -> Finding:
    """Is there a browser for the tests of the site?"""
    get = "apt-get install chromium, or python -m playwright install --with-deps chromium; only browser tests need it"
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path and importlib.util.find_spec("playwright"):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as play:
            path = play.chromium.executable_path
    there = bool(path) and os.path.exists(path)
    return Finding("Chromium", there, path if there else get, needed=False)


def gpu() -> Finding:
    """Is there a GPU for the full profile? Asked of the driver: importing torch would take longer than all the rest."""
    command = shutil.which("nvidia-smi")
    named = command and subprocess.run(
        [command, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
    )
    names = named.stdout.strip().splitlines() if named and named.returncode == 0 else []
    return Finding("GPU", bool(names), ", ".join(names) or "none; only the full profile wants one", needed=False)


def _program(name: str, get: str, needed: bool = True) -> Finding:
    path = shutil.which(name)
    return Finding(name, bool(path), path or get, needed)


def doctor(root: Path) -> bool:
    """Print all findings; True if nothing that is needed is missing."""
    findings = []
    for finding in examine(root):
        print(finding, flush=True)
        findings.append(finding)
    return all(finding.there or not finding.needed for finding in findings)
