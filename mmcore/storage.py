"""A folder on the local disk or in S3, behind one small interface.

Everything that the project writes lies under one storage URI: a local path or ``s3://bucket/prefix``.
A name is written whole or not at all: locally through a temporary file and a rename, on S3 by one PUT.
Credentials, region and endpoint come from the usual ``AWS_*`` environment variables, never from the URI.
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

# Before a conditional write that met another one is tried again.
_CONFLICT_PAUSE_S = 0.1

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")

# What file systems without hard links answer (FAT and exFAT, some network and user-space ones).
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


class DiskError(OSError):
    """A disk that is full or broken, at a path that is kept on the way between processes.

    Ray Data adds its advice to an error's arguments, the last of which is a common OSError's file name over there.
    """

    def __init__(self, code: int, path: str) -> None:
        super().__init__(code, os.strerror(code), path)

    def __reduce__(self) -> tuple[type["DiskError"], tuple[int, str]]:
        return DiskError, (self.errno or 0, self.filename)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Errors of a disk that are raised in the block without a file's name, as a full one's are, name `path`."""
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
    """A file under a name of its own that takes its real name when it is closed, unless writing failed."""

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
            # Gone at once: Arrow may leave it open for long, and the disk may be full.
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
            # Arrow closes a file whose write failed too; that one must not take the name.
            if not self.failed:
                with writing(self.path):
                    self.file.flush()
                    os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
        finally:
            Path(self.temporary).unlink(missing_ok=True)
            # What could not be written is still in its buffer, and fails once more.
            with contextlib.suppress(OSError):
                self.file.close()


class _WholeFiles(pyarrow.fs.FSSpecHandler):
    """The local disk for Arrow, where a file appears whole or not at all.

    Arrow's own empties a file and then fills it: killed in between, or on a full disk, Ray Train would leave its
    snapshot, the commit point of a run, torn.
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
        if uri.startswith(S3):
            parts = urlsplit(uri)
            if not parts.netloc or "@" in parts.netloc or parts.query:
                safe = uri.split("@")[-1]
                raise InputError(f"storage {safe!r}: write s3://bucket/prefix; keys come from AWS_* variables")
            uri = uri.rstrip("/")
        elif "://" in uri:
            raise InputError(f"storage {uri!r}: only a local path or s3://bucket/prefix is supported")
        elif not uri:
            raise InputError("storage '': name a folder or s3://bucket/prefix")
        else:
            # Absolute, so that it means the same folder in a worker whose working directory differs.
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
        """Whether the file `name` is there; with no name, whether the folder holds anything."""
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
        """`name`, of which parts are to be read, such as columns of Parquet. Raises FileNotFoundError."""
        if not self.is_s3:
            return self._path(name).open("rb")
        bucket, key = self._key(name)
        head = self._head(bucket, key)
        if head is None:
            raise FileNotFoundError(f"{self.uri}/{name}")
        return cast(BinaryIO, S3File(bucket, key, head["ContentLength"]))

    def write(self, name: str, data: bytes) -> None:
        """Write `name` whole or not at all, over what was there."""
        if self.is_s3:
            bucket, key = self._key(name)
            s3_client(os.getpid()).put_object(Bucket=bucket, Key=key, Body=data)
            return
        os.replace(self._write_temporary(name, io.BytesIO(data)), self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it is there already; return whether this call wrote it.

        Of several writers exactly one succeeds: a hard link locally, a conditional PUT (If-None-Match) on S3.
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
                        time.sleep(_CONFLICT_PAUSE_S)  # another writer is at it: S3 asks to try again
                        continue
                    if code in ("PreconditionFailed", "412"):
                        # A retry after a lost answer meets its own object: only then are the same bytes ours.
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
                f"{self.uri}: no hard links there ({os.strerror(error.errno)}), by which a file is created once; name "
                "a folder on a file system that has them, or s3://bucket/prefix"
            ) from None
        finally:
            os.unlink(temporary)
        return True

    def _write_temporary(self, name: str, content: BinaryIO) -> Path:
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Hidden and at the root of this storage, so that no reader of the files takes it for one of them.
        folder = self._path(".tmp")
        folder.mkdir(exist_ok=True)
        temporary = folder / f"{target.name}.{uuid.uuid4().hex}"
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
        """Sorted names of the files directly in this folder that end in `suffix`; empty where it is absent.

        Hidden files (``.DS_Store``, ``._a.parquet``) are left out: systems write them without being asked.
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
        """Sorted names of the files in this folder and in those below it, such as ``a/b.png``, hidden ones left out.

        Links to folders are followed, each folder is entered once; empty where the folder is absent. Raises OSError for
        a folder that cannot be read and InputError for a link to nothing: neither is left out in silence.
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
                    raise InputError(f"{nothing}: a link to a file that is not there; mend it or take it away")
                names += [
                    os.path.relpath(path, self.uri).replace(os.sep, "/") for path in found if os.path.isfile(path)
                ]
            return sorted(names)
        bucket, key = self._key()
        prefix = key and key + "/"
        pages = s3_client(os.getpid()).get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            names += [entry["Key"][len(prefix) :] for entry in page.get("Contents", [])]
        # An object that ends in / stands for a folder.
        return sorted(name for name in names if name and name[-1] != "/" and not f"/{name}".count("/."))

    def folders(self) -> builtins.list[str]:
        """Sorted names of the folders directly in this one."""
        if not self.is_s3:
            folder = self._path()
            entries = folder.iterdir() if folder.is_dir() else []
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name != ".tmp")
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
        """A link by which anybody can read `name` until it expires. Raises InputError for a local folder."""
        if not self.is_s3:
            raise InputError(f"{self}: only files in S3 have links; name a storage s3://bucket/prefix")
        bucket, key = self._key(name)
        # Browsers show a file by this type, and not as a download.
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        params = {"Bucket": bucket, "Key": key, "ResponseContentType": content_type}
        return s3_client(os.getpid()).generate_presigned_url("get_object", Params=params, ExpiresIn=int(expires_s))

    def delete(self, name: str) -> None:
        """Remove the file `name`; nothing happens where it is absent."""
        if not self.is_s3:
            self._path(name).unlink(missing_ok=True)
            return
        bucket, key = self._key(name)
        s3_client(os.getpid()).delete_object(Bucket=bucket, Key=key)

    def delete_tree(self, first: Sequence[str] = ()) -> None:
        """Remove this folder and all that is in it, before the rest the files `first`, in this order.

        Killed on the way, it then leaves nothing that says that the rest is whole.
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
        """Remove what killed writes below this folder have left. Only for who alone writes there; S3 knows no such."""
        if self.is_s3:
            return
        for path in [*self._path().rglob("*.tmp"), *self._path().rglob(".tmp/*")]:
            if path.is_file():
                path.unlink(missing_ok=True)

    def upload(self, local_path: str | Path, name: str) -> None:
        """Copy a local file to `name`, whole or not at all."""
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
        """This folder as pyarrow and Ray see it: ``read_parquet(path, filesystem=filesystem)``."""
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
        """As `arrow`, for a writer whose files must appear whole or not at all (on S3 they do anyway)."""
        if self.is_s3:
            return self.arrow()
        return pyarrow.fs.PyFileSystem(_WholeFiles(LocalFileSystem())), self.uri
