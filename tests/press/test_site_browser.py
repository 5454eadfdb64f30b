"""The browser's tests never pass by leaving out: without Chromium they fail in CI, and elsewhere say how to get it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("ci", "word"), [("1", "failed"), ("", "skipped")])
@pytest.mark.parametrize("lacking", ["site", "Chromium"])
def test_what_is_missing_fails_in_ci_and_is_skipped_elsewhere(tmp_path, ci, word, lacking):
    if lacking == "Chromium":
        (tmp_path / "index.html").write_text("<h1>A site</h1>")
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"PAPERLAB_SITE": str(tmp_path)}
    environment |= {"CHROMIUM": "/nowhere/chromium"} if lacking == "Chromium" else {}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/browser", "-q", "-rfEs", "-k", "navigation", "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment | ({"CI": ci} if ci else {}), capture_output=True, text=True)  # fmt: skip
    assert word in done.stdout or (ci and "error" in done.stdout)
    assert (done.returncode == 0) == (not ci)
    assert ("apt-get install chromium" if lacking == "Chromium" else "make book") in done.stdout
