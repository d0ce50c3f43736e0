"""A folder on the local disk or in S3, with one small interface.

All files are written under one storage URI: a local path or ``s3://bucket/prefix``. Writes are atomic: locally by a
temporary file and a rename, on S3 by one PUT. Credentials, region and endpoint come from the ``AWS_*`` environment
variables, never from the URI.
"""

import builtins
import contextlib
import errno
import io
import mimetypes
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from mmcore.errors import InputError
from mmcore.s3 import S3, S3File, read_object, s3_client

# Wait before a conditional write is repeated after a conflict with another one.
_CONFLICT_PAUSE_S = 0.1

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")

# The start of an address, such as s3: or hf: of what was meant as s3://bucket.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+]*:")

# The folder of temporary files in storages of before 2026-11-29.
_OLD_TEMPORARY = ".tmp"

# Errors of file systems without hard links (FAT and exFAT, some network and user-space file systems).
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


class DiskError(OSError):
    """An error of a full or broken disk, with the path.

    It keeps the path when it is pickled between processes. Ray Data appends advice to an error's arguments, and a plain
    OSError would unpickle that advice as its file name.
    """

    def __init__(self, code: int, path: str) -> None:
        super().__init__(code, os.strerror(code), path)

    def __reduce__(self) -> tuple[type["DiskError"], tuple[int, str]]:
        return DiskError, (self.errno or 0, self.filename)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn disk errors in the block into DiskError with a path. A full disk's error has no path by itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DiskError(error.errno, str(error.filename2 or error.filename or path)) from error
    except SafetensorError as error:
        code = _RUST_OS_ERROR.search(str(error))
        if code is None:
            raise
        raise DiskError(int(code[1]), str(path)) from error


class _WholeFile:
    """A file with a temporary name. `close` renames it to its real name unless a write failed."""

    def __init__(self, path: str) -> None:
        self.path, self.temporary = path, f"{path}.{uuid.uuid4().hex}.tmp"
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed by `close`)
        self.failed = False

    @property
    def closed(self) -> bool:
        return self.file.closed

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: bytes) -> int:
        try:
            with writing(self.path):
                return self.file.write(data)
        except BaseException:
            # Delete it at once, as the disk may be full and Arrow may close the file much later.
            self.failed = True
            Path(self.temporary).unlink(missing_ok=True)
            raise

    def flush(self) -> None:
        with writing(self.path):
            self.file.flush()

    def close(self) -> None:
        if self.file.closed:
            return
        try:
            # Arrow also closes a file after a failed write. That file must not get the real name.
            if not self.failed:
                with writing(self.path):
                    self.file.flush()
                    os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
        finally:
            Path(self.temporary).unlink(missing_ok=True)
            # Data that could not be written is still in the buffer and fails again.
            with contextlib.suppress(OSError):
                self.file.close()


