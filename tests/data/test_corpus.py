"""The corpora are real, repeatable and without leaks between what is trained on and what is held out."""

import ast
import sysconfig
import textwrap
from pathlib import Path

import pytest

from paperlab.data import corpus
from paperlab.data.held_out import is_held_out


def test_python_documents_are_the_files_of_the_library():
    documents = corpus.python()
    names = [d.name for d in documents]
    assert names == sorted(set(names))
    assert len(documents) > 400
    assert not any("test" in Path(name).parts or "site-packages" in name for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py"):
        text = next(d.text for d in documents if d.name == name)
        assert text == (root / name).read_text(encoding="utf-8").replace("\t", "    ")


def test_english_holds_topics_and_docstrings():
    documents = corpus.english()
    names = [d.name for d in documents]
    assert names == sorted(set(names))
    assert sum(len(d.text) for d in documents) > 1_500_000
    texts = dict(documents)
    assert textwrap.shorten.__doc__.strip().splitlines()[0] in texts["textwrap.py"]
    assert 'The "if" statement is used for conditional execution' in "".join(
        text for name, text in documents if name.startswith("topics/")
    )
    assert "def shorten" not in texts["textwrap.py"]


def test_docstrings_by_hand():
    source = '"""A."""\nclass C:\n    """B."""\n    def f(self):\n        """C\n        D."""\nasync def g(): ...\n'
    assert corpus._docstrings(source) == "A.\n\nB.\n\nC\nD."
    assert corpus._docstrings("def (") == ""
    nested = (
        "if x:\n  try: pass\n  except E:\n    def f(): 'deep'\n  else:\n    class C: 'later'\nelse:\n  match x:\n    "
    )
    nested += "case 1:\n      with y:\n        def g(): 'last'\nz = lambda: 'no docstring'\n"
    assert corpus._docstrings(nested) == "deep\n\nlater\n\nlast"


def test_docstrings_of_real_files_are_those_of_a_walk_over_the_whole_tree():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, text in corpus.python()[::60]:
        walked = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        told = [ast.get_docstring(node) for node in sorted(walked, key=lambda node: getattr(node, "lineno", 0))]
        assert corpus._docstrings(text) == "\n\n".join(filter(None, told)), name


def test_the_manual_is_part_of_english():
    texts = dict(corpus.english())
    manual = corpus.manual()
    assert [d.name for d in manual] == [name for name in sorted(texts) if name.startswith("topics/")]
    assert sum(d.text == texts[d.name] for d in manual) / len(manual) > 0.95
    held = {d.name for d in corpus.split(manual)[1]}
    assert held
    assert held <= {d.name for d in corpus.split(corpus.english())[1]}


def test_no_long_paragraph_stands_twice():
    seen = set()
    for _, text in corpus.english():
        for paragraph in text.split("\n\n"):
            bare = " ".join(paragraph.split())
            if len(bare) >= corpus.LONG:
                assert bare not in seen
                seen.add(bare)


def test_split_goes_by_name_alone():
    english, python = corpus.english(), corpus.python()
    train, held = corpus.split(english)
    assert sorted(train + held) == sorted(english)
    assert 0.05 < len(held) / len(english) < 0.15
    # A held-out file is held out with its docstrings.
    code_train, code_held = corpus.split(python)
    assert not {d.name for d in train} & {d.name for d in code_held}
    assert not {d.name for d in held} & {d.name for d in code_train}
    # Dropping documents moves none of the rest; a larger share holds out more.
    again, _ = corpus.split(english[::3])
    assert set(again) == set(train) & set(english[::3])
    assert {d.name for d in held} < {d.name for d in corpus.split(english, 0.3)[1]}


def test_held_out_names_never_change():
    # Written down once: another hash would silently move text from one part to the other.
    names = ["argparse.py", "json/decoder.py", "topics/if", "turtle.py", "typing.py", "os.py", "random.py", "uuid.py"]
    assert [name for name in names if is_held_out(name, 0.5)] == [
        "argparse.py",
        "json/decoder.py",
        "topics/if",
        "turtle.py",
        "typing.py",
        "random.py",
        "uuid.py",
    ]


def test_sources_parse():
    for name, text in corpus.python()[::60]:
        ast.parse(text, name)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: corpus.split([]), "documents must not be empty"),
        (lambda: corpus.split(corpus.python(), 1.5), "held_out must be between"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
