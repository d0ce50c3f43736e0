"""Memory-mapped columns: fixed-size tensors of a Parquet cache, laid out on the local disk for lookup by row.

A cache folder in the storage holds ``parts/*.parquet`` with ``image_id`` and ``value`` (the raw bytes of one tensor)
and a ``_SUCCESS`` that says their dtype and shape. `open_column` copies it once to this machine.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mmcore.errors import InputError
from mmcore.storage import Storage, writing

SUCCESS = "_SUCCESS"


@dataclass(frozen=True)
class Column:
    """One tensor a row."""

    image_ids: tuple[str, ...]
    values: np.ndarray  # (num_rows, *shape), read-only, memory-mapped


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
    dtype, shape, num_rows = np.dtype(facts["dtype"]), tuple(facts["shape"]), facts["num_rows"]
    # The content's own hash names the copy, so that a column made anew is never mistaken for an old copy.
    target = cache / "columns" / facts["fingerprint"]
    chosen = None if only is None else set(only)
    if chosen is not None:
        num_rows = len(chosen)
        digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()[:16]
        target = target.with_name(f"{target.name}-{digest}")
    with _locked(target.with_suffix(".lock")):
        # Both, since cleaners of temporary folders take what is old and large.
        if not ((target / "ids.json").exists() and (target / "values.npy").exists()):
            target.mkdir(parents=True, exist_ok=True)
            # Both under other names until they are whole: a copy that is killed must not be taken for one beside what
            # a cleaner left, nor empty the file that another process still has mapped.
            unfinished = {name: target / f"{name}.tmp" for name in ("values.npy", "ids.json")}
            values = np.lib.format.open_memmap(unfinished["values.npy"], "w+", dtype, (num_rows, *shape))
            _reserve(unfinished["values.npy"])
            image_ids: list[str] = []
            filesystem, parts = (folder / "parts").arrow()
            for name in (folder / "parts").list(".parquet"):
                for batch in pq.ParquetFile(f"{parts}/{name}", filesystem=filesystem).iter_batches(batch_size=256):
                    doing(f"copying features to this machine: {len(image_ids):,} of {num_rows:,}")
                    for image_id, value in zip(batch["image_id"].to_pylist(), batch["value"], strict=True):
                        if chosen is not None and image_id not in chosen:
                            continue
                        values[len(image_ids)] = np.frombuffer(value.as_buffer(), dtype).reshape(shape)
                        image_ids.append(image_id)
            if len(image_ids) != num_rows:
                raise InputError(f"{folder}: {len(image_ids)} rows in its parts where {num_rows} are expected")
            values.flush()
            with writing(unfinished["ids.json"]):
                unfinished["ids.json"].write_text(json.dumps(image_ids))
            for name, path in unfinished.items():
                os.replace(path, target / name)
    return Column(tuple(json.loads((target / "ids.json").read_text())), np.load(target / "values.npy", mmap_mode="r"))
