#!/usr/bin/env python
"""Caption any number of images with a trained captioner: resumable, each image exactly once.

    python jobs/caption.py --run URI --images URI_OR_DIR_OR_SHARDS --out URI

Writes OUT/parts/*.parquet as it goes and, last, OUT/captions.csv (image,caption). Run it again to go on.
"""

import csv
import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from jobs.runtime.blocks import ROWS_PER_BLOCK
from jobs.runtime.commandline import run as run_job
from jobs.runtime.image_blocks import plan_blocks
from jobs.runtime.model_flags import parse_with_options
from jobs.runtime.source import output_storage
from jobs.runtime.sweep import read_parts, run_sweep
from mmcore.captioners.search_options import SearchOptions
from mmcore.errors import InputError
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.recipe import Captioner
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner

CAPTIONS_FILE = "captions.csv"


@dataclass(frozen=True)
class CaptionSettings:
    """What to caption, with what, and where to."""

    run: str
    """The finished run of a captioner: STORAGE/runs/RECIPE/NAME."""
    images: str
    """Folder or s3://bucket/prefix with Parquet shards (image_id, image) or with image files."""
    out: str
    """Folder or s3://bucket/prefix for the captions."""
    split: str | None = None
    """COLUMN:NAME captions one split of a prepared dataset, such as split_karpathy:test."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    rows_per_block: int = ROWS_PER_BLOCK
    """Images that are captioned and committed together."""
    dry_run: bool = False
    """Say what would be read and written, and stop."""
    stall_timeout: float | None = None
    """Seconds without progress after which the job ends; by default it waits."""


class CaptionImages:
    """Holds the captioner on a worker."""

    def __init__(self, captioner: Captioner, options: Any) -> None:
        self.captioner = captioner.load("cuda" if torch.cuda.is_available() else "cpu")
        self.options = options

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        pixels = pixels_from_bytes(rows["image"], self.captioner.image_size, rows["file_name"])
        captions = self.captioner.caption(pixels, self.options)
        return pa.table({"image_id": rows["image_id"], "file_name": rows["file_name"], "caption": captions})


def caption(settings: CaptionSettings, options: Any = None) -> dict[str, Any]:
    """Caption what is not captioned yet, then write captions.csv. Returns counts and seconds.

    `options`: of the search, by default the captioner's own.
    """
    if settings.rows_per_block < 1:
        raise InputError(f"--rows-per-block {settings.rows_per_block}: must be at least 1")
    images, out = Storage(settings.images), output_storage(settings.out, "--out")
    captioner = open_captioner(settings.run, encoder=settings.encoder)
    options = captioner.options if options is None else options
    captioner.check(options)
    if options.max_length > captioner.max_length:
        print(
            f"caption: --max-length {options.max_length}: captions end at the run's own {captioner.max_length}",
            flush=True,
        )
    blocks = plan_blocks(images, settings.split, settings.rows_per_block)
    print(f"caption: {blocks.num_rows} images of {images} in {len(blocks.items)} blocks -> {out}", flush=True)
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
        },
        blocks=blocks,
        worker_type=CaptionImages,
        worker_kwargs={"captioner": captioner, "options": options},
        stall_timeout_s=settings.stall_timeout,
    )
    table = read_parts(out, ["file_name", "caption"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption"])
    writer.writerows(zip(table["file_name"].to_pylist(), table["caption"].to_pylist(), strict=True))
    out.write(CAPTIONS_FILE, text.getvalue().encode())
    print(f"caption: {len(table)} captions in {out}/{CAPTIONS_FILE}", flush=True)
    return done


def main() -> None:
    command = "python jobs/caption.py"
    caption(*parse_with_options(CaptionSettings, open_captioner, SearchOptions(), __doc__ or "", command))


if __name__ == "__main__":
    run_job(main)
