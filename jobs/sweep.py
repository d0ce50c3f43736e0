"""Work over many images, exactly once: fixed blocks of rows, each committed by creating one Parquet file.

The plan of a sweep (``sweep.json``) fixes the order of the images and cuts it into blocks. Block k is done if and
only if ``parts/part-k.parquet`` exists, and that file is created once: of two workers with the same block, the
second one's result is dropped. So a run that is killed loses at most its blocks in flight, and running the same
command again does the rest. The files are the only truth; there is no second record to disagree with them.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.cluster import Watchdog, connect, max_gpus
from jobs.progress import progress
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES
from mmcore.storage import Storage

# More files than this make listing and reading a finished sweep slow.
MAX_BLOCKS = 10_000
ROWS_PER_BLOCK = 64
# Of an autoscaler without a limit.
_MAX_ACTORS = 1000


@dataclass(frozen=True)
class Blocks:
    """The rows of a sweep in order, cut into blocks that a worker reads by itself."""

    source: Storage
    items: list[dict[str, Any]]
    num_rows: int
    ids_sha256: str


def part_name(block: int) -> str:
    return f"part-{block:06d}.parquet"


def plan_blocks(source: Storage, split: str | None = None, rows_per_block: int = ROWS_PER_BLOCK) -> Blocks:
    """Blocks over Parquet shards (``image_id``, ``image``) or over a folder of image files.

    `split`: ``COLUMN:NAME`` keeps the rows of one split. Raises InputError for an empty source, a missing column, a
    split that no row is of, or an image_id that stands there twice.
    """
    shards = source.list(".parquet")
    if shards:
        items, ids = _parquet_blocks(source, shards, split, rows_per_block)
    else:
        if split is not None:
            raise InputError(f"--split {split}: {source} holds no Parquet shards with a split column")
        files = [name for name in source.list() if name.lower().endswith(IMAGE_SUFFIXES)]
        ids = [os.path.splitext(name)[0] for name in files]
        step = max(rows_per_block, -(-len(files) // MAX_BLOCKS))
        items = [{"files": files[i : i + step]} for i in range(0, len(files), step)]
    if not ids and shards:
        raise InputError(f"--split {split}: no row of {source} is of it; see the values of that column")
    if not ids:
        raise InputError(f"{source}: neither Parquet shards nor image files ({' '.join(IMAGE_SUFFIXES)}) there")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(image_id for image_id in ids if image_id in seen or seen.add(image_id))  # type: ignore[func-returns-value]
        raise InputError(f"{source}: image_id {twice!r} stands there twice; each image must have its own")
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return Blocks(source, [{"block": k, **item} for k, item in enumerate(items)], len(ids), digest)


def _parquet_blocks(
    source: Storage, shards: list[str], split: str | None, rows_per_block: int
) -> tuple[list[dict[str, Any]], list[str]]:
    filesystem, path = source.arrow()
    column, _, name = (split or "").partition(":")
    if split is not None and not name:
        raise InputError(f"--split {split!r}: write COLUMN:NAME, such as split_karpathy:test")
    files = [pq.ParquetFile(f"{path}/{shard}", filesystem=filesystem) for shard in shards]
    rows_per_block = max(rows_per_block, -(-sum(file.metadata.num_rows for file in files) // MAX_BLOCKS))
    items: list[dict[str, Any]] = []
    ids: list[str] = []
    for shard, file in zip(shards, files, strict=True):
        names = file.schema_arrow.names
        for needed in ["image_id", "image", *([column] if split else [])]:
            if needed not in names:
                raise InputError(f"{source}/{shard}: no column {needed!r}; it has {', '.join(names)}")
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=["image_id", *([column] if split else [])])
            values = table[column].to_pylist() if split else [name] * len(table)
            rows = [row for row, value in enumerate(values) if value == name]
            chosen = table["image_id"].take(pa.array(rows, pa.int64())).to_pylist()
            ids += chosen
            items += [
                {"shard": shard, "row_group": group, "rows": rows[i : i + rows_per_block]}
                for i in range(0, len(rows), rows_per_block)
            ]
    return items, ids


def read_block(source: Storage, item: dict[str, Any]) -> dict[str, Any]:
    """The rows of one block: lists under ``image_id``, ``file_name`` and ``image`` (encoded bytes)."""
    if "files" in item:
        return {
            "image_id": [os.path.splitext(name)[0] for name in item["files"]],
            "file_name": list(item["files"]),
            "image": [source.read(name) for name in item["files"]],
        }
    filesystem, path = source.arrow()
    file = pq.ParquetFile(f"{path}/{item['shard']}", filesystem=filesystem)
    names = [name for name in ("image_id", "file_name", "image") if name in file.schema_arrow.names]
    rows = file.read_row_group(item["row_group"], columns=names).take(pa.array(item["rows"], pa.int64())).to_pydict()
    return {**rows, "file_name": rows.get("file_name", rows["image_id"])}


class _BlockWorker:
    """An actor: holds a worker and commits each block that it is given."""

    def __init__(self, worker_type: type, worker_kwargs: dict[str, Any], out: Storage, num_threads: int | None) -> None:
        import torch
        from ray._private.utils import get_num_cpus

        # Ray sets OMP_NUM_THREADS to the actor's CPUs, which is the scheduler's number, not the container's.
        torch.set_num_threads(num_threads or max(1, int(get_num_cpus())))
        start = time.perf_counter()
        self.out, self.mistake = out, ""
        try:
            self.worker = worker_type(**worker_kwargs)
        except InputError as error:
            # Told with the first block: Ray would hand on a constructor's exception as text, after trying again.
            self.mistake = str(error)
        self.load_s = time.perf_counter() - start

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        block = int(row["block"])
        result = {"block": block, "num_rows": 0, "load_s": self.load_s, "error": ""}
        if self.mistake:
            return {**result, "seconds": 0.0, "error": self.mistake}
        try:
            table = self.worker(row["rows"])
        except InputError as error:
            # Returned, not raised: Ray Data hands on an exception's text, not its type.
            return {**result, "seconds": time.perf_counter() - start, "error": str(error)}
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.out.create(f"parts/{part_name(block)}", buffer.getvalue())
        return {**result, "num_rows": len(table), "seconds": time.perf_counter() - start}


def _num_actors() -> tuple[int, float]:
    """Most actors and the GPUs of each: one a GPU, or one a machine where there is none (its threads use all cores)."""
    num_gpus = max_gpus()
    if num_gpus:
        return min(num_gpus, _MAX_ACTORS), 1.0
    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")), 0.0


def committed_blocks(out: Storage) -> set[int]:
    """The blocks whose file exists."""
    return {int(name[len("part-") : -len(".parquet")]) for name in (out / "parts").list(".parquet")}


def open_sweep(out: Storage, settings: dict[str, Any], blocks: Blocks) -> None:
    """Write ``sweep.json``, or check that the one there is of the same sweep. Raises InputError if it is not."""
    plan = {
        "settings": settings,
        "num_rows": blocks.num_rows,
        "num_blocks": len(blocks.items),
        "ids_sha256": blocks.ids_sha256,
    }
    data = (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode()
    if out.create("sweep.json", data):
        return
    there = json.loads(out.read("sweep.json"))
    for name in plan:
        if there.get(name) != json.loads(data)[name]:
            before, now = there.get(name), plan[name]
            if isinstance(before, dict):
                name = next(key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key))
                before, now = before.get(name), settings.get(name)
            raise InputError(
                f"{out}: holds a sweep with other settings: {name} was {before!r} and is now {now!r}; "
                "use the same settings to go on, or another --out"
            )


def run_sweep(
    *,
    what: str,
    out: Storage,
    settings: dict[str, Any],
    blocks: Blocks,
    worker_type: type,
    worker_kwargs: dict[str, Any],
    stall_timeout_s: float | None = None,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Bring every block through ``worker_type(**worker_kwargs)`` once; returns what was done and how fast.

    The worker is called with the rows of a block (see `read_block`) and returns one Arrow table.
    """
    open_sweep(out, settings, blocks)
    done = committed_blocks(out)
    todo = [item for item in blocks.items if item["block"] not in done]
    facts: dict[str, Any] = {
        "num_rows": blocks.num_rows,
        "num_blocks": len(blocks.items),
        "blocks_done_before": len(done),
        "rows_done_now": 0,
        "seconds": 0.0,
    }
    if not todo:
        print(f"{what}: all {blocks.num_rows} images are done already", flush=True)
        return facts
    if done:
        print(f"{what}: {len(done)} of {len(blocks.items)} blocks are done already, going on", flush=True)
    connect()
    start = time.perf_counter()
    num_rows_before = blocks.num_rows - sum(_num_rows(item) for item in todo)
    with Watchdog(what, stall_timeout_s) as watchdog, progress(what, "images") as report:
        report(num_rows_before, blocks.num_rows)
        for row in _results(out, blocks.source, todo, worker_type, worker_kwargs, num_threads):
            watchdog.beat()
            if row["error"]:
                raise InputError(row["error"])
            facts["rows_done_now"] += int(row["num_rows"])
            facts["load_s"] = max(facts.get("load_s", 0.0), float(row["load_s"]))
            report(num_rows_before + facts["rows_done_now"], blocks.num_rows)
    facts["seconds"] = time.perf_counter() - start
    missing = {item["block"] for item in blocks.items} - committed_blocks(out)
    if missing:
        raise InputError(
            f"{out}: {len(missing)} blocks are missing after the sweep; a local folder must be one that every machine "
            "of the cluster shares, otherwise use s3://bucket/prefix"
        )
    return facts


