#!/usr/bin/env python
"""Write a dataset of captioned images as Parquet, each image once, for every later job.

    python jobs/prepare.py                                                    the built-in Shapes, into ./out
    python jobs/prepare.py --dataset flickr8k --source DIR_OR_ZIP --storage URI
    python jobs/prepare.py --dataset mine --source 'shards/train-{000000..000009}.tar' --storage URI
    python jobs/prepare.py --dataset flickr8k --source jxie/flickr8k --storage s3://bucket/prefix

A source is checked in full, every image decoded, before anything is written. The files land under
STORAGE/data/DATASET/ with `_SUCCESS` last; without it nothing there counts as a dataset, and the same
command starts over. Hardware: any; Flickr8k takes well under a minute on 2 cores.
"""

import dataclasses
import functools
import io
import json
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import tyro

from jobs.runtime.blocks import ROWS_PER_BLOCK
from jobs.runtime.cluster import connect
from jobs.runtime.commandline import counted, one_line, run, say_next
from jobs.runtime.progress import Report, progress
from jobs.runtime.ray_private import cpus
from jobs.runtime.source import output_storage
from jobs.runtime.watchdog import Watchdog
from mmcore.data.huggingface import looks_like_hub_name
from mmcore.data.photos import SPLIT_COLUMNS, photo_row
from mmcore.data.prepared import TEST, TRAIN, VALIDATION, DatasetSummary
from mmcore.data.shapes import MAX_OBJECTS, SPLITS, ShapesSettings
from mmcore.data.shapes_rows import shapes_row
from mmcore.data.sources import read_source
from mmcore.data.splits import UNUSED
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.storage import Storage, writing
from mmcore.temporary import temporary_folder

