#!/usr/bin/env python
"""Caption any number of images with a trained captioner: resumable, each image exactly once.

    python jobs/caption.py --run URI --images URI_OR_DIR_OR_SHARDS --out URI

Writes OUT/parts/*.parquet as it goes and, last, OUT/captions.csv (image,caption). Run it again to go on.
"""

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import tyro

from jobs.runtime.blocks import ROWS_PER_BLOCK
from jobs.runtime.commandline import run as run_job
from jobs.runtime.image_blocks import plan_blocks
from jobs.runtime.source import output_storage
from jobs.runtime.sweep import read_parts, run_sweep
from mmcore.catalogue import CAPTIONERS
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.run_files import read_facts
from mmcore.storage import Storage
from mmcore.trained.captioner import TrainedCaptioner

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
    num_beams: int = 3
    """Beams of the search; 1 is greedy."""
    max_length: int = 30
    """Longest caption in words."""
    length_penalty: float = 1.0
    """Power of the length that a beam's log-probability is divided by: below 1 prefers shorter captions."""
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

    def __init__(self, run: Storage, encoder: str, search: dict[str, Any]) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.captioner = TrainedCaptioner(run, device=device, encoder=encoder)
        self.search = search

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        captions = self.captioner(rows["image"], rows["file_name"], **self.search)
        return pa.table({"image_id": rows["image_id"], "file_name": rows["file_name"], "caption": captions})


def caption(settings: CaptionSettings) -> dict[str, Any]:
    """Caption what is not captioned yet, then write captions.csv. Returns counts and seconds."""
    for name in ("num_beams", "max_length", "rows_per_block"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least 1")
    run, images, out = Storage(settings.run), Storage(settings.images), output_storage(settings.out, "--out")
    if not math.isfinite(settings.length_penalty):
        raise InputError(f"--length-penalty {settings.length_penalty}: must be a finite number")
    if settings.length_penalty != 1 and settings.num_beams == 1:
        raise InputError("--length-penalty: greedy search has no use for it; give --num-beams 2 or more")
    facts = read_facts(run)
    if facts["recipe"] not in CAPTIONERS:
        raise InputError(f"--run {run}: recipe {facts['recipe']!r} is no captioner; known: {', '.join(CAPTIONERS)}")
    trained_length = facts["settings"]["max_length"]
    if settings.max_length > trained_length:
        print(
            f"caption: --max-length {settings.max_length}: captions end at the run's own {trained_length}", flush=True
        )
    encoder = absolute_folder(settings.encoder or facts["settings"]["encoder"])
    blocks = plan_blocks(images, settings.split, settings.rows_per_block)
    print(f"caption: {blocks.num_rows} images of {images} in {len(blocks.items)} blocks -> {out}", flush=True)
    if settings.dry_run:
        return {"num_rows": blocks.num_rows, "num_blocks": len(blocks.items)}
    search = {name: getattr(settings, name) for name in ("num_beams", "max_length", "length_penalty")}
    done = run_sweep(
        what="caption",
        out=out,
        settings={
            "run": run.uri,
            # A run that was trained anew under the same name is another one.
            "weights_sha256": facts["weights_sha256"],
            "images": images.uri,
            "split": settings.split,
            **search,
            "rows_per_block": settings.rows_per_block,
        },
        blocks=blocks,
        worker_type=CaptionImages,
        worker_kwargs={"run": run, "encoder": encoder, "search": search},
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
    caption(tyro.cli(CaptionSettings, description=__doc__, prog="python jobs/caption.py"))


if __name__ == "__main__":
    run_job(main)
