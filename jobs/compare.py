#!/usr/bin/env python
"""Compare what models cost: operations, seconds and machines for the same images.

    python jobs/compare.py --estimate a6000 --images 1000
    python jobs/compare.py --estimate h100,8 --images 10000000 --sources sdxl,steps=30,batch=8 infinity-2b,batch=8

A source is MODEL,key=value,... with MODEL sdxl, infinity-2b or infinity-8b. The keys are steps, guided (steps or grids
with guidance), batch, size (WIDTHxHEIGHT), dtype and seconds. Seconds are a claim or a measurement: the share of the
device's peak that it needs is printed. Without --sources the report's settings stand beside better ones.

An estimate needs no device. The operations are counted on the true architectures, which do not depend on the weights.
"""

import sys
from dataclasses import dataclass

from jobs.runtime.commandline import run
from jobs.runtime.compare_source import parse_source
from jobs.runtime.csv_file import csv_bytes
from jobs.runtime.estimate import (
    DEFAULT,
    REPORT,
    REPORT_DEVICE,
    Line,
    are_comparable,
    check_claim,
    compare_claims,
    estimate_line,
)
from jobs.runtime.source import output_storage
from mmcore.devices import Device, device_of
from mmcore.errors import InputError
from mmcore.flags import read_settings

TABLE = "compare.csv"
_HEADER = (
    "source",
    "TFLOP/image",
    "limit",
    "bound s/image",
    "s/image",
    "images/s",
    "hours",
)


@dataclass(frozen=True)
class CompareSettings:
    """What to compare, and on what."""

    estimate: str
    """DEVICE or DEVICE,COUNT: a6000, a100, h100, h200, ..., and how many of them."""
    sources: tuple[str, ...] = ()
    """Sources to compare; by default SDXL and Infinity-2B with the report's settings and with better ones."""
    images: int = 1000
    """Images to make, for the hours."""
    mfu: float = 0.4
    """Share of the device's peak that is reached. Published measurements of SDXL on an A100 are from 0.37 to 0.53."""
    out: str | None = None
    """Folder or s3://bucket/prefix that the table is written to, as compare.csv."""


def compare(settings: CompareSettings) -> list[Line]:
    """Print the table, and write it where asked. Raises InputError for a wrong source, device or number."""
    device, count = _device(settings.estimate)
    if settings.images < 1:
        raise InputError(f"--images {settings.images}: must be at least 1")
    if not 0 < settings.mfu <= 1:
        raise InputError(f"--mfu {settings.mfu:g}: must be above 0 and at most 1")
    sources = [parse_source(text) for text in settings.sources] or list(DEFAULT)
    lines = [estimate_line(source, device, settings.mfu) for source in sources]
    rows = [_row(line, settings.images, count) for line in lines]
    if settings.out is not None:
        output_storage(settings.out, "--out").write(TABLE, csv_bytes(_HEADER, rows))
    print(f"{count} x {device.name}, peak {device.peak_tflops:g} TFLOP/s, {device.bandwidth:g} GB/s ({device.source})")
    print(f"predicted at {settings.mfu:.0%} of the peak; hours for {settings.images:,} images")
    _print_table(rows)
    claims = [source for source in sources if source.seconds is not None]
    if not settings.sources and device == device_of(REPORT_DEVICE):
        claims = list(REPORT)
    for claim in claims:
        print(check_claim(claim, device))
    if len(claims) == 2 and are_comparable(*claims):
        print(compare_claims(*claims))
    if settings.out is not None:
        print(f"written: {settings.out}/{TABLE}")
    return lines


def _device(text: str) -> tuple[Device, int]:
    name, _, count = text.partition(",")
    if count and (not count.isdigit() or int(count) < 1):
        raise InputError(f"--estimate {text}: write DEVICE,COUNT, such as h100,8")
    return device_of(name), int(count or 1)


def _row(line: Line, images: int, count: int) -> tuple[str, ...]:
    time = line.time
    return (
        str(line.source),
        f"{line.cost.total_flops / 1e12:.1f}",
        time.limit,
        f"{time.bound_s:.3f}",
        f"{time.predicted_s:.3f}",
        f"{count / time.predicted_s:.2f}",
        f"{images * time.predicted_s / count / 3600:.2f}",
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [_HEADER, *rows]) for column in range(len(_HEADER))]
    for row in [_HEADER, *rows]:
        first, *others = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    sys.stdout.flush()


def main() -> None:
    compare(read_settings(CompareSettings, __doc__, "python jobs/compare.py"))


if __name__ == "__main__":
    run(main)
