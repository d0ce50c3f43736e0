"""Folders among the temporary files that no killed process leaves there for ever.

Each holds a file ``lock`` that its process keeps locked while it lives. Whoever makes such a folder removes those whose
lock nobody holds.
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
    """A new folder ``mmcore-KIND-...`` in `parent`, by default among the temporary files.

    Its maker removes it, or the next process that makes one, once this process is dead.
    """
    for lock in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}-*/{_LOCK}"):
        with contextlib.suppress(OSError), open(lock) as file:  # OSError: a live one's, another user's, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{kind}-", dir=parent))
    held = open(folder / f"{_LOCK}.new", "w")  # noqa: SIM115 (held until the process ends)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.rename(held.name, folder / _LOCK)  # seen only once it is held
    _held[folder] = held
    return folder


def remove_folder(folder: Path) -> None:
    """Remove what `make_folder` gave."""
    shutil.rmtree(folder, ignore_errors=True)
    _held.pop(folder).close()


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """`make_folder` for the time of a ``with`` block."""
    folder = make_folder(kind)
    try:
        yield folder
    finally:
        remove_folder(folder)
