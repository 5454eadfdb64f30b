"""The scripts that the site serves itself: from npm once, from a CDN loudly, never silently."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from paperbook.site import vendor as module
from paperbook.site.vendor import WANTED, vendor

BOOK = Path(__file__).resolve().parents[2] / "book"


@pytest.fixture
def root(tmp_path):
    """A checkout that asks for the book's packages."""
    (tmp_path / "book").mkdir()
    for name in module.ASKED:
        (tmp_path / "book" / name).write_text((BOOK / name).read_text())
    return tmp_path


def pretend(monkeypatch, returncode=0, stderr=""):
    """An npm that installs one file for every pattern, and counts its calls."""
    calls = []

    def run(command, cwd, **_):
        calls.append(command)
        for package, patterns in WANTED.items():
            for pattern in patterns:
                path = Path(cwd, "node_modules", package, pattern.replace("**/", "").replace("*", "x"))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(package)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(module.subprocess, "run", run)
    return calls


def test_installs_once_and_again_when_the_lock_changes(root, monkeypatch):
    calls = pretend(monkeypatch)
    folder = vendor(root)
    assert (folder / "mathjax/es5/tex-mml-chtml.js").exists()
    assert not (root / "_build" / "npm").exists()  # 150 MB of packages do not stay
    assert vendor(root) == folder
    assert len(calls) == 1
    (root / "book" / "package-lock.json").write_text("{}")
    vendor(root)
    assert len(calls) == 2


@pytest.mark.parametrize("cause", ["missing", "offline"])
def test_without_npm_the_cdn_is_used_and_the_build_says_so(root, monkeypatch, capsys, cause):
    if cause == "missing":
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
    else:
        pretend(monkeypatch, 1, "npm error\nnpm error network ENOTFOUND")
    assert vendor(root) is None
    said = capsys.readouterr().out
    assert "CDN" in said
    assert ("apt-get install npm" if cause == "missing" else "ENOTFOUND") in said
    calls = pretend(monkeypatch)  # the next build tries again
    assert vendor(root)
    assert calls


def test_versions_are_pinned_and_no_registry_is_named():
    asked = json.loads((BOOK / "package.json").read_text())["dependencies"]
    assert set(asked) == set(WANTED)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in asked.values())
    packages = json.loads((BOOK / "package-lock.json").read_text())["packages"]
    for name, version in asked.items():
        assert packages[f"node_modules/{name}"]["version"] == version
    for name, entry in packages.items():
        assert "resolved" not in entry
        assert not name or entry["integrity"].startswith("sha512-")
