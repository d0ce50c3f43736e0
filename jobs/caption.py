#!/usr/bin/env python
"""Caption any number of images with a trained captioner: resumable, each image exactly once.

    python jobs/caption.py --run URI --images URI_OR_DIR_OR_SHARDS --out URI

Writes OUT/parts/*.parquet as it goes and, last, OUT/captions.csv (image,caption). Run it again to go on. An image that
was removed meanwhile is left out, as broken ones are with --skip-bad; OUT/skipped.csv (image,reason) lists them.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

import pyarrow as pa
import torch

from jobs.runtime.blocks import ROWS_PER_BLOCK, Columns
from jobs.runtime.commandline import counted, say_next
from jobs.runtime.commandline import run as run_job
from jobs.runtime.csv_file import csv_bytes
from jobs.runtime.image_blocks import ImageRows, image_files, plan_blocks
from jobs.runtime.model_flags import parse_with_options
from jobs.runtime.next_command import after_captioning
from jobs.runtime.source import output_storage
from jobs.runtime.sweep import PARTS, WrittenPlan, read_plan, run_sweep
from mmcore.captioners.search_options import SearchOptions
from mmcore.data.parquet import read_tables
from mmcore.errors import InputError
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.images import decode_image
from mmcore.recipe import Captioner, capped_fields
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner

CAPTIONS_FILE, SKIPPED_FILE = "captions.csv", "skipped.csv"
# In the metadata of a block's file, so that its images and what was left out of it are committed at once.
_SKIPPED = b"skipped"
_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "file_name", "caption")])
# Skipped images that are printed; the file lists all.
_NUM_PRINTED = 20


@dataclass(frozen=True)
class CaptionSettings:
    """What to caption, with what, and where to."""

    run: str
    """The finished run of a captioner: STORAGE/runs/RECIPE/NAME."""
    images: str
    """Folder or s3://bucket/prefix: a prepared dataset (STORAGE/data/NAME), other Parquet files with image_id and
    image, or image files."""
    out: str
    """Folder or s3://bucket/prefix for the captions."""
    split: str | None = None
    """COLUMN:NAME captions one split of a prepared dataset, such as split_karpathy:test."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    language_model: str | None = None
    """Folder or name of the frozen language model, if it is not where the run had it."""
    prompt: str | None = None
    """Text that a captioner with a language model reads before each image; by default the run's own."""
    rows_per_block: int = ROWS_PER_BLOCK
    """Images that are captioned and committed together."""
    skip_bad: bool = False
    """Go on without images that are broken or null, or have no image_id, and list them. Without it the first one is an
    error."""
    dry_run: bool = False
    """Say what would be read and written, and stop."""
    stall_timeout: float | None = None
    """Seconds without progress after which the job ends; by default it waits."""


class CaptionSummary(TypedDict):
    """Counts and seconds of `caption`; a dry run has the first two counts alone."""

    num_rows: int
    num_blocks: int
    blocks_done_before: NotRequired[int]
    rows_done_now: NotRequired[int]
    seconds: NotRequired[float]
    load_s: NotRequired[float]
    num_skipped: NotRequired[int]


class CaptionImages:
    """Holds the captioner on a worker."""

    def __init__(self, captioner: Captioner, options: Any, images: Storage, skip_bad: bool, prompt: str | None) -> None:
        self.captioner = captioner.load("cuda" if torch.cuda.is_available() else "cpu")
        self.options, self.images, self.skip_bad, self.prompt = options, images, skip_bad, prompt

    def __call__(self, rows: ImageRows) -> pa.Table:
        gone = set(rows["gone"])
        skipped = {row: "no longer there" for row, name in enumerate(rows["file_name"]) if name in gone}
        try:
            return self._table(rows, skipped)
        except InputError:
            bad = broken_images(rows, skipped)
            if not bad:
                raise
        if not self.skip_bad:
            row, reason = next(iter(bad.items()))
            raise InputError(
                f"{self.images}: {rows['file_name'][row]}: {reason}; mend it or take it away, or leave such images out "
                "with --skip-bad"
            )
        return self._table(rows, skipped | bad)

    def _table(self, rows: ImageRows, skipped: dict[int, str]) -> pa.Table:
        good = [row for row in range(len(rows["image"])) if row not in skipped]
        image_ids, names, images = (
            [cast(Columns, rows)[name][row] for row in good] for name in ("image_id", "file_name", "image")
        )
        captions = []
        if good:
            pixels = pixels_from_bytes(images, self.captioner.image_size, names)
            prompts = None if self.prompt is None else [self.prompt] * len(good)
            captions = self.captioner.caption(pixels, self.options, prompts)
        table = pa.table([image_ids, names, captions], schema=_SCHEMA)
        listed = [(rows["file_name"][row], skipped[row]) for row in sorted(skipped)]
        return table.replace_schema_metadata({_SKIPPED: json.dumps(listed)}) if listed else table


