"""A real file system of a few megabytes that a test can fill."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# MNT_DETACH: open files are released later.
_DETACH = 2


class SmallDisk:
    """A file system mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Fill the file system except for `leave` bytes."""
        self.make_room()
        free = os.statvfs(self.path)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - leave))

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    def files(self) -> list[str]:
        return [str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()]


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A file system in memory. The test is skipped if mounting is not allowed."""
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", bytes(path), b"tmpfs", 0, f"size={megabytes}m".encode()) != 0:
        pytest.skip(f"a small file system cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield SmallDisk(path)
    finally:
        libc.umount2(bytes(path), _DETACH)
