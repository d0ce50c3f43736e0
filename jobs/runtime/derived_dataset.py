"""Writes a prepared dataset from another one: the same images with other captions."""

import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.prepare import DATASET_NAME, SHAPES, SUCCESS
from jobs.runtime.blocks import ROWS_PER_BLOCK
from jobs.runtime.progress import progress
from mmcore.data.prepared import DatasetSummary, read_dataset_facts
from mmcore.errors import InputError
from mmcore.storage import Storage


def check_derived(storage: Storage, dataset: str, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What ``_SUCCESS`` of the dataset `name` says if it was made with `settings`; None where it is not finished.

    Raises InputError for a name that cannot be one, is that of `dataset`, or is that of another finished dataset.
    """
    if not DATASET_NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: use lower-case letters, digits, - and _")
    if name in (dataset, SHAPES):
        raise InputError(f"--name {name}: that dataset is another one; give the new dataset a name of its own")
    if not (storage / "data" / name).exists(SUCCESS):
        return None
    there = read_dataset_facts(storage, name)
    if there.get("settings") != json.loads(json.dumps(settings)):
        raise InputError(f"--name {name}: {storage / 'data' / name} is finished with other settings; give another name")
    return there


def write_derived(
    storage: Storage,
    dataset: str,
    name: str,
    settings: dict[str, Any],
    change: Callable[[pa.Table], pa.Table],
    finish: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the dataset `name`, one file after the other, and ``_SUCCESS`` last. Returns what that says.

    Args:
        change: rows of a file of `dataset` -> rows of the new file, called in the order of the files.
        finish: called when all files are there, before ``_SUCCESS``.
    """
    source, target = storage / "data" / dataset, storage / "data" / name
    names = source.list(".parquet")
    for old in target.list(".parquet"):
        target.delete(old)
    summary: DatasetSummary | None = None
    num_read, num_rows = 0, read_dataset_facts(storage, dataset).get("num_images", 0)
    files: list[str] = []
    with progress("writing", "images") as report:
        for part in names:
            before = pq.read_table(io.BytesIO(source.read(part)))
            table = change(before)
            num_read += len(before)
            report(num_read, max(num_rows, num_read))
            if summary is None:
                summary = DatasetSummary([each for each in table.schema.names if each.startswith("split")])
            for batch in table.to_batches(max_chunksize=ROWS_PER_BLOCK):
                for row in batch.to_pylist():
                    summary.add(row)
            if len(table):
                buffer = io.BytesIO()
                pq.write_table(table, buffer, row_group_size=ROWS_PER_BLOCK)
                files.append(f"part-{len(files):05d}.parquet")
                target.write(files[-1], buffer.getvalue())
    assert summary is not None, f"{source}: no files"
    finish()
    facts = {"dataset": name, **summary.facts(), "settings": settings, "skipped": [], "files": files}
    target.write(SUCCESS, json.dumps(facts, indent=1, ensure_ascii=False).encode())
    return facts
