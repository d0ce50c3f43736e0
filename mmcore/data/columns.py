"""Memory-mapped columns: the tensors of a Parquet cache, laid out on the local disk for lookup by row.

A cache folder in the storage holds ``parts/*.parquet`` with ``image_id`` and the raw bytes of each tensor, and a
``_SUCCESS`` with their facts. One tensor an image is called ``value``, and its dtype and shape are facts of their own.
Several have names, and the facts hold ``tensors``: each name with its dtype and shape. A first axis of ``null`` is
ragged: it differs from image to image. `open_column` copies the tensors once to this machine.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.errors import InputError
from mmcore.storage import Storage, writing

SUCCESS = "_SUCCESS"
VALUE = "value"
"""The name of a sole tensor."""
_IDS = "ids.json"
# A name becomes that of a file.
_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class TensorSpec:
    """What each image's tensor of one name is like."""

    dtype: str
    """numpy's name, such as float16 or uint8."""
    shape: tuple[int | None, ...]
    """A first axis of None is ragged."""

    @property
    def is_ragged(self) -> bool:
        return bool(self.shape) and self.shape[0] is None

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape without a ragged axis."""
        return tuple(side for side in self.shape if side is not None)


class Ragged:
    """Tensors of which the first axis differs, one after the other in one array."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        """`flat`: (T, ...), all rows of all images; `offsets`: int64 (N + 1,), where each image's begin and end."""
        self.flat, self.offsets = flat, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> np.ndarray:
        """The tensor (L, ...) of one image."""
        return self.flat[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each image's first axis, int64 (N,)."""
        return np.diff(self.offsets)

    def padded(self, places: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tensors of some images (B, L, ...), zeros up to the longest, and which are real, bool (B, L)."""
        parts = [self[int(place)] for place in places]
        longest = max(len(part) for part in parts)
        values = np.zeros((len(parts), longest, *self.flat.shape[1:]), self.flat.dtype)
        mask = np.zeros((len(parts), longest), bool)
        for row, part in enumerate(parts):
            values[row, : len(part)], mask[row, : len(part)] = part, True
        return values, mask


class Column:
    """One tensor an image, or several with names; a row for each image."""

    def __init__(
        self,
        image_ids: tuple[str, ...],
        values: np.ndarray | None = None,
        tensors: dict[str, np.ndarray | Ragged] | None = None,
    ) -> None:
        """`values`: (N, ...), of a sole tensor; `tensors`: by name. Read-only and memory-mapped where it was opened."""
        assert (values is None) != (tensors is None)
        self.image_ids = image_ids
        self.tensors: dict[str, np.ndarray | Ragged] = tensors if values is None else {VALUE: values}  # type: ignore[assignment]

    @property
    def values(self) -> np.ndarray:
        """(N, ...) of a column of one tensor. Raises InputError where it holds others."""
        values = self.tensors.get(VALUE)
        if not isinstance(values, np.ndarray):
            raise InputError(
                f"the cached column holds {', '.join(self.tensors)} where one tensor of one shape is expected; remove "
                "STORAGE/features to make it anew"
            )
        return values


def column_table(image_ids: Sequence[str], tensors: Mapping[str, Sequence[np.ndarray] | np.ndarray]) -> pa.Table:
    """A part of a cache: for each name one tensor an image. Those of unequal first axes are ragged.

    Their facts travel in the schema, so that a finished cache describes itself: `facts_of_parts`.
    """
    specs, columns = {}, {}
    for name, values in tensors.items():
        first = np.asarray(values[0])
        ragged = not isinstance(values, np.ndarray)
        shape: tuple[int | None, ...] = (None, *first.shape[1:]) if ragged else first.shape
        assert all(each.dtype == first.dtype and each.shape[ragged:] == first.shape[ragged:] for each in values)
        specs[name] = TensorSpec(str(first.dtype), shape)
        columns[name] = pa.array([np.ascontiguousarray(each).tobytes() for each in values], pa.binary())
    # The dtype is plain text, as it was before tensors had names: a cache that was begun then is finished now.
    metadata = {name: value if name == "dtype" else json.dumps(value) for name, value in facts_of(specs).items()}
    schema = pa.schema([("image_id", pa.string()), *((name, pa.binary()) for name in columns)], metadata=metadata)
    return pa.table({"image_id": pa.array(image_ids, pa.string()), **columns}, schema=schema)


def facts_of(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What ``_SUCCESS`` says of the tensors."""
    facts = {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in specs.items()}
    sole = facts.get(VALUE)
    return sole if len(facts) == 1 and sole is not None and not specs[VALUE].is_ragged else {"tensors": facts}


def facts_of_parts(folder: Storage) -> dict[str, Any]:
    """What the parts of a cache say of their tensors, as `facts_of` gives it."""
    parts = folder / "parts"
    with parts.open(parts.list(".parquet")[0]) as first:
        metadata = {key.decode(): value.decode() for key, value in pq.read_schema(first).metadata.items()}
    kept = {name: metadata[name] for name in ("dtype", "shape", "tensors") if name in metadata}
    return {name: value if name == "dtype" else json.loads(value) for name, value in kept.items()}


def specs_of(facts: Mapping[str, Any], where: str) -> dict[str, TensorSpec]:
    """The tensors that ``_SUCCESS`` names. Raises InputError for facts that no column has."""
    named = facts.get("tensors") or {VALUE: facts}
    specs = {name: TensorSpec(each["dtype"], tuple(each["shape"])) for name, each in named.items()}
    for name, spec in specs.items():
        try:
            np.dtype(spec.dtype)
        except TypeError:
            raise InputError(f"{where}: tensor {name} is of type {spec.dtype}, which numpy does not know") from None
        if None in spec.shape[1:]:
            raise InputError(f"{where}: tensor {name} is of shape {spec.shape}, and only a first axis can be ragged")
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}: tensor {name!r} has a name that is not of letters, digits and underscores")
    return specs


def bytes_per_image(facts: Mapping[str, Any], mean_lengths: Mapping[str, float] | None = None) -> int:
    """Bytes that an image takes in a column of these facts, rounded up; of ragged tensors for the mean length of their
    first axis, by name."""
    total = 0.0
    for name, spec in specs_of(facts, "column").items():
        size = math.prod(spec.fixed_shape) * np.dtype(spec.dtype).itemsize
        total += size * ((mean_lengths or {})[name] if spec.is_ragged else 1)
    return math.ceil(total)


def default_cache() -> Path:
    """Where this machine keeps its copies: ``MMCORE_CACHE``, else a folder of this user's among temporary files."""
    return Path(os.environ.get("MMCORE_CACHE") or Path(tempfile.gettempdir()) / f"mmcore-{os.getuid()}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Of several workers on one machine, one copies and the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reserve(path: Path) -> None:
    """Take the room of a mapped file now: where the disk is full later, the kernel ends the process that writes."""
    with writing(path), open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            file.truncate(0)
            raise


def open_column(
    folder: Storage,
    cache: Path,
    only: Sequence[str] | None = None,
    doing: Callable[[str], None] = lambda text: None,
) -> Column:
    """Map the column that `folder` holds, copying it to `cache` first if it is not there.

    `only`: the image_ids to copy, in the column's order, where the whole is too large for this disk. `doing` is told
    how far the copying is. Raises InputError where the folder holds no finished column.
    """
    try:
        facts = json.loads(folder.read(SUCCESS))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no finished column there; a local storage must be a folder that all machines share, otherwise "
            "use s3://bucket/prefix; or run the job that makes it again"
        ) from None
    specs, num_rows = specs_of(facts, str(folder)), facts["num_rows"]
    # The content's own hash names the copy, so that a column made anew is never mistaken for an old copy.
    target = cache / "columns" / facts["fingerprint"]
    chosen = None if only is None else set(only)
    if chosen is not None:
        num_rows = len(chosen)
        digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()[:16]
        target = target.with_name(f"{target.name}-{digest}")
    writers = {name: _Writer(target, name, spec, num_rows) for name, spec in specs.items()}
    files = [_IDS, *(file for writer in writers.values() for file in writer.files)]
    with _locked(target.with_suffix(".lock")):
        # All of them, since cleaners of temporary folders take what is old and large.
        if not all((target / file).exists() for file in files):
            target.mkdir(parents=True, exist_ok=True)
            image_ids: list[str] = []
            filesystem, parts = (folder / "parts").arrow()
            with contextlib.ExitStack() as opened:
                for writer in writers.values():
                    opened.enter_context(writer)
                for part in (folder / "parts").list(".parquet"):
                    for batch in pq.ParquetFile(f"{parts}/{part}", filesystem=filesystem).iter_batches(batch_size=256):
                        doing(f"copying features to this machine: {len(image_ids):,} of {num_rows:,}")
                        for row, image_id in enumerate(batch["image_id"].to_pylist()):
                            if chosen is not None and image_id not in chosen:
                                continue
                            if len(image_ids) == num_rows:
                                raise InputError(f"{folder}: more rows in its parts than the {num_rows} expected")
                            for name, writer in writers.items():
                                writer.add(batch[name][row].as_buffer(), f"{folder}: image {image_id}")
                            image_ids.append(image_id)
                if len(image_ids) != num_rows:
                    raise InputError(f"{folder}: {len(image_ids)} rows in its parts where {num_rows} are expected")
            with writing(target / f"{_IDS}.tmp"):
                (target / f"{_IDS}.tmp").write_text(json.dumps(image_ids))
            # All under other names until they are whole: a copy that is killed must not be taken for one beside what
            # a cleaner left, nor empty the file that another process still has mapped.
            for file in files:
                os.replace(target / f"{file}.tmp", target / file)
    tensors = {name: writer.mapped() for name, writer in writers.items()}
    return Column(tuple(json.loads((target / _IDS).read_text())), tensors=tensors)


class _Writer:
    """The file of one tensor's values, in the order in which they come; of a ragged one also that of its offsets."""

    def __init__(self, folder: Path, name: str, spec: TensorSpec, num_rows: int) -> None:
        self.folder, self.name, self.spec, self.num_rows = folder, name, spec, num_rows
        self.dtype = np.dtype(spec.dtype)
        stem = "values" if name == VALUE else name
        self.files = [f"{stem}.bin", f"{stem}.offsets.npy"] if spec.is_ragged else [f"{stem}.npy"]

    def __enter__(self) -> "_Writer":
        path = self.folder / f"{self.files[0]}.tmp"
        self.num_written = 0
        if self.spec.is_ragged:
            self.file, self.offsets = open(path, "wb"), np.zeros(self.num_rows + 1, np.int64)
        else:
            self.values = np.lib.format.open_memmap(path, "w+", self.dtype, (self.num_rows, *self.spec.fixed_shape))
            _reserve(path)
        return self

    def add(self, data: pa.Buffer, where: str) -> None:
        """Raises InputError where `data` are not as many bytes as the shape needs."""
        each = math.prod(self.spec.fixed_shape) * self.dtype.itemsize
        if data.size % max(each, 1) if self.spec.is_ragged else data.size != each:
            raise InputError(
                f"{where}: {self.name} holds {data.size} bytes, which are not of shape {self.spec.shape}, "
                f"{self.spec.dtype}; remove that folder to make the column anew"
            )
        if self.spec.is_ragged:
            with writing(self.file.name):
                self.file.write(data)
            self.offsets[self.num_written + 1] = self.offsets[self.num_written] + data.size // each
        else:
            self.values[self.num_written] = np.frombuffer(data, self.dtype).reshape(self.spec.fixed_shape)
        self.num_written += 1

    def __exit__(self, *error: object) -> None:
        if not self.spec.is_ragged:
            self.values.flush()
            return
        path, offsets = (self.folder / f"{file}.tmp" for file in self.files)
        try:
            with writing(path):
                self.file.close()
            with writing(offsets), open(offsets, "wb") as file:
                np.save(file, self.offsets, allow_pickle=False)
        except OSError:
            path.unlink()  # what did not fit takes no room
            raise

    def mapped(self) -> np.ndarray | Ragged:
        paths = [self.folder / file for file in self.files]
        if not self.spec.is_ragged:
            return np.load(paths[0], mmap_mode="r")
        offsets = np.load(paths[1])
        shape = (int(offsets[-1]), *self.spec.fixed_shape)
        # An empty file cannot be mapped.
        return Ragged(
            np.memmap(paths[0], self.dtype, "r", shape=shape) if offsets[-1] else np.zeros(shape, self.dtype), offsets
        )
