"""Unpack an archive that came from somewhere else, so that nothing lands outside the folder meant for it."""

import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from mmcore.errors import InputError

MAX_UNPACKED_BYTES = 16 * 2**30
"""The original Flickr8k photographs take 1.1 GB; a zip that says or grows to more than this is refused."""
_COPY_BYTES = 2**20
# What macOS and Windows add to a folder without being asked.
_CLUTTER = ("__MACOSX", ".DS_Store", "Thumbs.db")


def unsafe_name(name: str) -> str | None:
    """Why nothing must be written under the name of a member, or None where it may."""
    if "\\" in name or PureWindowsPath(name).drive:
        return "has a Windows path"
    if PurePosixPath(name).is_absolute():
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "leads outside the folder"
    return None


def unsafe_member(info: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked, or None where it may."""
    reason = unsafe_name(info.filename)
    if reason is not None:
        return reason
    # The upper 16 bits are the Unix mode, 0 where the zip was made elsewhere.
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link" if kind == stat.S_IFLNK else "is no plain file"
    if info.flag_bits & 0x1:
        return "is encrypted"
    return None


def unpack_zip(path: Path, folder: Path, *, max_bytes: int = MAX_UNPACKED_BYTES, skip_bad: bool = False) -> list[str]:
    """Unpack the zip `path` into the empty `folder`, member by member; return what was skipped and why.

    The whole list of members is checked before the first byte is written. `skip_bad` leaves out unsafe and
    damaged members; a file that is no zip, or one that unpacks to more than `max_bytes`, is refused always.
    Raises InputError naming the zip and the member.
    """
    skipped: list[str] = []

    def refuse(name: str, reason: str) -> None:
        problem = f"{path}: member {name!r} {reason}"
        if not skip_bad:
            raise InputError(f"{problem}; make the zip anew, or leave it out with --skip-bad")
        skipped.append(problem)

    try:
        with zipfile.ZipFile(path) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if info.is_dir() or any(part in _CLUTTER for part in PurePosixPath(info.filename).parts):
                    continue
                reason = unsafe_member(info)
                if reason is None and info.filename in members:
                    reason = "occurs twice"
                if reason is None:
                    members[info.filename] = info
                else:
                    refuse(info.filename, reason)
            total = sum(info.file_size for info in members.values())
            if total > max_bytes:
                raise InputError(f"{path}: unpacks to {total:,} bytes, more than the {max_bytes:,} allowed")
            for name, info in members.items():
                target = folder / name
                try:
                    _unpack_member(archive, info, target)
                except (FileExistsError, NotADirectoryError, IsADirectoryError):
                    refuse(name, "is both a file and a folder")
                except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                    target.unlink(missing_ok=True)
                    refuse(name, f"is damaged ({error})")
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise InputError(f"{path}: not a readable zip ({error}); download it again") from None
    return skipped


def _unpack_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The reader stops at the size that the list of members gave, which was added up before.
    with archive.open(info) as source, open(target, "xb") as file:
        while chunk := source.read(_COPY_BYTES):
            file.write(chunk)