SHAPES = "shapes"
SUCCESS = "_SUCCESS"
SKIPPED_FILE = "skipped.txt"
# Of what was left out, so many lines are printed; the file has all.
NUM_PRINTED = 20
ROWS_PER_FILE = 1000
# A file is made in memory by one task, and one Arrow column of bytes ends at 2 GiB.
MAX_BYTES_PER_FILE = 256 * 2**20
POLL_INTERVAL_S = 0.5
DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_COMMON_FIELDS = [
    pa.field("image_id", pa.string()),
    pa.field("file_name", pa.string()),
    pa.field("image", pa.binary()),
    pa.field("captions", pa.list_(pa.string())),
]


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Which dataset to write, from what, and where to."""

    dataset: str = SHAPES
    """`shapes` is generated; `flickr8k`, or any name of yours, is read from --source."""
    source: str | None = None
    """Folder or zip with images and their captions: captions.txt (or .csv, .jsonl ...), results.csv, Karpathy's or
    COCO's JSON, metadata.jsonl, tar shards, Parquet; or one such file; or a Hugging Face dataset (jxie/flickr8k)."""
    storage: str = "out"
    """Folder or s3://bucket/prefix; the files land in STORAGE/data/DATASET/."""
    skip_bad: bool = False
    """Go on without the rows and images that are bad, and list them. Without it the first one is an error."""
    fresh: bool = False
    """Make the dataset anew even if it is finished. The old one stays until the new one is complete."""
    stall_timeout_s: Annotated[float | None, tyro.conf.arg(name="stall-timeout")] = None
    """Seconds without progress after which the job ends; by default it waits (an autoscaler may take minutes)."""
    shapes: Annotated[ShapesSettings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ShapesSettings)

    def check(self) -> None:
        """Raise InputError where the fields do not go together."""
        if not DATASET_NAME.fullmatch(self.dataset):
            raise InputError(
                f"--dataset {self.dataset!r}: use lower-case letters, digits, - and _; "
                "the name of a Hugging Face dataset goes into --source"
            )
        if self.dataset == SHAPES:
            if self.source or self.skip_bad:
                flag = f"--source {self.source}" if self.source else "--skip-bad"
                raise InputError(
                    f"{flag}: give the data a name too, such as --dataset mine; without one it is {SHAPES}, which is "
                    "generated"
                )
        else:
            if not self.source:
                raise InputError(f"--dataset {self.dataset} needs --source: a folder, zip or Hugging Face name")
            changed = [
                f"--{field.name.replace('_', '-')}"
                for field in dataclasses.fields(ShapesSettings)
                if getattr(self.shapes, field.name) != field.default
            ]
            if changed:
                raise InputError(f"{' and '.join(changed)}: only for --dataset shapes, not {self.dataset}")

    def identity(self) -> dict[str, Any]:
        """What the content of the dataset depends on; kept in _SUCCESS and compared by the next run."""
        if self.dataset == SHAPES:
            said = dataclasses.asdict(self.shapes)
            # As data says it that is older than this setting.
            return {name: value for name, value in said.items() if (name, value) != ("max_objects", MAX_OBJECTS)}
        assert self.source is not None
        path = Path(self.source).expanduser()
        is_name = "://" in self.source or (looks_like_hub_name(self.source) and not path.exists())
        return {"source": self.source if is_name else os.path.abspath(path), "skip_bad": self.skip_bad}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The rows to write: `parts` holds, for each file, what `make_row` turns into its rows."""

    parts: list[list[Any]]
    make_row: Callable[[Any], dict[str, Any]]
    split_columns: tuple[str, ...]
    image_ids: list[str] | None
    """In order, where they are known before the rows are made."""
    reads_local_files: bool
    skipped: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.parts))

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([*_COMMON_FIELDS, *(pa.field(name, pa.string()) for name in self.split_columns)])


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Make the dataset unless it is there already; return what its _SUCCESS holds.

    Keys: dataset, num_images, num_captions, splits ({column: {value: count}}), settings, skipped, files,
    fingerprint (sha256 over image_id, captions and image bytes of all rows in order). Raises InputError.
    """
    settings.check()
    target = output_storage(settings.storage, "--storage") / "data" / settings.dataset
    finished = json.loads(target.read(SUCCESS)) if target.exists(SUCCESS) else None
    if finished is not None and not settings.fresh:
        if finished["settings"] != settings.identity():
            raise InputError(
                f"{target}: was made with {_listed(finished['settings'])}, not with "
                f"{_listed(settings.identity())}; use another --storage, or --fresh to replace it"
            )
        print(f"{target} is finished and was made with the same settings: kept (--fresh makes it anew)")
        _print_summary(finished, settings)
        return finished
    with temporary_folder("prepare") as scratch, writing(scratch):
        plan = _plan_shapes(settings) if settings.dataset == SHAPES else _plan_photos(settings, scratch)
        connect()
        summary = _write(settings, plan, target)
    _print_summary(summary, settings)
    return summary


def _plan_shapes(settings: PrepareSettings) -> _Plan:
    rows = [(split, index) for split in SPLITS for index in range(settings.shapes.num_images(split))]
    if not rows:
        raise InputError("--num-train, --num-validation and --num-test are all 0: nothing to write")
    make_row = functools.partial(_make_shapes_row, settings.shapes)
    return _Plan(_cut(rows, [0] * len(rows)), make_row, ("split",), None, reads_local_files=False)


def _make_shapes_row(settings: ShapesSettings, row: tuple[str, int]) -> dict[str, Any]:
    return shapes_row(settings, *row)


def _plan_photos(settings: PrepareSettings, scratch: Path) -> _Plan:
    assert settings.source is not None
    with progress("reading", "images") as report:
        source = read_source(settings.source, scratch, skip_bad=settings.skip_bad, progress=report)
    for line in source.skipped[:NUM_PRINTED]:
        print(f"skipped: {line}")
    if source.skipped:
        print(
            f"skipped {len(source.skipped):,} in all, listed in {settings.storage.rstrip('/')}/data/{settings.dataset}/"
            f"{SKIPPED_FILE}; the report's splits count the images that are left"
        )
    num_captions = counted(sum(len(photo.captions) for photo in source.photos), "caption")
    num_images = counted(len(source.photos), "image")
    print(f"found: {source.form}, {num_images}, {num_captions}, every image decodes")
    print(f"read: {source.detail}")
    for note in source.notes:
        print(note)
    return _Plan(
        _cut(source.photos, [photo.num_bytes for photo in source.photos]),
        photo_row,
        SPLIT_COLUMNS,
        [photo.image_id for photo in source.photos],
        reads_local_files=True,
        skipped=source.skipped,
    )


