"""Many pages: what runs again, what a failure leaves, and how an interrupted build ends."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from paperbook.catalog import load_catalog
from paperbook.errors import MACHINE, USAGE, PressError
from paperbook.notebook import read
from paperbook.paths import Build, write_whole
from paperbook.workflow import Progress, choose, clock, run
from support import write_page

MORE = "".join(f"- slug: {slug}\n  title: {slug}\n  year: 2022\n" for slug in ("gamma", "delta", "epsilon"))


@pytest.fixture
def book(tiny_book):
    """A checkout in which pages can be executed."""
    with (tiny_book / "book" / "catalog" / "memory.yml").open("a") as catalog:
        catalog.write(MORE)
    (tiny_book / "requirements.txt").write_text("numpy==2.4.6\n")
    return tiny_book


def press(root, *slugs, **settings):
    """Execute; the failures by slug, and what was printed."""
    out = io.StringIO()
    failures = run(root, choose(load_catalog(root), root, slugs), out=out, **settings)
    return {failure.notebook.split("/")[-1].removesuffix(".ipynb"): failure for failure in failures}, out.getvalue()


def would_run(root, **settings):
    """The slugs that would be executed now."""
    press(root, extra=["--dry-run"], **settings)
    return set(re.findall(r"^Job \d+: memory/(\w+)$", (Build(root).logs / "snakemake.log").read_text(), re.MULTILINE))


def executed(root):
    return {path.stem for path in Build(root).executed.glob("*/*.ipynb")}


# --- failures --------------------------------------------------------------------------------------------------------


def test_every_way_to_fail_stops_no_other_page(book):
    write_page(book, "alpha", "print('fine')")
    write_page(book, "beta", "x = 1", "# the reason\nraise ValueError('boom')")
    write_page(book, "gamma", "import os; os._exit(1)")
    write_page(book, "delta", "while True: pass")
    write_page(book, "epsilon", "1").write_text("{ not a notebook")
    failures, said = press(book, time_limit=10)
    assert executed(book) == {"alpha"}
    assert "1 executed, 0 up to date, 4 failed" in said
    assert list(failures) == ["beta", "gamma", "delta", "epsilon"]
    assert (failures["beta"].cell, failures["beta"].line) == (1, "# the reason")
    assert failures["beta"].error == "ValueError: boom"
    assert "the kernel died" in failures["gamma"].error
    assert "longer than 10 s" in failures["delta"].error
    assert "not a valid notebook" in failures["epsilon"].error
    assert "ValueError: boom" in (book / failures["beta"].log).read_text()
    assert would_run(book) == {"beta", "gamma", "delta", "epsilon"}  # what was mended runs; what was well does not


def test_unknown_slugs_and_pages_that_are_not_written(book):
    write_page(book, "alpha", "1")
    with pytest.raises(PressError, match="did you mean alpha") as caught:
        press(book, "alhpa")
    assert caught.value.code == USAGE
    with pytest.raises(PressError, match="beta has no page yet: .*new beta"):
        press(book, "beta")


def test_a_file_in_the_way_of_the_build_folder(book):
    write_page(book, "alpha", "1")
    (book / "_build").write_text("")
    with pytest.raises(PressError, match="cannot write .*_build") as caught:
        press(book)
    assert caught.value.code == MACHINE


def mount(where, *options):
    """Mount a file system of our own for one test, where that is allowed."""
    where.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", *options, str(where)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=1m", "only 1 MB free .* make room"), ("ro,size=1m", "Read-only file system; check that")],
    ids=["full", "read-only"],
)
def test_a_build_folder_that_takes_nothing(book, options, said):
    write_page(book, "alpha", "1")
    mount(book / "_build", "-t", "tmpfs", "-o", options, "none")
    try:
        with pytest.raises(PressError, match=said) as caught:
            press(book)
    finally:
        subprocess.run(["umount", str(book / "_build")], check=True)
    assert caught.value.code == MACHINE


def test_a_disk_that_fills_up_during_the_build(book, monkeypatch):
    write_page(book, "alpha", "print('x' * 3_000_000)")
    mount(book / "_build", "-t", "tmpfs", "-o", "size=2m", "none")
    monkeypatch.setattr(Build.prepare, "__defaults__", (0,))  # there was room when it was looked for
    try:
        failures, _ = press(book)
    finally:
        subprocess.run(["umount", str(book / "_build")], check=True)
    assert "the disk is full: make room" in failures["alpha"].error


def test_what_snakemake_refuses_is_passed_on(book):
    write_page(book, "alpha", "1")
    with pytest.raises(PressError, match=r"invalid choice: 'nowhere'.*pip install snakemake-executor-plugin"):
        press(book, extra=["--executor", "nowhere"])


def test_one_press_at_a_time(book):
    with Build(book).claimed(), pytest.raises(PressError, match=rf"process {os.getpid()}"), Build(book).claimed():
        pass
    with Build(book).claimed():
        pass


def test_no_network_is_needed(book):
    write_page(book, "alpha", "print('fine')")
    alone = ["unshare", "-rn"] if shutil.which("unshare") else []
    if alone and subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []  # not permitted: then at least nobody answers
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [*alone, sys.executable, "-m", "paperbook", "execute"]
    done = subprocess.run(command, cwd=book, env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert executed(book) == {"alpha"}


# --- interruption ----------------------------------------------------------------------------------------------------


def alive(pid):
    try:
        return "zombie" not in open(f"/proc/{pid}/status").read()
    except OSError:
        return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_build_leaves_nothing_running_and_resumes(book, how, code):
    write_page(book, "alpha", "print('fine')")
    stuck, go, log = book / "kernel.pid", book / "go", Build(book).logs / "snakemake.log"
    write_page(
        book,
        "beta",
        f"import os, pathlib, time\nwaits = not os.path.exists({str(go)!r})",
        f"if waits: pathlib.Path({str(stuck)!r}).write_text(str(os.getpid()))",
        "while waits: time.sleep(0.1)\nprint('to the end')",
    )
    sources = {path: path.read_bytes() for path in (book / "notebooks").rglob("*.ipynb")}
    command = [sys.executable, "-m", "paperbook", "execute"]
    running = subprocess.Popen(command, cwd=book, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: stuck.exists() and stuck.read_text() and "Finished jobid" in log.read_text())
    running.send_signal(how)
    said = running.communicate(timeout=30)
    assert running.returncode == code, said
    until(lambda: not alive(int(stuck.read_text())))
    assert "run the same command again" in said[1] or how == signal.SIGKILL
    assert executed(book) == {"alpha"}

    before = (Build(book).executed / "memory" / "alpha.ipynb").stat().st_mtime_ns
    go.touch()
    failures, said = press(book)
    assert not failures
    assert "1 executed, 1 up to date" in said
    assert (Build(book).executed / "memory" / "alpha.ipynb").stat().st_mtime_ns == before
    assert read(Build(book).executed / "memory" / "beta.ipynb").cells[-1].outputs[0].text == "to the end\n"
    assert {path: path.read_bytes() for path in sources} == sources
    assert not list((book / "notebooks").rglob(".*"))


# --- what runs again -------------------------------------------------------------------------------------------------


def test_only_what_a_change_can_affect_runs_again(book):
    library = book / "lib" / "paperlab"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("")
    (library / "used.py").write_text("x = 1\n")
    (library / "used.c").write_text("int x = 1;\n")
    (library / "other.py").write_text("x = 1\n")
    alpha = write_page(book, "alpha", "from paperlab.used import x\nprint(x)")
    write_page(book, "beta", "print(2)")
    assert would_run(book) == {"alpha", "beta"}
    assert not press(book)[0]
    known = json.loads((book / "_build" / "durations.json").read_text())  # for the next estimate of the time left
    assert set(known) == {"memory/alpha", "memory/beta"}
    assert all(0 < seconds < 60 for seconds in known.values())
    assert would_run(book) == set()

    def change(path, old, new):
        path.write_text(path.read_text().replace(old, new))

    os.utime(alpha)  # a fresh checkout has new times and old content
    assert would_run(book) == set()
    change(library / "other.py", "1", "2")
    assert would_run(book) == set()
    for path, what in ((library / "used.c", "1"), (library / "used.py", "1"), (alpha, "print")):
        change(path, what, "str")
        assert would_run(book) == {"alpha"}, path
        change(path, "str", what)
    change(library / "used.py", "x = 1", "from paperlab.other import x")
    assert would_run(book) == {"alpha"}
    change(library / "used.py", "from paperlab.other import x", "x = 1")
    change(book / "book" / "catalog" / "memory.yml", "It is faster", "It is slower")
    assert would_run(book) == {"alpha"}  # whose page shows the claim
    change(book / "book" / "catalog" / "memory.yml", "It is slower", "It is faster")
    assert would_run(book, profile="full") == {"alpha", "beta"}
    assert would_run(book, time_limit=99) == set()
    change(book / "requirements.txt", "2.4.6", "2.4.7")
    assert would_run(book) == {"alpha", "beta"}


def test_pages_that_are_gone_leave_nothing(book):
    write_page(book, "alpha", "1")
    write_whole(Build(book).executed / "memory" / "beta.ipynb", "{}")
    press(book, extra=["--dry-run"])
    assert executed(book) == set()


# --- progress --------------------------------------------------------------------------------------------------------

SAID = """\
total          3
Job 2: memory/alpha
Job 0: memory/beta
Finished jobid: 2 (Rule: execute)
Error in rule execute:
    jobid: 0
