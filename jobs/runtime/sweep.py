"""Work over many images, exactly once: fixed blocks of rows, each committed by creating one Parquet file.

The plan of a sweep (``sweep.json``) fixes the order of the images and cuts it into blocks. The first worker that is
ready writes the plan, so that settings which do not work leave none. It is never removed while workers may live.

Block k is done if and only if its file exists, such as ``parts/part-k.parquet``. The file is created once: if two
workers computed the same block, the second result is dropped. A killed run loses at most its blocks in flight, and the
same command does the rest. There is no second record that could disagree with the files. (Ray Data's checkpointing
would be one, and it waits for ever on a cluster of two CPUs.)
"""

import contextlib
import io
import itertools
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NotRequired, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.runtime.blocks import Blocks, Columns, ColumnsItem, SourceItem
from jobs.runtime.cluster import connect, max_gpus, show_dashboard
from jobs.runtime.commandline import counted, one_line
from jobs.runtime.image_blocks import ImageRows, read_block
from jobs.runtime.progress import progress
from jobs.runtime.ray_private import cpus
from jobs.runtime.watchdog import Watchdog
from mmcore.data.parquet import read_tables
from mmcore.errors import InputError
from mmcore.storage import Storage

# Of an autoscaler without a limit.
_MAX_ACTORS = 1000
# Tasks that read ahead for each actor: one block is worked on, one waits, and as many are being read.
READERS_PER_WORKER = 2
# Blocks from which on somebody may want to look at the dashboard.
_LONG_SWEEP = 100
# Blocks whose items are one object of Ray's store: each of thousands takes it a while.
_BLOCKS_PER_OBJECT = 16
# The folder of the files that commit the blocks.
PARTS = "parts"
# The file that says what a sweep is.
SWEEP = "sweep.json"


class Plan(TypedDict):
    """What must be the same whenever a sweep is resumed."""

    settings: Mapping[str, object]
    num_rows: int
    num_blocks: int
    ids_sha256: str


class PlanFacts(TypedDict, total=False):
    """What ``sweep.json`` says beside the plan, each of it of one job: it is not compared."""

    files: list[str] | None
    commit: str
    prompts: str


class WrittenPlan(PlanFacts, total=False):
    """``sweep.json``, of whatever version wrote it."""

    settings: Mapping[str, object]
    num_rows: int
    num_blocks: int
    ids_sha256: str


class BlockRow(TypedDict):
    """What an actor is given: the number of a block and, where a task has read them, its rows."""

    block: int
    rows: NotRequired[ImageRows]


class BlockResult(TypedDict):
    """What an actor says of a block: the rows that it did, the seconds that it loaded, and an error or ""."""

    block: int
    num_rows: int
    load_s: float
    error: str


class SweepDone(TypedDict):
    """What one call of `run_sweep` did, and how fast: of its workers, the longest seconds of loading."""

    num_rows: int
    num_blocks: int
    blocks_done_before: int
    rows_done_now: int
    seconds: float
    load_s: NotRequired[float]


def part_name(block: int) -> str:
    return f"part-{block:06d}.parquet"


