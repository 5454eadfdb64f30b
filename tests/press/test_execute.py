"""One page in a process of its own: what its kernel gets, and what is left when it fails."""

import json
import resource
import subprocess
import sys

import pytest

from paperbook.execute import PageError, execute, load_failure, run_page
from paperbook.notebook import read
from support import write_page


def printed(notebook):
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_kernel_gets_its_folder_its_library_and_one_thread(tiny_book):
    (tiny_book / "lib").mkdir()
    (tiny_book / "lib" / "here.py").write_text("where = 'this checkout'\n")
    page = write_page(
        tiny_book,
        "alpha",
        "import here, json, os\nfrom ipykernel.connect import get_connection_info\n"
        "names = 'PAPERLAB_PRESS', 'PAPERLAB_PROFILE', 'OMP_NUM_THREADS'\n"
        "transport = json.loads(get_connection_info())['transport']\n"
        "print(json.dumps([here.where, os.getcwd(), transport, *map(os.environ.get, names)]))",
    )
    before = page.read_bytes()
    notebook = execute(page)
    assert json.loads(printed(notebook)) == ["this checkout", str(page.parent), "ipc", "1", "pocket", "1"]
    assert page.read_bytes() == before
    assert 0 < notebook.metadata.papermill.duration < 60
    assert str(tiny_book) not in json.dumps(notebook.metadata)  # nothing that differs between machines


def test_a_cell_that_raises_is_named_as_the_source_counts_it(tiny_book):
    # In the full profile papermill adds a cell with the parameters; the report must not count it.
    page = write_page(
        tiny_book, "alpha", 'profile = "pocket"', "\n# second\nraise KeyError(profile)", tags=["parameters"]
    )
    with pytest.raises(PageError, match="KeyError: 'full'") as caught:
        execute(page, profile="full")
    assert (caught.value.cell, caught.value.line) == (1, "# second")
    assert "Traceback" in caught.value.details
    assert "\x1b" not in caught.value.details


@pytest.mark.parametrize("end", ["import os; os._exit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_a_kernel_that_dies_is_noticed(tiny_book, end):
    with pytest.raises(PageError, match="the kernel died") as caught:
        execute(write_page(tiny_book, "alpha", "1", end))
    assert (caught.value.cell, caught.value.line) == (1, end)


def test_a_cell_that_never_ends_is_ended(tiny_book):
    with pytest.raises(PageError, match="ran longer than 3 s; .*--time-limit") as caught:
        execute(write_page(tiny_book, "alpha", "while True: pass"), seconds=3)
    assert caught.value.cell == 0


@pytest.mark.parametrize("content", [b"", b"{", b'{"cells": 1}', b"[]", b'{"cells": [{}], "nbformat": 4}', b"\xff\x00"])
def test_a_corrupt_notebook_is_reported_before_a_kernel_starts(tiny_book, content):
    page = write_page(tiny_book, "alpha", "1")
    page.write_bytes(content)
    with pytest.raises(PageError, match=r"alpha.ipynb is not a valid notebook: .*git checkout") as caught:
        execute(page)
    assert caught.value.cell is None


def test_success_removes_the_report_of_an_earlier_failure(tiny_book):
    log, target = tiny_book / "logs" / "alpha.log", tiny_book / "out" / "alpha.ipynb"
    page = write_page(tiny_book, "alpha", "1 / 0")
    failure = run_page(page, target, log)
    assert failure == load_failure(log)
    assert not target.exists()
    assert str(failure).startswith(
        "notebooks/memory/alpha.ipynb, cell 0: 1 / 0\n    ZeroDivisionError: division by zero"
    )
    assert run_page(write_page(tiny_book, "alpha", "1 / 1"), target, log) is None
    assert load_failure(log) is None
    assert read(target).cells[0].outputs[0].data["text/plain"] == "1.0"


def test_a_target_that_cannot_be_written_is_a_failure_of_the_page(tiny_book):
    target = tiny_book / "out" / "alpha.ipynb"
    target.mkdir(parents=True)  # a folder in the way
    failure = run_page(write_page(tiny_book, "alpha", "1"), target, tiny_book / "alpha.log")
    assert "cannot write" in failure.error
    assert list(target.parent.iterdir()) == [target]  # and no half-written file beside it


def test_a_disk_that_fills_up_leaves_no_half_of_a_notebook(tiny_book):
    # A limit on the size of files makes every larger write fail as it would on a full disk.
    page = write_page(tiny_book, "alpha", "print('x' * 200_000)")
    target = tiny_book / "out" / "alpha.ipynb"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-m", "paperbook.execute", page, target], preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the disk is full" in done.stdout
    assert list(target.parent.iterdir()) == []
