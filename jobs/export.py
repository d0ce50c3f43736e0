#!/usr/bin/env python
"""Hand a trained generator on in the form of another library.

    python jobs/export.py --run STORAGE/runs/ldm/NAME --to diffusers --out DIR

A latent-diffusion run becomes a folder that ``diffusers.DiffusionPipeline.from_pretrained(DIR)`` loads, without code
of ours: an LDMTextToImagePipeline. Before the folder takes its name, it is loaded again and compared, on one prompt and
4 DDIM steps: the latents that both arrive at from the same noise, and the images that both decode from the same
latents. Images of either's own latents can differ further: where a latent lies on the border of two codes, the last bit
decides.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jobs.runtime.commandline import run as run_job
from jobs.runtime.source import output_storage
from mmcore.errors import InputError
from mmcore.storage import writing
from mmcore.trained.generator import open_generator
from mmcore.trained.to_diffusers import CHECK_STEPS, TOLERANCE, difference, to_pipeline


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and where to."""

    run: str
    """The finished run of a latent diffusion: STORAGE/runs/ldm/NAME."""
    out: str
    """New local folder."""
    to: Literal["diffusers"] = "diffusers"
    """The library that is to load it."""
    text_encoder: str | None = None
    """Folder or name of the frozen text encoder, if it is not where the run had it."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def export(settings: ExportSettings) -> float:
    """Write the folder; returns the `difference`. Raises InputError where it is there already."""
    from diffusers import DiffusionPipeline

    if "://" in settings.out:
        raise InputError(f"--out {settings.out}: diffusers reads folders; name one on this machine")
    out = Path(output_storage(settings.out, "--out").uri)
    if out.exists():
        raise InputError(f"--out {out}: is there already; name a new folder")
    generator = open_generator(settings.run, text_encoder=settings.text_encoder).load()
    pipeline = to_pipeline(generator)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        with writing(out):
            pipeline.save_pretrained(folder)
        found = difference(generator, DiffusionPipeline.from_pretrained(folder, trust_remote_code=False))
        if not found <= TOLERANCE:
            raise RuntimeError(
                f"latents or images of the exported pipeline differ by {found:.2g} of 1, more than {TOLERANCE:g}"
            )
        # A temporary folder is its owner's alone; this one is handed on.
        Path(folder).chmod(0o777 & ~_umask())
        Path(folder).rename(out)
        # The context manager removes a folder of that name at its end.
        Path(folder).mkdir()
    print(
        f"export: {out}, loaded again and compared on one prompt and {CHECK_STEPS} steps: latents from the same "
        f"noise, and images of the same latents, differ by {found:.1g} of 1 at most\n"
        f"load it with diffusers.DiffusionPipeline.from_pretrained({str(out)!r})",
        flush=True,
    )
    return found


def main() -> None:
    export(tyro.cli(ExportSettings, description=__doc__, prog="python jobs/export.py"))


if __name__ == "__main__":
    run_job(main)