class _BlockWorker:
    """An actor: holds a worker and commits each block that it is given."""

    def __init__(
        self,
        worker_type: type,
        worker_kwargs: dict[str, Any],
        out: Storage,
        plan: Plan,
        plan_facts: PlanFacts,
        parts: str,
        num_threads: int | None,
        items: str | None = None,
    ) -> None:
        """`items`: the name of an `_ItemHolder`, where the blocks' rows come from there."""
        from mmcore.device import compute_thread  # here, as the driver may do without PyTorch

        self.out, self.parts = out, parts
        self.items: Any = None if items is None else ray.get_actor(items)
        self.worker, self.error = None, ""
        # Ray calls an actor from other threads than the one that made it, and sets OMP_NUM_THREADS to the scheduler's
        # number of CPUs.
        self.computing = compute_thread(num_threads or cpus())
        start = time.perf_counter()
        try:
            worker = self.computing.submit(worker_type, **worker_kwargs).result()
            _write_plan(out, plan, plan_facts)
            self.worker = worker
        except Exception as error:
            self.error = _reason(error)
        self.load_s = time.perf_counter() - start

    def __call__(self, row: BlockRow) -> BlockResult:
        block = int(row["block"])
        result: BlockResult = {"block": block, "num_rows": 0, "load_s": self.load_s, "error": self.error}
        if self.worker is None:
            return result
        try:
            rows = ray.get(self.items.columns.remote(block)) if self.items is not None else cast(Columns, row["rows"])
            made = self.computing.submit(self.worker, rows).result()
            table = self.worker.write(made) if hasattr(self.worker, "write") else made
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            self.out.create(f"{self.parts}/{part_name(block)}", buffer.getvalue())
        except Exception as error:
            return {**result, "error": _reason(error)}
        # Of the block: a worker may leave rows out of its table.
        return {**result, "num_rows": len(next(iter(rows.values())))}


def _reason(error: Exception) -> str:
    """What to tell the user; a fault of ours is raised again.

    Returned and not raised, as Ray Data hands on an exception's text and not its type, and tries a constructor again.
    """
    line = one_line(error)
    if line is None:
        raise error
    return line


def num_workers_and_gpus(device: str | None = None) -> tuple[int, float]:
    """How many workers the cluster takes at most, at least one, and the GPUs of each.

    One a GPU that it has or can start; one a machine where there is none or `device` is "cpu" (its threads use all
    cores).
    """
    num_gpus = min(max_gpus(), _MAX_ACTORS)
    if device == "cuda" or (device is None and num_gpus):
        return max(1, num_gpus), 1.0
    return max(1, len(_nodes_with("CPU"))), 0.0


def machine_cpus(device: str) -> list[int]:
    """The CPUs of each machine that takes workers now; those of this one where none does yet.

    Each machine is asked: what Ray was told of a machine is the scheduler's number.
    """
    nodes = _nodes_with("GPU" if device == "cuda" else "CPU")
    on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    return ray.get([_cpus.options(scheduling_strategy=each).remote() for each in on]) or [cpus()]


@ray.remote(num_cpus=0)
def _cpus() -> int:
    return cpus()


def _nodes_with(resource: str) -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]


def committed_blocks(out: Storage, parts: str = PARTS) -> set[int]:
    """The blocks whose file exists."""
    return {int(name[len("part-") : -len(".parquet")]) for name in (out / parts).list(".parquet")}


