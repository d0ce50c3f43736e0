"""Memory-mapped columns: fixed-size tensors of a Parquet cache, laid out on the local disk for lookup by row.

A cache folder in the storage holds ``parts/*.parquet`` with ``image_id`` and ``value`` (the raw bytes of one tensor)
and a ``_SUCCESS`` that says their dtype and shape. `open_column` copies it once to this machine.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mmcore.errors import InputError
from mmcore.storage import Storage

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


def open_column(folder: Storage, cache: Path) -> Column:
    """Map the column that `folder` holds, copying it to `cache` first if it is not there.

    Raises InputError where the folder holds no finished column.
    """
    try:
        facts = json.loads(folder.read(SUCCESS))
    except FileNotFoundError:
        raise InputError(f"{folder}: no finished column there; run the job that makes it again") from None
    dtype, shape, num_rows = np.dtype(facts["dtype"]), tuple(facts["shape"]), facts["num_rows"]
    # The content's own hash names the copy, so that a column made anew is never mistaken for an old copy.
    target = cache / "columns" / facts["fingerprint"]
    with _locked(target.with_suffix(".lock")):
        if not (target / "ids.json").exists():
            target.mkdir(parents=True, exist_ok=True)
            values = np.lib.format.open_memmap(target / "values.npy", "w+", dtype, (num_rows, *shape))
            image_ids: list[str] = []
            filesystem, path = (folder / "parts").arrow()
            for name in (folder / "parts").list(".parquet"):
                for batch in pq.ParquetFile(f"{path}/{name}", filesystem=filesystem).iter_batches(batch_size=256):
                    for image_id, value in zip(batch["image_id"].to_pylist(), batch["value"], strict=True):
                        values[len(image_ids)] = np.frombuffer(value.as_buffer(), dtype).reshape(shape)
                        image_ids.append(image_id)
            if len(image_ids) != num_rows:
                raise InputError(f"{folder}: {len(image_ids)} rows in its parts, {num_rows} in its {SUCCESS}")
            values.flush()
            temporary = target / "ids.json.tmp"
            temporary.write_text(json.dumps(image_ids))
            os.replace(temporary, target / "ids.json")
    return Column(tuple(json.loads((target / "ids.json").read_text())), np.load(target / "values.npy", mmap_mode="r"))
