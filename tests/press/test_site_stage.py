"""Staging: what does not change is not touched, what no longer belongs there goes."""

import os

from paperbook.site.stage import Stage, write


def aged(path):
    """Set a file's time back, so that a later write must show."""
    os.utime(path, (1, 1))
    return path


def test_equal_content_is_not_written_again(tmp_path):
    path = tmp_path / "deep" / "page.md"
    assert write(path, "text")
    aged(path)
    assert not write(path, b"text")
    assert path.stat().st_mtime == 1
    assert write(path, "other")
    assert path.read_text() == "other"
    assert [p.name for p in path.parent.iterdir()] == ["page.md"]  # nothing temporary stays


def test_prune_removes_what_was_neither_put_nor_kept(tmp_path):
    first = Stage(tmp_path)
    for name in ("a.md", "sub/b.md", "sub/c.md", "gone/d.md"):
        first.put(name, name)
    second = Stage(tmp_path)
    second.put("a.md", "a.md")
    second.keep("sub/b.md")
    second.prune()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["a.md", "sub", "sub/b.md"]
    assert second.written == []
