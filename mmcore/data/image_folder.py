"""Images of a folder by the names that captions call them by."""

import os
from functools import cached_property
from pathlib import Path, PurePosixPath

from mmcore.images import IMAGE_SUFFIXES


def is_image_file(path: Path) -> bool:
    """Whether `path` is an image's file by its ending, and none of those that desktops hide."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


class ImageFolder:
    """Finds a name in `folder` itself, else a file anywhere below `root` whose path ends with the name.

    Capitals count only in `folder`; the ending of the file may be missing, as in COCO's numbers.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root

    @cached_property
    def files(self) -> list[Path]:
        """All image files below the root, through links too, but for hidden ones and what lies in hidden folders."""
        found, seen = [], set[str]()
        for parent, folders, names in os.walk(self.root, followlinks=True):
            # A link to a folder above would lead round and round.
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    found.append(Path(parent, name))
        return found

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in self.files:
            for name in (path.name.lower(), path.stem.lower()):
                found.setdefault(name, []).append(path)
        return found

    def find(self, name: str) -> list[Path]:
        """The files that `name`, a relative path with `/`, may mean: one, none, or several that are equally near."""
        if name.lower().endswith(IMAGE_SUFFIXES) and (self.folder / name).is_file():
            return [self.folder / name]
        wanted = PurePosixPath(name.lower())
        found = []
        for path in self._by_name.get(wanted.name, []):
            below = PurePosixPath(path.relative_to(self.root).as_posix().lower())
            if not name.lower().endswith(IMAGE_SUFFIXES):
                below = below.with_suffix("")
            if below.parts[-len(wanted.parts) :] == wanted.parts:
                found.append(path)
        # What lies in the folder itself is nearer than what lies elsewhere.
        return [path for path in found if path.parent == (self.folder / name).parent] or found

    def name_of(self, path: Path, name: str) -> str:
        """What a dataset calls the file found as `name`: `name` with the capitals and the ending of the file."""
        if path.is_relative_to(self.folder):
            below = path.relative_to(self.folder)
            if len(below.parts) == len(PurePosixPath(name).parts):
                return below.as_posix()
        return PurePosixPath(name).with_name(path.name).as_posix()
