"""Work over many images, exactly once: fixed blocks of rows, each committed by creating one Parquet file.

The plan of a sweep (``sweep.json``) fixes the order of the images and cuts it into blocks. Block k is done if and
only if its file, such as ``parts/part-k.parquet``, exists, and that file is created once: of two workers with the
same block, the second one's result is dropped. So a run that is killed loses at most its blocks in flight, and running
the same command again does the rest. The files are the only truth; there is no second record to disagree with them.
(Ray Data's own checkpointing would be one, and waits for ever on a cluster of two CPUs.)
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.cluster import Watchdog, connect, cpus, max_gpus
from jobs.commandline import one_line
from jobs.progress import progress
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES
from mmcore.storage import Storage

# More files than this make listing and reading a finished sweep slow.
MAX_BLOCKS = 10_000
ROWS_PER_BLOCK = 64
# Of an autoscaler without a limit.
_MAX_ACTORS = 1000
# The folder of the files that commit the blocks.
PARTS = "parts"
# The file that says what a sweep is.
SWEEP = "sweep.json"
# Objects that are read or listed at the same time: each costs a round trip to S3.
NUM_IO_THREADS = 16


@dataclass(frozen=True)
class Blocks:
    """The rows of a sweep in order, cut into blocks.

    An item names the rows of its block in `source`, or holds them itself under ``columns`` (then there is no source).
    """

    source: Storage | None
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
        raise InputError(f"{source}: its Parquet shards hold no rows")
    if not ids:
        raise InputError(f"{source}: neither Parquet shards nor image files ({' '.join(IMAGE_SUFFIXES)}) there")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(image_id for image_id in ids if image_id in seen or seen.add(image_id))  # type: ignore[func-returns-value]
        raise InputError(f"{source}: image_id {twice!r} stands there twice; each image must have its own")
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return Blocks(source, [{"block": k, **item} for k, item in enumerate(items)], len(ids), digest)


def blocks_of_rows(columns: dict[str, list[Any]], rows_per_block: int) -> Blocks:
    """Blocks that hold their rows themselves: equally long lists of JSON values under each name.

    The digest of the plan is of every value, not only of the ids.
    """
    num_rows = len(next(iter(columns.values())))
    items = [
        {"block": k, "columns": {name: values[start : start + rows_per_block] for name, values in columns.items()}}
        for k, start in enumerate(range(0, num_rows, rows_per_block))
    ]
    if len(items) > MAX_BLOCKS:
        raise ValueError(f"{len(items)} blocks of {rows_per_block} rows; at most {MAX_BLOCKS} are listed quickly")
    return Blocks(None, items, num_rows, hashlib.sha256(json.dumps(columns).encode()).hexdigest())


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
    there: set[str] = set()
    for shard, file in zip(shards, files, strict=True):
        names = file.schema_arrow.names
        for needed in ["image_id", "image", *([column] if split else [])]:
            if needed not in names:
                raise InputError(f"{source}/{shard}: no column {needed!r}; it has {', '.join(names)}")
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=["image_id", *([column] if split else [])])
            values = table[column].to_pylist() if split else [name] * len(table)
            there.update(values)
            rows = [row for row, value in enumerate(values) if value == name]
            chosen = table["image_id"].take(pa.array(rows, pa.int64())).to_pylist()
            ids += chosen
            items += [
                {"shard": shard, "row_group": group, "rows": rows[i : i + rows_per_block]}
                for i in range(0, len(rows), rows_per_block)
            ]
    if split and there and not ids:
        raise InputError(f"--split {split}: no row of {source} is of it; the column holds {', '.join(sorted(there))}")
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

    def __init__(
        self, worker_type: type, worker_kwargs: dict[str, Any], out: Storage, parts: str, num_threads: int | None
    ) -> None:
        self.out, self.parts, self.num_threads = out, parts, num_threads or cpus()
        self.worker, self.error = None, ""
        self._set_threads()
        start = time.perf_counter()
        try:
            self.worker = worker_type(**worker_kwargs)
        except Exception as error:
            self.error = _reason(error)
        self.load_s = time.perf_counter() - start

    def _set_threads(self) -> None:
        import torch

        # Ray sets OMP_NUM_THREADS to the actor's CPUs, which is the scheduler's number, not the container's. OpenMP
        # keeps it for each thread, and Ray Data calls a worker from other threads than the one that made it.
        torch.set_num_threads(self.num_threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        block = int(row["block"])
        result = {"block": block, "num_rows": 0, "load_s": self.load_s, "seconds": 0.0, "error": self.error}
        if self.worker is None:
            return result
        self._set_threads()
        try:
            table = self.worker(row["rows"] if "rows" in row else json.loads(row["item"])["columns"])
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            self.out.create(f"{self.parts}/{part_name(block)}", buffer.getvalue())
        except Exception as error:
            return {**result, "seconds": time.perf_counter() - start, "error": _reason(error)}
        return {**result, "num_rows": len(table), "seconds": time.perf_counter() - start}


def _reason(error: Exception) -> str:
    """What to tell the user; a fault of ours is raised again.

    Returned and not raised, as Ray Data hands on an exception's text and not its type, and tries a constructor again.
    """
    line = one_line(error)
    if line is None:
        raise error
    return line


def num_workers_and_gpus(device: str | None = None) -> tuple[int, float]:
    """How many workers the cluster takes at most, and the GPUs of each.

    One a GPU that it has or can start; one a machine where there is none or `device` is "cpu" (its threads use all
    cores). With "cuda" at least one.
    """
    num_gpus = min(max_gpus(), _MAX_ACTORS)
    if device == "cuda" or (device is None and num_gpus):
        return max(1, num_gpus), 1.0
    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")), 0.0


def committed_blocks(out: Storage, parts: str = PARTS) -> set[int]:
    """The blocks whose file exists."""
    return {int(name[len("part-") : -len(".parquet")]) for name in (out / parts).list(".parquet")}


def read_plan(out: Storage) -> dict[str, Any] | None:
    """What ``sweep.json`` says; None where no sweep was begun."""
    try:
        return json.loads(out.read(SWEEP))
    except FileNotFoundError:
        return None


def open_sweep(out: Storage, settings: dict[str, Any], blocks: Blocks, facts: dict[str, Any] | None = None) -> None:
    """Write ``sweep.json``, or check that the one there is of the same sweep. Raises InputError if it is not.

    `facts` are written beside the settings and not compared.
    """
    plan = {
        "settings": settings,
        "num_rows": blocks.num_rows,
        "num_blocks": len(blocks.items),
        "ids_sha256": blocks.ids_sha256,
    }
    written = json.dumps({**plan, **(facts or {})}, indent=1, sort_keys=True) + "\n"
    if out.create(SWEEP, written.encode()):
        return
    there, plan = json.loads(out.read(SWEEP)), json.loads(json.dumps(plan))
    for name in plan:
        if there.get(name) != plan[name]:
            before, now = there.get(name), plan[name]
            if isinstance(before, dict):
                name = next(key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key))
                before, now = before.get(name), settings.get(name)
            what = f"with other settings: {name} was {before!r} and is now {now!r}"
            if name == "ids_sha256":
                what = "of other images: their ids, prompts or seeds, or the order of them, are not the same"
            raise InputError(f"{out}: holds a sweep {what}; use the same settings to go on, or another --out")


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
    parts: str = PARTS,
    plan_facts: dict[str, Any] | None = None,
    device: str | None = None,
    num_workers: int | None = None,
    overlap: bool = False,
) -> dict[str, Any]:
    """Bring every block through ``worker_type(**worker_kwargs)`` once; returns what was done and how fast.

    The worker is called with the rows of a block (see `read_block`, `blocks_of_rows`) and returns one Arrow table.

    Args:
        parts: folder in `out` of the files that commit the blocks.
        plan_facts: what is written to ``sweep.json`` beside the settings.
        device: "cpu" or "cuda" for each worker; None takes GPUs where there are any.
        num_workers: by default one for each GPU, or for each machine.
        overlap: a worker may be called from a second thread before the first call returned, to work on one block
            while it writes another: it must take care of its own locks.
    """
    open_sweep(out, settings, blocks, plan_facts)
    done = committed_blocks(out, parts)
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
    possible_workers, num_gpus = num_workers_and_gpus(device)
    # From one on, where nobody gave a number: an autoscaler starts machines as they are asked for.
    least, most = (num_workers, num_workers) if num_workers else (1, possible_workers)
    actors = {
        "fn": _BlockWorker,
        "fn_constructor_kwargs": {
            "worker_type": worker_type,
            "worker_kwargs": worker_kwargs,
            "out": out,
            "parts": parts,
            "num_threads": num_threads,
        },
        "compute": ray.data.ActorPoolStrategy(
            min_size=least,
            max_size=most,
            enable_true_multi_threading=overlap,
            max_concurrent_calls_per_actor=2 if overlap else 1,
        ),
        "num_cpus": 0.5,
        "num_gpus": num_gpus or None,
    }
    start = time.perf_counter()
    num_rows_before = blocks.num_rows - sum(_num_rows(item) for item in todo)
    with Watchdog(what, stall_timeout_s) as watchdog, progress(what, "images") as report:
        report(num_rows_before, blocks.num_rows)
        last = time.perf_counter()
        for row in _results(blocks.source, todo, actors):
            watchdog.beat()
            # A block of a slow model is no stall.
            now = time.perf_counter()
            watchdog.report_after_s, last = max(watchdog.report_after_s, 3 * (now - last)), now
            if row["error"]:
                raise InputError(row["error"])
            facts["rows_done_now"] += int(row["num_rows"])
            facts["load_s"] = max(facts.get("load_s", 0.0), float(row["load_s"]))
            report(num_rows_before + facts["rows_done_now"], blocks.num_rows)
    facts["seconds"] = time.perf_counter() - start
    missing = {item["block"] for item in blocks.items} - committed_blocks(out, parts)
    if missing:
        raise InputError(
            f"{out}: {len(missing)} blocks are missing after the sweep; a local folder must be one that every machine "
            "of the cluster shares, otherwise use s3://bucket/prefix"
        )
    return facts


def _num_rows(item: dict[str, Any]) -> int:
    if "columns" in item:
        return len(next(iter(item["columns"].values())))
    return len(item["files"] if "files" in item else item["rows"])


def _results(source: Storage | None, todo: list[dict[str, Any]], actors: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read (tasks) -> work and commit (actors), streamed by Ray Data; one row is one block."""

    def read(row: dict[str, Any]) -> dict[str, Any]:
        assert source is not None
        item = json.loads(row["item"])
        return {"block": item["block"], "rows": read_block(source, item)}

    rows = [{"block": item["block"], "item": json.dumps(item)} for item in todo]
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(todo))
    if source is not None:
        # Fractions of a CPU: reading must not take the CPU that the actors wait for (a deadlock on 2 CPUs).
        dataset = dataset.map(read, num_cpus=0.25)
    yield from dataset.map(**actors).iter_rows()


def read_parts(out: Storage, columns: list[str] | None = None, parts: str = PARTS) -> pa.Table:
    """All committed rows, in the order of the plan."""
    folder = out / parts
    # Read through Storage, whose requests to S3 wait longer and longer between attempts; pyarrow's do not.
    read = lambda name: pq.read_table(io.BytesIO(folder.read(name)), columns=columns)
    with ThreadPoolExecutor(NUM_IO_THREADS) as threads:
        return pa.concat_tables(threads.map(read, folder.list(".parquet")))
