"""The command line: what people type by mistake, and what scripts rely on."""

import nbformat
import pytest

from paperbook import cli, site
from paperbook.errors import PressError
from paperbook.notebook import read
from paperbook.paths import Build, write_whole
from support import write_page

COMMANDS = ["build", "execute", "page", "serve", "new", "check", "doctor", "strip", "accept", "nbval", "verdicts"]


@pytest.fixture
def book(tiny_book, monkeypatch):
    """A checkout with one page, as the working directory; rendering only says what it was asked for."""
    monkeypatch.chdir(tiny_book / "book")  # any folder in it will do
    monkeypatch.delenv("PAPERLAB_PROFILE", raising=False)
    monkeypatch.setattr(site, "render", lambda root, executed, html, slugs=None: print("rendered", slugs))
    (tiny_book / "requirements.txt").write_text("")
    write_page(tiny_book, "alpha", "# NBVAL_CHECK_OUTPUT\nprint('C1 supported')")
    return tiny_book


def call(capsys, *words):
    try:
        code = cli.main(words)
    except SystemExit as end:  # argparse
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"  python -m paperbook {command}" in out
    assert "130  interrupted" in out


def test_help_lists_every_command(capsys):
    out = call(capsys, "--help")[1]
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "required: COMMAND"),
        (["bild"], "invalid choice: 'bild'"),
        (["page"], "required: SLUG"),
        (["page", "alpa"], "did you mean alpha"),
        (["execute", "alpha", "alhpa"], "did you mean alpha"),
        (["execute", "beta"], "beta has no page yet"),
        (["new", "alpah"], "did you mean alpha"),
        (["new", "alpha"], "exists already"),
        (["accept", "nothing-like-it"], "no paper 'nothing-like-it'"),
        (["build", "--jobs", "0"], "must be above 0"),
        (["build", "--time-limit", "soon"], "--time-limit"),
        (["build", "--profile", "huge"], "--profile"),
        (["serve", "--port", "70000"], "0 to 65535"),
        (["serve"], "no site"),
        (["verdicts", "--", "--dry-run"], "takes nothing after --"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(book, capsys, words, complaint):
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert complaint in err


def test_a_wrong_profile_in_the_environment(book, capsys, monkeypatch):
    monkeypatch.setenv("PAPERLAB_PROFILE", "huge")
    code, _, err = call(capsys, "build")
    assert code == 2
    assert "PAPERLAB_PROFILE must be one of pocket, full" in err


def test_outside_a_checkout(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PAPERLAB_ROOT", raising=False)
    code, _, err = call(capsys, "build")
    assert code == 1
    assert "run this inside a checkout" in err


def test_the_way_of_a_page(book, capsys):
    code, out, _ = call(capsys, "build", "--jobs", "1")
    assert code == 0
    assert "1 executed, 0 up to date" in out
    assert out.endswith("rendered None\n")
    assert call(capsys, "verdicts")[0] == 1  # nothing is committed yet
    assert call(capsys, "accept", "alpha") == (0, "notebooks/memory/alpha.ipynb: updated\n", "")
    assert read(book / "notebooks" / "memory" / "alpha.ipynb").cells[0].outputs[0].text == "C1 supported\n"
    assert call(capsys, "verdicts")[0] == 0
    assert call(capsys, "strip") == (0, "", "")
    code, out, _ = call(capsys, "page", "alpha", "--", "--dry-run")
    assert code == 0
    assert "rendered ['alpha']" in out


def test_a_page_that_fails_does_not_keep_the_rest_from_being_rendered(book, capsys):
    write_page(book, "beta", "# NBVAL_CHECK_OUTPUT\n1 / 0")
    code, out, err = call(capsys, "build")
    assert code == 1
    assert "rendered None" in out
    assert "notebooks/memory/beta.ipynb, cell 0: # NBVAL_CHECK_OUTPUT\n    ZeroDivisionError: division by zero" in err
    assert "1 page failed" in err
    code, out, _ = call(capsys, "page", "beta")
    assert code == 1
    assert "rendered" not in out  # nothing to show


def test_a_machine_that_is_not_ready(book, capsys):
    (book / "_build").write_text("in the way")
    code, _, err = call(capsys, "build")
    assert code == 3
    assert "cannot write" in err


def test_rendering_that_fails(book, capsys, monkeypatch):
    def render(*_, **__):
        raise PressError("Sphinx could not render")

    monkeypatch.setattr(site, "render", render)
    code, _, err = call(capsys, "page", "alpha", "--", "--dry-run")
    assert (code, err) == (1, "error: Sphinx could not render\n")


def test_interruption(book, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_catalog", stop)
    code, _, err = call(capsys, "build")
    assert code == 130
    assert "run the same command again to resume" in err


def test_strip_reports_like_a_hook(book, capsys):
    path = book / "notebooks" / "memory" / "alpha.ipynb"
    page = read(path)
    page.cells.append(nbformat.v4.new_code_cell("1", execution_count=4))
    nbformat.write(page, path)
    assert call(capsys, "strip", str(path)) == (1, f"stripped {path}\n", "")
    assert call(capsys, "strip", str(path)) == (0, "", "")
    path.write_text("{")
    assert call(capsys, "strip", str(path))[0] == 1


def test_check_runs_the_contract_and_the_checks_of_the_site(book, capsys, monkeypatch):
    assert "test_contract.py is missing" in call(capsys, "check")[2]
    write_whole(book / "tests" / "test_contract.py", "def test_page(): pass\n")
    assert call(capsys, "check")[0] == 0
    Build(book).html.mkdir(parents=True)
    monkeypatch.setattr(site, "check_site", lambda html: ["a broken link"])
    code, out, _ = call(capsys, "check")
    assert code == 1
    assert "site: a broken link" in out


def test_nbval_says_what_it_chose(book, capsys, monkeypatch):
    monkeypatch.setattr("paperbook.nbval.run", lambda root, papers: True)
    monkeypatch.setattr("paperbook.nbval.choose", lambda root, base, turn: [])
    assert call(capsys, "nbval")[:2] == (0, "nbval: no page changed, and none has its turn\n")
    assert call(capsys, "nbval", "--all")[:2] == (0, "nbval: 1 page: alpha\n")
    assert call(capsys, "nbval", "alpha")[:2] == (0, "nbval: 1 page: alpha\n")
