"""Committed notebooks keep the text of their checked cells, and nothing else."""

import nbformat
import pytest

from paperbook.notebook import NotebookError, accept, checked_text, main, read

CHECKED = "# NBVAL_CHECK_OUTPUT\nprint('C1 supported')"


def page(*, ran: bool, verdict: str = "supported"):
    cells = [nbformat.v4.new_markdown_cell("# A page"), nbformat.v4.new_code_cell("1 + 1"),
             nbformat.v4.new_code_cell(CHECKED)]  # fmt: skip
    for k, cell in enumerate(cells):
        cell["id"] = f"cell-{k}"
    if ran:
        cells[0].metadata["papermill"] = {"status": "completed"}
        cells[1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=7)]
        cells[1].execution_count = 7
        cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"C1 {verdict}\n"),
                            nbformat.v4.new_output("stream", name="stderr", text="a warning\n")]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["widgets"] = {"state": "large"}
    return notebook


def test_accept_copies_the_checked_text_alone(tmp_path):
    source, executed = tmp_path / "source.ipynb", tmp_path / "executed.ipynb"
    nbformat.write(page(ran=False), source)
    nbformat.write(page(ran=True), executed)
    assert accept(source, executed)
    result = read(source)
    assert checked_text(result) == ["C1 supported\n"]
    assert result.cells[1].outputs == []
    assert result.cells[2].execution_count == 1  # nbval wants one
    assert "widgets" not in result.metadata
    assert result.metadata["kernelspec"]["name"] == "python3"
    assert not accept(source, executed)  # a second time changes nothing


def test_accept_refuses_another_page(tmp_path):
    source, executed = tmp_path / "source.ipynb", tmp_path / "executed.ipynb"
    nbformat.write(page(ran=False), source)
    other = page(ran=True)
    other.cells[2].source += "  # changed since"
    nbformat.write(other, executed)
    with pytest.raises(NotebookError, match="do not have the same checked cells"):
        accept(source, executed)


def test_strip_is_a_precommit_hook(tmp_path, capsys):
    path = tmp_path / "page.ipynb"
    nbformat.write(page(ran=True), path)
    assert main(["strip", str(path)]) == 1
    stripped = read(path)
    assert stripped.cells[1].outputs == []
    assert "C1 supported" in checked_text(stripped)[0]
    assert "papermill" not in stripped.cells[0].metadata
    assert main(["strip", str(path)]) == 0
    assert "stripped" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", '{"cells": 3}', "\x00\x01"])
def test_a_file_that_is_no_notebook(tmp_path, text, capsys):
    path = tmp_path / "broken.ipynb"
    path.write_text(text)
    with pytest.raises(NotebookError, match=r"broken\.ipynb is not a valid notebook"):
        read(path)
    assert main(["strip", str(path)]) == 2
    assert "broken.ipynb" in capsys.readouterr().err


def test_a_missing_file(tmp_path):
    with pytest.raises(NotebookError, match="does not exist"):
        read(tmp_path / "absent.ipynb")