def broken_images(rows: ImageRows, skipped: dict[int, str]) -> dict[int, str]:
    """Which further rows of a block hold no image, and why."""
    bad = {}
    for row, (image, name) in enumerate(zip(rows["image"], rows["file_name"], strict=True)):
        try:
            if row not in skipped:
                decode_image(image, name=name)
        except InputError as error:
            bad[row] = str(error).removeprefix(f"{name}: ")
    return bad


def caption(settings: CaptionSettings, options: Any = None) -> CaptionSummary:
    """Caption what is not captioned yet, then write captions.csv. Returns counts and seconds.

    `options`: of the search, by default the captioner's own.
    """
    if settings.rows_per_block < 1:
        raise InputError(f"--rows-per-block {settings.rows_per_block}: must be at least 1")
    images, out = Storage(settings.images), output_storage(settings.out, "--out")
    captioner = open_captioner(settings.run, encoder=settings.encoder, language_model=settings.language_model)
    options = captioner.options if options is None else options
    captioner.check(options)
    if settings.prompt is not None and not captioner.takes_prompt:
        raise InputError(f"--prompt: {settings.run} reads images alone; leave it out, or name a run that takes one")
    words = capped_fields(options).get("words")
    if words is not None and (wanted := getattr(options, words)) > captioner.max_length:
        flag = "--" + words.replace("_", "-")
        print(f"caption: {flag} {wanted}: captions end at the run's own {captioner.max_length}", flush=True)
    there: WrittenPlan = read_plan(out) or {}
    of_these: WrittenPlan = there if there.get("settings", {}).get("images") == images.uri else {}
    blocks = plan_blocks(
        images,
        settings.split,
        settings.rows_per_block,
        began_with=of_these.get("files"),
        began_sha256=of_these.get("ids_sha256"),
        skip_bad=settings.skip_bad,
    )
    num_images, num_blocks = counted(blocks.num_rows, "image"), counted(len(blocks.items), "block")
    print(f"caption: {num_images} of {images} in {num_blocks} -> {out}", flush=True)
    if settings.dry_run:
        return {"num_rows": blocks.num_rows, "num_blocks": len(blocks.items)}
    done = run_sweep(
        what="caption",
        out=out,
        settings={
            **captioner.identity(),
            "images": images.uri,
            "split": settings.split,
            **dataclasses.asdict(options),
            "rows_per_block": settings.rows_per_block,
            # Sweeps of earlier versions have no such field.
            **({} if settings.prompt is None else {"prompt": settings.prompt}),
        },
        blocks=blocks,
        worker_type=CaptionImages,
        worker_kwargs={
            "captioner": captioner,
            "options": options,
            "images": images,
            "skip_bad": settings.skip_bad,
            "prompt": settings.prompt,
        },
        # By them a sweep is planned again as it was, whichever of them are gone.
        plan_facts={"files": image_files(blocks)},
        stall_timeout_s=settings.stall_timeout,
    )
    tables = read_tables(out / PARTS, ["file_name", "caption"])
    table = pa.concat_tables(tables)
    skipped = [(place, "no image_id") for place in blocks.left_out]
    skipped += [row for each in tables for row in json.loads((each.schema.metadata or {}).get(_SKIPPED, b"[]"))]
    if skipped:
        for name, reason in skipped[:_NUM_PRINTED]:
            print(f"skipped: {name}: {reason}")
        out.write(SKIPPED_FILE, csv_bytes(("image", "reason"), skipped))
        of_all = counted(blocks.num_rows + len(blocks.left_out), "image")
        print(f"caption: {len(skipped):,} of {of_all} skipped, all in {out}/{SKIPPED_FILE}")
    captions = zip(table["file_name"].to_pylist(), table["caption"].to_pylist(), strict=True)
    out.write(CAPTIONS_FILE, csv_bytes(("image", "caption"), captions))
    print(f"caption: {counted(len(table), 'caption')} in {out}/{CAPTIONS_FILE}", flush=True)
    return {**done, "num_skipped": len(skipped)}


def main() -> None:
    command = "python jobs/caption.py"
    families = {"the search for captions": SearchOptions()}
    settings, options = parse_with_options(CaptionSettings, open_captioner, families, __doc__ or "", command)
    done = caption(settings, options)
    if not settings.dry_run:
        say_next(after_captioning(settings.run, settings.images, settings.split, settings.out, done["num_skipped"]))


if __name__ == "__main__":
    run_job(main)
