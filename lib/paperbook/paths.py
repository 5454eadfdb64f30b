"""Where products lie, and how they are written: whole or not at all, and never outside `_build/`."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paperbook.errors import MACHINE, PressError

ENOUGH = 64 * 2**20  # bytes free below which a build is not worth starting


@dataclass(frozen=True)
class Build:
    """The build folder of a checkout. A page is named `<part>/<slug>` below every folder in it."""

    root: Path

    @property
    def folder(self) -> Path:
        """All products, and nothing else: it may be deleted at any time."""
        return self.root / "_build"

    @property
    def executed(self) -> Path:
        """The executed notebooks."""
        return self.folder / "executed"

    @property
    def logs(self) -> Path:
        """One log a page, and beside it a report if the page failed."""
        return self.folder / "logs"

    @property
    def html(self) -> Path:
        """The finished site."""
        return self.folder / "html"

    def prepare(self, enough: int = ENOUGH) -> None:
        """Make the folder, and prove that it can be written to before an hour is spent.

        Raises:
            PressError: it cannot be written to, or the disk is all but full.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"x" * 2**16)
            probe.unlink()
            disk = os.statvfs(self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from None
        free = disk.f_bavail * disk.f_frsize
        if free < enough:
            raise PressError(
                f"only {free / 2**20:.0f} MB free for {self.folder}, {enough / 2**20:.0f} MB are needed: "
                "make room (an old _build may be deleted), or make _build a link to a larger disk",
                MACHINE,
            )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep others out while the folder is written to. The system lifts the claim however this process ends.

        Raises:
            PressError: somebody else holds it, or the folder cannot be written to.
        """
        self.prepare()
        try:
            lock = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise unwritable(self.folder / ".lock", error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise PressError(
                    f"another press (process {holder}) works in {self.folder}: wait for it, or end it and run again",
                    MACHINE,
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def unwritable(path: Path, error: OSError) -> PressError:
    """The message for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "the disk is full: make room and run the same command again, it resumes"
    else:
        advice = "check that it is a folder which you may write to, or delete it and run the same command again"
    return PressError(f"cannot write {path}: {error.strerror or error}; {advice}", MACHINE)


def write_whole(path: Path, text: str) -> None:
    """Write a product in one step, so that whoever is killed here leaves the old file or the new one.

    Raises:
        PressError: the file cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(text)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