def _num_rows(item: dict[str, Any]) -> int:
    return len(item["files"] if "files" in item else item["rows"])


def _results(
    out: Storage,
    source: Storage,
    todo: list[dict[str, Any]],
    worker_type: type,
    worker_kwargs: dict[str, Any],
    num_threads: int | None,
) -> Iterator[dict[str, Any]]:
    """Read (tasks) -> work and commit (actors), streamed by Ray Data; one row is one block."""
    num_actors, num_gpus = _num_actors()

    def read(row: dict[str, Any]) -> dict[str, Any]:
        item = json.loads(row["item"])
        return {"block": item["block"], "rows": read_block(source, item)}

    dataset = (
        ray.data.from_items([{"item": json.dumps(item)} for item in todo], override_num_blocks=len(todo))
        # Fractions of a CPU: reading must not take the CPU that the actors wait for (a deadlock on 2 CPUs).
        .map(read, num_cpus=0.25)
        .map(
            _BlockWorker,  # type: ignore[arg-type]
            fn_constructor_kwargs={
                "worker_type": worker_type,
                "worker_kwargs": worker_kwargs,
                "out": out,
                "num_threads": num_threads,
            },
            # From one on: an autoscaler starts machines as they are asked for.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_actors),
            num_cpus=0.5,
            num_gpus=num_gpus or None,
        )
    )
    yield from dataset.iter_rows()


def read_parts(out: Storage, columns: list[str] | None = None) -> pa.Table:
    """All committed rows, in the order of the plan."""
    folder = out / "parts"
    filesystem, path = folder.arrow()
    files = (pq.ParquetFile(f"{path}/{name}", filesystem=filesystem) for name in folder.list(".parquet"))
    return pa.concat_tables(file.read(columns=columns) for file in files)
