"""What a page depends on, against what Python itself loads."""

import json
import os
import subprocess
import sys

import pytest

from paperbook.dependencies import files_of, page_files

LIBRARY = {
    "paperlab/__init__.py": "",
    "paperlab/stats.py": "import math\n",
    "paperlab/unused.py": "",
    "paperlab/nn/__init__.py": "from .stacked import Stacked\n",
    "paperlab/nn/stacked.py": "from ..stats import math\nclass Stacked: pass\n",
    "paperlab/nn/other.py": "",
    "paperlab/memory/fast.py": "from paperlab.nn import Stacked\nimport paperlab.memory.slow as slow\n",
    "paperlab/memory/slow.py": "def later():\n    from . import deep\n",
    "paperlab/memory/deep.py": "import paperlab.memory.fast\n",
    "paperlab/memory/fast.c": "int x;",
    "paperlab/memory/fast.npz": "",
    "paperlab/memory/faster.c": "",
    "paperbook/__init__.py": "_LAZY = {'start': 'paperbook.profile'}\n",
    "paperbook/profile.py": "def start(): pass\n",
    "paperbook/cli.py": "",
}


@pytest.fixture
def library(tmp_path):
    for name, text in LIBRARY.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lib"


def names(files, library):
    return {str(path.relative_to(library)) for path in files}


def write_page(path, *cells):
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells]}))
    return path


def test_everything_that_is_imported_on_the_way(library):
    assert names(files_of(["paperlab.memory.fast"], library), library) == {
        "paperlab/__init__.py", "paperlab/stats.py", "paperlab/nn/__init__.py", "paperlab/nn/stacked.py",
        "paperlab/memory/fast.py", "paperlab/memory/slow.py", "paperlab/memory/deep.py",
        "paperlab/memory/fast.c", "paperlab/memory/fast.npz",
    }  # fmt: skip


@pytest.mark.parametrize("module", ["paperlab.memory.fast", "paperlab.nn.other", "paperlab.stats", "paperbook.profile"])
def test_python_loads_nothing_else(library, module):
    program = f"import sys, {module}; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('paper')))"
    env = {**os.environ, "PYTHONPATH": str(library)}
    done = subprocess.run([sys.executable, "-S", "-c", program], env=env, capture_output=True, text=True, check=True)
    loaded = {path for path in done.stdout.split() if path != "None"}
    assert loaded <= {str(path) for path in files_of([module], library)}


@pytest.mark.parametrize(
    "cell",
    [
        "import paperlab.stats",
        "import numpy, paperlab.stats as s",
        "from paperlab import stats",
        "from paperlab.stats import math",
        "%matplotlib inline\nfrom paperlab import stats",
        "%%time\nimport paperlab.stats",
        "if False:\n    !ls\n    import paperlab.stats",
        "import paperlab.stats\nx = (7\n  % 4)",
        "import importlib\nm = importlib.import_module('paperlab.stats')",
    ],
)
def test_all_ways_to_import(library, tmp_path, cell):
    page = write_page(tmp_path / "a.ipynb", "this is no Python", cell)
    assert names(page_files(page, library), library) == {"paperlab/__init__.py", "paperlab/stats.py"}


def test_lazy_exports_count_and_the_rest_of_the_press_does_not(library, tmp_path):
    page = write_page(tmp_path / "a.ipynb", "from paperbook import start")
    assert names(page_files(page, library), library) == {"paperbook/__init__.py", "paperbook/profile.py"}


def test_a_page_depends_on_the_pocket_models_that_it_or_its_module_names(library, tmp_path):
    shelf = library / "paperlab" / "zoo" / "weights"
    shelf.mkdir(parents=True)
    (library / "paperlab" / "zoo" / "__init__.py").write_text("ALL = ['pocket-gpt', 'pocket-gpt-2l', 'pocket-vit']\n")
    (library / "paperlab" / "memory" / "slow.py").write_text("MODEL = 'pocket-vit'\n")
    for name in ("pocket-gpt", "pocket-gpt-2l", "pocket-vit"):
        (shelf / f"{name}.safetensors").touch()
    page = write_page(tmp_path / "a.ipynb", "from paperlab import zoo\nfrom paperlab.memory import slow",
                      "model = zoo.load('pocket-gpt')", "print('the pocket-gpt-2l is not loaded')")  # fmt: skip
    found = {path.name for path in page_files(page, library)}
    assert {"pocket-gpt.safetensors", "pocket-vit.safetensors"} <= found
    assert "pocket-gpt-2l.safetensors" not in found


def test_a_changed_module_is_read_again(library):
    assert "paperlab/unused.py" not in names(files_of(["paperlab.stats"], library), library)
    path = library / "paperlab" / "stats.py"
    path.write_text("from paperlab import unused\n")
    os.utime(path, ns=(1, 1))
    assert "paperlab/unused.py" in names(files_of(["paperlab.stats"], library), library)


def test_what_cannot_be_read_depends_on_nothing_more(library, tmp_path):
    (library / "paperlab" / "stats.py").write_text("def broken(:\n")
    assert names(files_of(["paperlab.stats", "paperlab.nowhere.at_all"], library), library) == {
        "paperlab/__init__.py", "paperlab/stats.py"
    }  # fmt: skip
    for text in ("", "{", "[]", '{"cells": 3}', '{"cells": [{}]}'):
        (tmp_path / "a.ipynb").write_text(text)
        assert page_files(tmp_path / "a.ipynb", library) == []