def read_plan(out: Storage, parts: str = PARTS) -> WrittenPlan | None:
    """What ``sweep.json`` says; None where no sweep was begun. Raises InputError for blocks without a plan."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(out.read(SWEEP))
    done = committed_blocks(out, parts)
    if not done:
        return None
    try:
        # Of a sweep that began in between: whoever commits a block has seen the plan.
        return json.loads(out.read(SWEEP))
    except FileNotFoundError:
        raise InputError(
            f"{out}/{parts}: holds {len(done)} blocks, and {SWEEP} beside it, which says of what, is gone; give "
            f"another --out, or remove {out}"
        ) from None


def plan_of(settings: Mapping[str, object], blocks: Blocks) -> Plan:
    """What must be the same whenever a sweep is resumed."""
    return {
        "settings": settings,
        "num_rows": blocks.num_rows,
        "num_blocks": len(blocks.items),
        "ids_sha256": blocks.ids_sha256,
    }


def check_plan(out: Storage, there: WrittenPlan, plan: Plan) -> None:
    """Raise InputError where `there`, the plan in `out`, is of another sweep than `plan`."""
    plan = json.loads(json.dumps(plan))
    for name in plan:
        if there.get(name) != plan[name]:  # type: ignore[literal-required]
            before, now = there.get(name), plan[name]  # type: ignore[literal-required]
            if isinstance(before, dict):
                name = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
                before, now = before.get(name), now.get(name)
            what = f"with other settings: {name} was {before!r} and is now {now!r}"
            if name == "ids_sha256":
                what = "of other images: their ids, prompts or seeds, or the order of them, are not the same"
            raise InputError(f"{out}: holds a sweep {what}; use the same settings to go on, or another --out")


def _write_plan(out: Storage, plan: Plan, facts: PlanFacts) -> None:
    written = json.dumps({**plan, **facts}, indent=1, sort_keys=True) + "\n"
    if not out.create(SWEEP, written.encode()):
        # Another worker's, or that of a run that began at the same moment.
        check_plan(out, json.loads(out.read(SWEEP)), plan)


def remove_sweep(out: Storage, parts: str = PARTS) -> None:
    """Remove a sweep, its plan last: a kill leaves no block without the plan, or without what the block names.

    What is left then is a part of the same sweep, which can be resumed or removed.
    """
    for name in out.list():
        if name != SWEEP:
            out.delete(name)
    for folder in [parts, *out.folders()]:
        (out / folder).delete_tree()
    out.delete_tree()


def run_sweep(
    *,
    what: str,
    out: Storage,
    settings: Mapping[str, object],
    blocks: Blocks,
    worker_type: type,
    worker_kwargs: dict[str, Any],
    stall_timeout_s: float | None = None,
    num_threads: int | None = None,
    parts: str = PARTS,
    plan_facts: PlanFacts | None = None,
    device: str | None = None,
    num_workers: int | None = None,
) -> SweepDone:
    """Bring every block through ``worker_type(**worker_kwargs)`` once; returns what was done and how fast.

    The worker is called with the rows of a block (`read_block`, `blocks_of_rows`) and returns one Arrow table; one
    that has a method ``write`` returns what that makes the table of, while the next block is worked on.

    Args:
        parts: folder in `out` of the files that commit the blocks.
        plan_facts: what is written to ``sweep.json`` beside the settings, and not compared.
        device: "cpu" or "cuda" for each worker; None takes GPUs where there are any.
        num_workers: by default one for each GPU, or for each machine.
    """
    plan, there = plan_of(settings, blocks), read_plan(out, parts)
    if there is not None:
        check_plan(out, there, plan)
    done = committed_blocks(out, parts)
    todo = [block for block in range(len(blocks.items)) if block not in done]
    facts: SweepDone = {
        "num_rows": blocks.num_rows,
        "num_blocks": len(blocks.items),
        "blocks_done_before": len(done),
        "rows_done_now": 0,
        "seconds": 0.0,
    }
    if not todo:
        print(f"{what}: all done already: {counted(blocks.num_rows, 'image')}", flush=True)
        return facts
    if done:
        print(f"{what}: {len(done)} of {len(blocks.items)} blocks are done already, going on", flush=True)
    connect()
    if len(todo) >= _LONG_SWEEP:
        show_dashboard()
    possible_workers, num_gpus = num_workers_and_gpus(device)
    overlap = hasattr(worker_type, "write")
    # From one on, where nobody gave a number: an autoscaler starts machines as they are asked for.
    least, most = (num_workers, num_workers) if num_workers else (1, possible_workers)
    actors = {
        "fn": _BlockWorker,
        "fn_constructor_kwargs": {
            "worker_type": worker_type,
            "worker_kwargs": worker_kwargs,
            "out": out,
            "plan": plan,
            "plan_facts": plan_facts or {},
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
    num_rows_before = blocks.num_rows - sum(map(blocks.num_rows_of, todo))
    with Watchdog(what, stall_timeout_s) as watchdog, progress(what, "images") as report:
        report(num_rows_before, blocks.num_rows, "starting the workers")
        last: float | None = None
        for row in _results(blocks, todo, actors, num_workers=most):
            watchdog.beat()
            now = time.perf_counter()
            # Before the first block, models were loaded as well.
            if last is not None:
                watchdog.usual_s = max(watchdog.usual_s, now - last)
            last = now
            if row["error"]:
                raise InputError(row["error"])
            facts["rows_done_now"] += int(row["num_rows"])
            facts["load_s"] = max(facts.get("load_s", 0.0), float(row["load_s"]))
            report(num_rows_before + facts["rows_done_now"], blocks.num_rows)
    facts["seconds"] = time.perf_counter() - start
    missing = set(range(len(blocks.items))) - committed_blocks(out, parts)
    if missing:
        raise InputError(
            f"{out}: {len(missing)} blocks are missing after the sweep; a local folder must be one that every machine "
            "of the cluster shares, otherwise use s3://bucket/prefix"
        )
    return facts


class _StoredItems:
    """The items of the blocks `todo` in Ray's object store, a few blocks an object, which spills to the disk."""

    def __init__(self, blocks: Blocks, todo: list[int]) -> None:
        groups = itertools.groupby(todo, lambda block: block // _BLOCKS_PER_OBJECT)
        self.refs = {group: ray.put({block: blocks.items[block] for block in members}) for group, members in groups}
        self.holder: Any = None

    def __getitem__(self, block: int) -> SourceItem | ColumnsItem:
        return ray.get(self.refs[block // _BLOCKS_PER_OBJECT])[block]


@ray.remote(num_cpus=0)
class _ItemHolder:
    """Hands out the rows of blocks that hold them, beside the driver.

    The actors that work know its name. They are started again where their machine is lost. Ray logs an error where
    such an actor has references or a handle among its arguments, which may lead nowhere then.
    """

    def __init__(self, items: _StoredItems) -> None:
        self.items = items

    def columns(self, block: int) -> Columns:
        return cast(ColumnsItem, self.items[block])["columns"]


def _results(blocks: Blocks, todo: list[int], actors: dict[str, Any], num_workers: int) -> Iterator[BlockResult]:
    """Read (tasks) -> work and commit (actors), streamed by Ray Data; one row is one block."""
    source, columns, items = blocks.source, blocks.columns, _StoredItems(blocks, todo)

    def read(row: BlockRow) -> BlockRow:
        assert source is not None
        return {"block": row["block"], "rows": read_block(source, cast(SourceItem, items[int(row["block"])]), columns)}

    dataset: ray.data.Dataset = ray.data.from_items([{"block": block} for block in todo], override_num_blocks=len(todo))
    if source is None:
        kwargs = actors["fn_constructor_kwargs"]
        name = f"items-{uuid.uuid4().hex}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # It lives as long as this handle.
        items.holder = _ItemHolder.options(name=name, scheduling_strategy=here).remote(items)  # type: ignore[attr-defined]
        actors = {**actors, "fn_constructor_kwargs": {**kwargs, "items": name}}
    else:
        # Fractions of a CPU: reading must not take the CPU that the actors wait for (a deadlock on 2 CPUs). Bounded, as
        # each fraction would start a process of its own, which on two cores held up the actors for half a minute.
        # One for every two CPUs where they are many: a file in S3 takes a while, and a GPU many of them. Ray warns of
        # more of them than there are blocks.
        most = max(READERS_PER_WORKER * num_workers, int(ray.cluster_resources().get("CPU", 0)) // 2)
        readers = ray.data.TaskPoolStrategy(size=min(most, len(todo)))
        dataset = dataset.map(read, num_cpus=0.25, compute=readers)  # type: ignore[arg-type]
    yield from cast(Iterable[BlockResult], dataset.map(**actors).iter_rows())


def read_parts(out: Storage, columns: list[str] | None = None) -> pa.Table:
    """All committed rows, in the order of the plan."""
    return pa.concat_tables(read_tables(out / PARTS, columns))
