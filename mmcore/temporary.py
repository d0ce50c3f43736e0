"""Temporary folders that are removed even if their process was killed.

Each folder holds a file ``lock`` that its process keeps locked. A process that makes a folder first removes all folders
whose lock is free.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_PREFIX, _LOCK = "mmcore", "lock"
_held: dict[Path, IO[str]] = {}


def make_folder(kind: str, parent: str | None = None) -> Path:
    """A new folder ``mmcore-KIND-...`` in `parent`, by default in the system's temporary folder.

    The caller removes it. If the caller dies, the next process that makes such a folder removes it.
    """
    for lock in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}-*/{_LOCK}"):
        with contextlib.suppress(OSError), open(lock) as file:  # OSError: locked, another user's, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{kind}-", dir=parent))
    held = open(folder / f"{_LOCK}.new", "w")  # noqa: SIM115 (held until the process ends)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.rename(held.name, folder / _LOCK)  # other processes see the lock only once it is held
    _held[folder] = held
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder made by `make_folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    _held.pop(folder).close()


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A folder by `make_folder` that exists within the ``with`` block."""
    folder = make_folder(kind)
    try:
        yield folder
    finally:
        remove_folder(folder)