Job 1: memory/gamma
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def follow(out, **known):
    names = [f"memory/{slug}" for slug in ("alpha", "beta", "gamma", "delta")]
    progress = Progress(names, 2, {f"memory/{slug}": seconds for slug, seconds in known.items()}, out)
    for line in SAID.splitlines():
        progress.hear(line)
    return progress


def test_progress_on_plain_output_is_one_line_a_page():
    out = io.StringIO()
    progress = follow(out, gamma=100.0)
    assert progress.failed == {"memory/beta"}
    assert list(progress.seconds) == ["memory/alpha"]
    progress.close()
    lines = out.getvalue().splitlines()
    assert [re.sub(r"\d+\.\d s", "S", line.split(",")[0]) for line in lines[:-1]] == [
        "to execute: 3 of 4 pages",
        "  1/3  memory/alpha  S",
        "  2/3  memory/beta  FAILED",
    ]
    assert lines[-1].startswith("1 executed, 1 up to date, 1 failed, 1 not finished in ")
    assert "\r" not in out.getvalue()


def test_progress_on_a_terminal_is_one_line_that_changes():
    out = Terminal()
    progress = follow(out, gamma=100.0)
    last = out.getvalue().split("\r")[-1]
    assert re.fullmatch(r"\x1b\[K  2/3  0 s, about 1 min 40 s left · memory/gamma", last)
    assert out.getvalue().count("\n") == 2  # what is to be done, and the failure, which stays visible
    progress.running["memory/gamma"] -= 70
    assert progress.left() == pytest.approx(30, abs=1)


def test_time_left_is_unknown_before_anything_ended():
    progress = Progress(["memory/alpha"], 2, {}, io.StringIO())
    assert progress.left() is None
    progress.hear("total  1")
    assert progress.left() is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")]
)
def test_clock(seconds, said):
    assert clock(seconds) == said