def _cut(rows: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Rows, whose images take `sizes` bytes, in consecutive parts of about ROWS_PER_FILE, one a file."""
    num_rows = math.ceil(len(rows) / max(1, round(len(rows) / ROWS_PER_FILE)))
    parts: list[list[Any]] = []
    num_bytes = 0
    for row, size in zip(rows, sizes, strict=True):
        if not parts or len(parts[-1]) == num_rows or num_bytes + size > MAX_BYTES_PER_FILE:
            parts.append([])
            num_bytes = 0
        parts[-1].append(row)
        num_bytes += size
    return parts


def _write(settings: PrepareSettings, plan: _Plan, target: Storage) -> dict[str, Any]:
    """Write to a hidden folder beside `target`, look at what landed there, and move it to `target`."""
    unfinished = target.parent / f".{target.name}.unfinished"
    unfinished.delete_tree()
    # A folder for each attempt: a task of a killed run that still writes for a moment writes elsewhere.
    attempt = unfinished / uuid.uuid4().hex
    try:
        with Watchdog(f"prepare {settings.dataset}", settings.stall_timeout_s) as watchdog:
            with progress("writing", "images") as report, _following(attempt, plan, report, watchdog):
                _run_ray_data(plan, attempt)
            with progress("verifying", "images") as report:
                summary = _inspect(plan, attempt, report, watchdog)
        summary = {
            "dataset": settings.dataset,
            **summary,
            "settings": settings.identity(),
            "skipped": list(plan.skipped),
            "files": [f"part-{index:05d}.parquet" for index in range(len(plan.parts))],
        }
        target.delete(SUCCESS)
        for name in [*target.list(".parquet"), *target.list(SKIPPED_FILE)]:
            target.delete(name)
        filesystem, source_path = attempt.arrow()
        target_path = target.arrow()[1]
        if not target.is_s3:
            Path(target_path).mkdir(parents=True, exist_ok=True)
        for old, new in zip(attempt.list(".parquet"), summary["files"], strict=True):
            filesystem.move(f"{source_path}/{old}", f"{target_path}/{new}")
        if plan.skipped:
            target.write(SKIPPED_FILE, "".join(f"{line}\n" for line in plan.skipped).encode())
        target.write(SUCCESS, json.dumps(summary, indent=1, ensure_ascii=False).encode())
    finally:
        unfinished.delete_tree()
    return summary


def _run_ray_data(plan: _Plan, attempt: Storage) -> None:
    """One task a part makes its rows and writes its file; the file names sort in the order of the parts."""
    remote_args: dict[str, Any] = {}
    if plan.reads_local_files or not attempt.is_s3:
        node_id = ray.get_runtime_context().get_node_id()
        num_cpus = next(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == node_id)
        # The source lies on the driver's machine, and a local storage is its disk. A head that lends no CPU works too.
        remote_args = {"label_selector": {"ray.io/node-id": node_id}, "num_cpus": 1}
        if num_cpus < 1:
            remote_args |= {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=cpus())}
    part_refs = [ray.put(part) for part in plan.parts]
    dataset = ray.data.from_items(
        [{"part": index} for index in range(len(plan.parts))], override_num_blocks=len(plan.parts)
    )
    dataset.context.enable_progress_bars = False  # ours counts images
    write_part = functools.partial(_write_part, part_refs, plan.make_row, plan.schema, attempt)
    for row in dataset.map(write_part, **remote_args).iter_rows():
        if row["error"]:
            raise InputError(row["error"])


def _write_part(
    part_refs: list[ray.ObjectRef],
    make_row: Callable[[Any], dict[str, Any]],
    schema: pa.Schema,
    attempt: Storage,
    row: dict[str, Any],
) -> dict[str, Any]:
    """Make the rows of a part and write its file. What the user can mend is returned: Ray shows what is raised in
    several tracebacks, and hands on its text alone."""
    try:
        table = pa.Table.from_pylist([make_row(each) for each in ray.get(part_refs[row["part"]])], schema=schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=ROWS_PER_BLOCK)  # bulk jobs read a block at a time
        attempt.write(f"part-{row['part']:06d}.parquet", buffer.getvalue())
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        return {"error": line}
    return {"error": ""}


def _inspect(plan: _Plan, attempt: Storage, report: Report, watchdog: Watchdog) -> dict[str, Any]:
    """Read back what landed: every row once, in order. Returns its counts and fingerprint."""
    names = attempt.list(".parquet")
    if len(names) != len(plan.parts):
        raise InputError(
            f"{attempt}: {len(names)} of {len(plan.parts)} files are there; a local --storage needs a folder "
            "that every machine of the cluster shares, otherwise use s3://bucket/prefix"
        )
    filesystem, path = attempt.arrow()
    image_ids: list[str] = []
    counted_rows = DatasetSummary(plan.split_columns)
    for name, part in zip(names, plan.parts, strict=True):
        num_expected = len(image_ids) + len(part)
        with filesystem.open_input_file(f"{path}/{name}") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    image_ids.append(row["image_id"])
                    counted_rows.add(row)
                report(len(image_ids), plan.num_rows)
                watchdog.beat()
        assert len(image_ids) == num_expected, f"{name}: {len(image_ids)} rows up to here, not {num_expected}"
    assert len(set(image_ids)) == plan.num_rows, "an image landed twice"
    assert plan.image_ids is None or image_ids == plan.image_ids, "the rows landed out of order"
    return counted_rows.facts()


@contextmanager
def _following(attempt: Storage, plan: _Plan, report: Report, watchdog: Watchdog) -> Iterator[None]:
    """Count the files that have appeared, from a thread, while Ray Data holds the main one."""
    stop = threading.Event()
    sizes = [len(part) for part in plan.parts]

    def follow() -> None:
        num_files = 0
        while not stop.wait(POLL_INTERVAL_S):
            found = len(attempt.list(".parquet"))
            if found > num_files:
                num_files = found
                report(sum(sizes[:num_files]), plan.num_rows)
                watchdog.beat()

    thread = threading.Thread(target=follow, name="follow-files", daemon=True)
    thread.start()
    try:
        yield
        report(plan.num_rows, plan.num_rows)
    finally:
        stop.set()
        thread.join()


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _print_summary(summary: dict[str, Any], settings: PrepareSettings) -> None:
    target = f"{settings.storage.rstrip('/')}/data/{settings.dataset}"
    print(
        f"{summary['dataset']}: {counted(summary['num_images'], 'image')}, "
        f"{counted(summary['num_captions'], 'caption')} in {counted(len(summary['files']), 'file')} under {target}"
    )
    for column, counts in summary["splits"].items():
        # A note says why a source has no split of its own.
        if set(counts) != {UNUSED}:
            print(f"  {column:<24}" + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if settings.dataset == SHAPES:
        return
    if (own := own_split(settings.dataset, summary["splits"])) is not None:
        print(f"trainings use the data's own split by --split {own}: {_in_words(summary['splits'][own])}")
        return
    for who, column in zip(("captioners", "generators"), SPLIT_COLUMNS, strict=False):
        print(f"{who} use {column}: {_in_words(summary['splits'][column])}")


def own_split(dataset: str, splits: Mapping[str, Mapping[str, int]]) -> str | None:
    """Column of a source's own split, where it has images that train and others. Flickr8k is trained by the report's.

    `splits`: column to counts of its values.
    """
    column = SPLIT_COLUMNS[-1]
    has_both = TRAIN in splits[column] and not {VALIDATION, TEST}.isdisjoint(splits[column])
    return column if has_both and dataset != "flickr8k" else None


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def main() -> None:
    settings = read_settings(PrepareSettings, __doc__, "python jobs/prepare.py")
    summary = prepare(settings)
    # Imported here, as it takes seconds: it knows the models.
    from jobs.runtime.next_command import after_preparing

    # Here alone: a training that makes the Shapes data for itself is followed by no other.
    say_next(after_preparing(settings.dataset, settings.storage, summary["splits"]))


if __name__ == "__main__":
    run(main)