class _WholeFiles(pyarrow.fs.FSSpecHandler):
    """A local file system for Arrow with atomic writes.

    Arrow's own file system truncates a file and then fills it. A kill or a full disk in between would damage Ray
    Train's snapshot, which says where a run resumes.
    """

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_WholeFile(path), mode="w")


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class Storage:
    """A folder named by `uri`; `storage / "runs" / "x"` names a folder inside it without touching it."""

    uri: str

    def __post_init__(self) -> None:
        uri = str(self.uri)
        # Without a key and a secret, which may stand before an @ or after a ?.
        place, query, _ = uri.partition("?")
        shown = repr(place.split("@")[-1] + f"{query}..." * bool(query))
        if uri.startswith(S3):
            parts = urlsplit(uri)
            if not parts.netloc or "@" in parts.netloc or parts.query:
                raise InputError(f"storage {shown}: write s3://bucket/prefix; keys come from AWS_* variables")
            uri = uri.rstrip("/")
        elif uri.lower().startswith("file:"):
            raise InputError(f"storage {shown}: write the path alone, without file:")
        elif "://" in uri:
            raise InputError(f"storage {shown}: only a local path or s3://bucket/prefix is supported")
        elif _SCHEME.match(uri):
            # As a folder of this machine it would be lost with the cluster.
            raise InputError(f"storage {shown}: write s3://bucket/prefix, or ./ before it for a folder of that name")
        elif not uri:
            raise InputError("storage '': name a folder or s3://bucket/prefix")
        else:
            # Absolute, as workers may have another working directory.
            uri = str(Path(uri).expanduser().absolute())
        object.__setattr__(self, "uri", uri)

    def __truediv__(self, name: str) -> "Storage":
        return Storage(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def is_s3(self) -> bool:
        return self.uri.startswith(S3)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Storage":
        return Storage(self.uri.rsplit("/", 1)[0])

    def _key(self, name: str = "") -> tuple[str, str]:
        """Bucket and key of `name`."""
        bucket, _, prefix = self.uri[len(S3) :].partition("/")
        return bucket, "/".join(part for part in (prefix, name) if part)

    def _path(self, name: str = "") -> Path:
        return Path(self.uri) / name

    def exists(self, name: str = "") -> bool:
        """Whether the file `name` exists; without a name, whether the folder is not empty."""
        if not self.is_s3:
            return self._path(name).exists()
        bucket, key = self._key(name)
        if not name:
            listing = s3_client(os.getpid()).list_objects_v2(Bucket=bucket, Prefix=key and key + "/", MaxKeys=1)
            return bool(listing.get("KeyCount"))
        return self._head(bucket, key) is not None

    def _head(self, bucket: str, key: str) -> Any:
        from botocore.exceptions import ClientError

        try:
            return s3_client(os.getpid()).head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return None
            raise

    def read(self, name: str) -> bytes:
        """The whole content of `name`. Raises FileNotFoundError."""
        return read_object(*self._key(name)) if self.is_s3 else self._path(name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """Open `name` to read parts of it, such as columns of Parquet. Raises FileNotFoundError."""
        if not self.is_s3:
            return self._path(name).open("rb")
        bucket, key = self._key(name)
        head = self._head(bucket, key)
        if head is None:
            raise FileNotFoundError(f"{self.uri}/{name}")
        return cast(BinaryIO, S3File(bucket, key, head["ContentLength"]))

    def write(self, name: str, data: bytes) -> None:
        """Write `name` atomically. An existing file is replaced."""
        if self.is_s3:
            bucket, key = self._key(name)
            s3_client(os.getpid()).put_object(Bucket=bucket, Key=key, Body=data)
            return
        os.replace(self._write_temporary(name, io.BytesIO(data)), self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` if it does not exist; return whether this call wrote it.

        Exactly one of several writers succeeds: by a hard link locally, by a conditional PUT (If-None-Match) on S3.
        Raises InputError for a file system without hard links.
        """
        if self.is_s3:
            from botocore.exceptions import ClientError

            bucket, key = self._key(name)
            retried = False
            while True:
                try:
                    s3_client(os.getpid()).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    retried |= error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    if code == "ConditionalRequestConflict":
                        time.sleep(_CONFLICT_PAUSE_S)  # another writer is active: S3 asks for a retry
                        continue
                    if code in ("PreconditionFailed", "412"):
                        # If an answer was lost, the retry finds the object of its own first attempt.
                        return retried and self.read(name) == data
                    raise
        temporary = self._write_temporary(name, io.BytesIO(data))
        try:
            os.link(temporary, self._path(name))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise InputError(
                f"{self.uri}: this file system has no hard links ({os.strerror(error.errno)}), which are needed here; "
                "name a folder on another file system, or s3://bucket/prefix"
            ) from None
        finally:
            os.unlink(temporary)
        return True

    def _write_temporary(self, name: str, content: BinaryIO) -> Path:
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, so that no listing contains it. Without the target's name, which may be as long as names can be.
        temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            with writing(target), open(temporary, "wb") as file:
                shutil.copyfileobj(content, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def list(self, suffix: str = "") -> list[str]:
        """Sorted names of the files directly in this folder that end in `suffix`; empty if it does not exist.

        Hidden files (``.DS_Store``, ``._a.parquet``) are left out. Operating systems write them unasked.
        """
        if not self.is_s3:
            folder = self._path()
            if not folder.is_dir():
                return []
            found = [entry.name for entry in folder.iterdir() if entry.is_file()]
            return sorted(name for name in found if name.endswith(suffix) and not name.startswith("."))
        bucket, key = self._key()
        prefix = key and key + "/"
        pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
        names: list[str] = []
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            names += [entry["Key"][len(prefix) :] for entry in page.get("Contents", [])]
        return sorted(name for name in names if name and name.endswith(suffix) and not name.startswith("."))

    def walk(self) -> builtins.list[str]:
        """Sorted names of the files in this folder and all folders below it, such as ``a/b.png``, without hidden ones.

        Empty if the folder does not exist. Links to folders are followed, and each folder is visited once. Raises
        OSError for an unreadable folder and InputError for a broken link.
        """
        names: builtins.list[str] = []
        if not self.is_s3:
            if not self._path().is_dir():
                return names
            entered: set[tuple[int, int]] = set()
            for folder, folders, files in os.walk(self.uri, onerror=_raise, followlinks=True):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in entered:
                    folders.clear()
                    continue
                entered.add((status.st_dev, status.st_ino))
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                found = [os.path.join(folder, name) for name in files if not name.startswith(".")]
                if nothing := next((path for path in found if not os.path.exists(path)), None):
                    raise InputError(f"{nothing}: a link to a missing file; repair or remove it")
                names += [
                    os.path.relpath(path, self.uri).replace(os.sep, "/") for path in found if os.path.isfile(path)
                ]
            return sorted(names)
        bucket, key = self._key()
        prefix = key and key + "/"
        pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            names += [entry["Key"][len(prefix) :] for entry in page.get("Contents", [])]
        # An object whose name ends in / is a folder marker.
        return sorted(name for name in names if name and name[-1] != "/" and not f"/{name}".count("/."))

    def folders(self) -> builtins.list[str]:
        """Sorted names of the folders directly in this one."""
        if not self.is_s3:
            folder = self._path()
            entries = folder.iterdir() if folder.is_dir() else []
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name != _OLD_TEMPORARY)
        bucket, key = self._key()
        prefix = key and key + "/"
        names: builtins.list[str] = []
        for page in (
            s3_client(os.getpid())
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        ):
            names += [entry["Prefix"][len(prefix) :].rstrip("/") for entry in page.get("CommonPrefixes", [])]
        return sorted(names)

    def presigned_url(self, name: str, expires_s: float) -> str:
        """A link that lets anybody read `name` until it expires. Raises InputError for a local folder."""
        if not self.is_s3:
            raise InputError(f"{self}: only files in S3 have links; name a storage s3://bucket/prefix")
        bucket, key = self._key(name)
        # With this type a browser shows the file instead of downloading it.
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        params = {"Bucket": bucket, "Key": key, "ResponseContentType": content_type}
        return s3_client(os.getpid()).generate_presigned_url("get_object", Params=params, ExpiresIn=int(expires_s))

    def delete(self, name: str) -> None:
        """Remove the file `name` if it exists."""
        if not self.is_s3:
            self._path(name).unlink(missing_ok=True)
            return
        bucket, key = self._key(name)
        s3_client(os.getpid()).delete_object(Bucket=bucket, Key=key)

    def delete_tree(self, first: Sequence[str] = ()) -> None:
        """Remove this folder with its content. The files `first` are removed first, in this order.

        `first` names files that mark the content as complete. A killed removal then leaves no such mark.
        """
        for name in first:
            self.delete(name)
        if not self.is_s3:
            if self._path().exists():
                shutil.rmtree(self._path())
            return
        bucket, key = self._key()
        if not key:
            raise InputError(f"storage {self.uri!r}: refusing to empty a whole bucket; name a prefix in it")
        client = s3_client(os.getpid())
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key + "/"):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            if keys:
                client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})

    def remove_temporary(self) -> None:
        """Remove temporary files of killed writes below this folder. Only safe without other writers. No-op on S3."""
        if self.is_s3:
            return
        for path in list(self._path().rglob("*.tmp")):
            if path.is_file():
                path.unlink(missing_ok=True)
            elif path.name == _OLD_TEMPORARY and path.is_dir():
                shutil.rmtree(path)

    def upload(self, local_path: str | Path, name: str) -> None:
        """Copy a local file to `name` atomically."""
        if self.is_s3:
            bucket, key = self._key(name)
            s3_client(os.getpid()).upload_file(str(local_path), bucket, key)
        else:
            with open(local_path, "rb") as file:
                temporary = self._write_temporary(name, file)
            os.replace(temporary, self._path(name))

    def download(self, name: str, local_path: str | Path) -> None:
        """Copy `name` to a local file. Raises FileNotFoundError."""
        Path(local_path).parent.mkdir(parents=True, exist_ok=True)
        if not self.is_s3:
            with self._path(name).open("rb") as content, writing(local_path), open(local_path, "wb") as file:
                shutil.copyfileobj(content, file)
            return
        bucket, key = self._key(name)
        if self._head(bucket, key) is None:
            raise FileNotFoundError(f"{self.uri}/{name}")
        with writing(local_path):
            s3_client(os.getpid()).download_file(bucket, key, str(local_path))

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """File system and path for pyarrow and Ray: ``read_parquet(path, filesystem=filesystem)``."""
        if not self.is_s3:
            return pyarrow.fs.LocalFileSystem(), self.uri
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        scheme, _, host = endpoint.rstrip("/").rpartition("://")
        options: dict[str, Any] = {"endpoint_override": host, "scheme": scheme or "https"} if endpoint else {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region:
            options["region"] = region
        return pyarrow.fs.S3FileSystem(**options), self.uri[len(S3) :]

    def arrow_whole_files(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """As `arrow`, but writes are atomic. On S3 they always are."""
        if self.is_s3:
            return self.arrow()
        return pyarrow.fs.PyFileSystem(_WholeFiles(LocalFileSystem())), self.uri
