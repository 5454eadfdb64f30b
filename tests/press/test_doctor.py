"""What a machine lacks, and how to get it."""

import importlib.metadata

from paperbook.cli import main
from paperbook.doctor import Finding, build_folder, examine, packages


def test_packages_are_compared_with_their_pins(tmp_path):
    requirements = tmp_path / "requirements.txt"
    here = importlib.metadata.version("pytest")
    requirements.write_text(f"# a comment\npytest=={here}\n")
    assert packages(requirements).there
    requirements.write_text(f"pytest=={here}.1\nno-such-package==1.0\n")
    finding = packages(requirements)
    assert not finding.there
    assert f"pytest {here}.1 (installed: {here})" in finding.detail
    assert "no-such-package 1.0 (installed: nothing)" in finding.detail
    assert f"pip install -r {requirements}" in finding.detail
    assert not packages(tmp_path / "missing.txt").there


def test_a_build_folder_that_cannot_be_written(tmp_path):
    assert build_folder(tmp_path).there
    (tmp_path / "_build" / "logs").rmdir()
    (tmp_path / "_build" / "logs").write_text("in the way")
    assert "cannot write" in build_folder(tmp_path).detail


def test_every_finding_that_is_missing_says_how_to_get_it(tiny_book, monkeypatch):
    monkeypatch.setenv("PATH", str(tiny_book))  # a machine without programs
    monkeypatch.setattr("paperbook.doctor.chromium", lambda: Finding("Chromium", True, "here"))
    found = {finding.name: finding for finding in examine(tiny_book)}
    assert not found["bash"].there
    assert "apt-get install bash" in str(found["bash"])
    assert str(found["bash"]).startswith("MISSING")
    assert str(found["npm"]).startswith("absent")


def test_the_exit_code_says_whether_the_book_can_be_built(tiny_book, monkeypatch, capsys):
    monkeypatch.chdir(tiny_book)
    monkeypatch.setattr("paperbook.doctor.chromium", lambda: Finding("Chromium", False, "get it", needed=False))
    assert main(["doctor"]) == 3  # without requirements.txt
    (tiny_book / "requirements.txt").write_text("")
    assert main(["doctor"]) == 0
    assert "absent   Chromium: get it" in capsys.readouterr().out
