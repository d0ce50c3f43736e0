#!/usr/bin/env python
"""Hand a trained generator or VQ-VAE on in the form of another library.

    python jobs/export.py --run STORAGE/runs/ldm/NAME --to diffusers --out DIR
    python jobs/export.py --run STORAGE/runs/vqvae/NAME --to diffusers --out DIR
    python jobs/export.py --run STORAGE/runs/autoregressive/NAME/model/vqvae --to diffusers --out DIR

A latent-diffusion run becomes a folder that ``diffusers.DiffusionPipeline.from_pretrained(DIR)`` loads, without code
of ours: an LDMTextToImagePipeline. A VQ-VAE becomes one that ``diffusers.VQModel.from_pretrained(DIR)`` loads.

Before the folder gets its name, it is loaded again and compared. A pipeline samples one prompt in 4 DDIM steps. The
latents from the same noise are compared, and the images decoded from the same latents. A VQ-VAE is compared on the
images decoded from the same codes, and on their latents. Images of different latents can differ further, as near the
border of two codes a rounding error decides the code.

An autoregressive Transformer over codes is refused, as diffusers has no class for it. Its VQDiffusionPipeline
(deprecated) diffuses codes, and its AmusedPipeline unmasks them. The weights are safetensors already:
RUN/model/model.safetensors. The Transformer's VQ-VAE is a run by itself. It can be exported if it has convolutions
(--encoder convolutions --patch-size 1) and at most one attention head. The variant shapes-codes has patches.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.runtime.commandline import run as run_job
from jobs.runtime.source import output_storage
from mmcore.catalogue import names
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen.pretrained import quiet_load
from mmcore.run_files import read_fields
from mmcore.storage import Storage, writing
from mmcore.trained.autoencoder import open_autoencoder
from mmcore.trained.generator import open_generator
from mmcore.trained.to_diffusers import CHECK_STEPS, TOLERANCE, difference, to_pipeline, vqvae_difference


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and where to."""

    run: str
    """The finished run of a latent diffusion or of a VQ-VAE: STORAGE/runs/RECIPE/NAME."""
    out: str
    """New local folder."""
    to: Literal["diffusers"] = "diffusers"
    """The library that is to load it."""
    text_encoder: str | None = None
    """Folder or name of the frozen text encoder, if it is not where the run had it."""


@dataclass(frozen=True)
class _Exported:
    """A model of diffusers, how far it is from ours once it is loaded again, and what that was compared on."""

    model: Any
    load: Callable[[str], Any]
    loader: str
    difference: Callable[[Any], float]
    compared_on: str


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _exported(settings: ExportSettings) -> _Exported:
    from diffusers import DiffusionPipeline, VQModel

    if read_fields(Storage(settings.run))[0]["recipe"] in names("autoencoder"):
        if settings.text_encoder is not None:
            raise InputError(f"--text-encoder {settings.text_encoder!r}: a VQ-VAE reads no text; leave the flag out")
        vqvae = open_autoencoder(settings.run).load()
        return _Exported(
            vqvae.model.to_diffusers(),
            lambda folder: VQModel.from_pretrained(folder, trust_remote_code=False).eval(),
            "VQModel",
            lambda model: vqvae_difference(vqvae, model),
            "codes drawn at random: their image, and its latents,",
        )
    generator = open_generator(settings.run, text_encoder=settings.text_encoder).load()
    return _Exported(
        to_pipeline(generator),
        lambda folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=False),
        "DiffusionPipeline",
        lambda pipeline: difference(generator, pipeline),
        f"one prompt and {CHECK_STEPS} steps: latents from the same noise, and images of the same latents,",
    )


def export(settings: ExportSettings) -> float:
    """Write the folder; returns the largest difference. Raises InputError where it is there already."""
    import diffusers

    if "://" in settings.out:
        raise InputError(f"--out {settings.out}: diffusers reads folders; name one on this machine")
    out = Path(output_storage(settings.out, "--out").uri)
    if out.exists():
        raise InputError(f"--out {out}: is there already; name a new folder")
    diffusers.utils.logging.disable_progress_bar()
    exported = _exported(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        with quiet_load():
            with writing(out):
                exported.model.save_pretrained(folder)
            found = exported.difference(exported.load(folder))
        if not found <= TOLERANCE:
            raise RuntimeError(
                f"latents or images of the exported model differ by {found:.2g} of 1, more than {TOLERANCE:g}"
            )
        # A temporary folder is its owner's alone; this one is handed on.
        Path(folder).chmod(0o777 & ~_umask())
        Path(folder).rename(out)
        # The context manager removes a folder of that name at its end.
        Path(folder).mkdir()
    print(
        f"export: {out}, loaded again and compared on {exported.compared_on} differ by {found:.1g} of 1 at most\n"
        f"load it with diffusers.{exported.loader}.from_pretrained({str(out)!r})",
        flush=True,
    )
    return found


def main() -> None:
    export(read_settings(ExportSettings, __doc__, "python jobs/export.py"))


if __name__ == "__main__":
    run_job(main)
