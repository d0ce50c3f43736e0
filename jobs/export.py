#!/usr/bin/env python
"""Hand a trained generator, VQ-VAE or Q-Former on in the form of another library.

    python jobs/export.py --run STORAGE/runs/ldm/NAME --to diffusers --out DIR
    python jobs/export.py --run STORAGE/runs/vqvae/NAME --to diffusers --out DIR
    python jobs/export.py --run STORAGE/runs/autoregressive/NAME/model/vqvae --to diffusers --out DIR
    python jobs/export.py --run STORAGE/runs/infinity_tokenizer/NAME --to infinity --out DIR
    python jobs/export.py --run STORAGE/runs/sdxl_lora/NAME --to kohya --out DIR
    python jobs/export.py --run STORAGE/runs/qformer/NAME --to transformers --out DIR
    python jobs/export.py --run STORAGE/runs/qformer_llm/NAME --to transformers --out DIR

A latent-diffusion run becomes a folder that ``diffusers.DiffusionPipeline.from_pretrained(DIR)`` loads, without code
of ours: an LDMTextToImagePipeline. A VQ-VAE becomes one that ``diffusers.VQModel.from_pretrained(DIR)`` loads.
A tokenizer of Infinity becomes DIR/vae.safetensors, with the names of the official files. It needs 32 groups of
normalisation and convolutions at the full side, as in the variant best.
An SDXL adapter becomes a file that ``load_lora_weights`` reads, in the layout of diffusers or of kohya's scripts.
A Q-Former becomes a Blip2ForImageTextRetrieval of transformers, and with a language model a
Blip2ForConditionalGeneration. DIR/README.md has the code for its scores and captions, and for an image encoder that is
not BLIP-2's.

Before the folder gets its name, it is loaded again and compared. A pipeline samples one prompt in 4 DDIM steps. The
latents from the same noise are compared, and the images decoded from the same latents. A VQ-VAE is compared on the
images decoded from the same codes, and on their latents. Images of different latents can differ further, as near the
border of two codes a rounding error decides the code. A Q-Former is compared on scores and captions of two images.

An autoregressive Transformer over codes is refused, as diffusers has no class for it. Its VQDiffusionPipeline
(deprecated) diffuses codes, and its AmusedPipeline unmasks them. The weights are safetensors already:
RUN/model/model.safetensors. The Transformer's VQ-VAE is a run by itself. It can be exported if it has convolutions
(--encoder convolutions --patch-size 1) and at most one attention head. The variant shapes-codes has patches.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jobs.runtime.commandline import run as run_job
from jobs.runtime.source import output_storage
from mmcore.catalogue import names
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen.hub import quiet_load
from mmcore.run_files import TOKENIZER_OF_BITS_ASSET, read_fields
from mmcore.storage import Storage, writing
from mmcore.trained.autoencoder import open_tokenizer, open_vqvae
from mmcore.trained.captioner import TrainedCaptioner, open_captioner
from mmcore.trained.generator import open_generator
from mmcore.trained.lora import LORA_FILE, Layout, adapter_difference, save_adapter
from mmcore.trained.to_diffusers import CHECK_STEPS, TOLERANCE, difference, to_pipeline, vqvae_difference
from mmcore.trained.to_infinity import FILE_NAME, save_official, tokenizer_difference
from mmcore.trained.to_transformers import GenerationExport, RetrievalExport


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and where to."""

    run: str
    """The finished run of a latent diffusion, an autoencoder or a Q-Former: STORAGE/runs/RECIPE/NAME."""
    out: str
    """New local folder."""
    to: Literal["diffusers", "kohya", "transformers", "infinity"] = "diffusers"
    """What is to load it: transformers for a Q-Former, Infinity's own code for its tokenizer, else diffusers. kohya is
    the layout of an SDXL adapter that other programs read."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    text_encoder: str | None = None
    """Folder or name of the frozen text encoder, if it is not where the run had it."""
    language_model: str | None = None
    """Folder or name of the frozen language model, if it is not where the run had it."""


@dataclass(frozen=True)
class _Exported:
    """A model of another library, how far it is from ours once it is loaded again, and what that was compared on."""

    save: Callable[[str], Any]
    loader: str
    difference: Callable[[str], float]
    outputs: str
    compared_on: str
    is_folder: bool = True
    """Whether a class loads the folder, by ``from_pretrained``."""


# By recipe, what transformers has a class for.
_TO_TRANSFORMERS: dict[str, type[RetrievalExport] | type[GenerationExport]] = {
    "qformer": RetrievalExport,
    "qformer_llm": GenerationExport,
}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _exported(settings: ExportSettings) -> _Exported:
    recipe = read_fields(Storage(settings.run))[0]["recipe"]
    library = "transformers" if recipe in (*names("captioner"), *names("retriever")) else "diffusers"
    library = "infinity" if recipe == "infinity_tokenizer" else library
    if recipe == "sdxl_lora" and settings.to in ("diffusers", "kohya"):
        return _for_adapter(settings)
    if recipe == "infinity":
        raise InputError(
            f"--run {settings.run}: no library has a class for Infinity's Transformer; its weights are in "
            f"{settings.run}/model/model.safetensors; its tokenizer is the run "
            f"{settings.run}/model/{TOKENIZER_OF_BITS_ASSET}"
        )
    if settings.to != library:
        raise InputError(f"--to {settings.to}: a run of {recipe} is for {library}; give --to {library}")
    if library == "infinity":
        return _for_infinity(settings)
    return _for_transformers(settings, recipe) if library == "transformers" else _for_diffusers(settings, recipe)


def _refuse_frozen(settings: ExportSettings, what: str) -> None:
    """Raise InputError for a frozen model that `what` does not have."""
    for flag in ("encoder", "text_encoder", "language_model"):
        if (value := getattr(settings, flag)) is not None:
            raise InputError(f"--{flag.replace('_', '-')} {value!r}: {what} has none; leave the flag out")


def _for_adapter(settings: ExportSettings) -> _Exported:
    _refuse_frozen(settings, "an adapter")
    layout: Layout = "kohya" if settings.to == "kohya" else "diffusers"
    trained = Storage(settings.run)
    return _Exported(
        partial(save_adapter, trained, layout),
        f"load_lora_weights of a StableDiffusionXLPipeline: {LORA_FILE}",
        partial(adapter_difference, trained),
        "weights",
        "the changes of the U-Net's weights",
        is_folder=False,
    )


def _for_infinity(settings: ExportSettings) -> _Exported:
    _refuse_frozen(settings, "a tokenizer")
    trained = open_tokenizer(settings.run).load()
    return _Exported(
        partial(save_official, trained),
        f"load_vae of mmcore.generators.infinity_weights: {FILE_NAME} has the official names",
        partial(tokenizer_difference, trained),
        "images",
        "random images: what is made of them",
        is_folder=False,
    )


def _for_transformers(settings: ExportSettings, recipe: str) -> _Exported:
    if settings.text_encoder is not None:
        raise InputError(f"--text-encoder {settings.text_encoder!r}: only a generator has one; leave the flag out")
    if recipe not in _TO_TRANSFORMERS:
        known = ", ".join(_TO_TRANSFORMERS)
        raise InputError(f"--run {settings.run}: transformers has no class for a run of {recipe}; name one of {known}")
    captioner = open_captioner(settings.run, encoder=settings.encoder, language_model=settings.language_model).load()
    assert isinstance(captioner, TrainedCaptioner)
    export = _TO_TRANSFORMERS[recipe](captioner)
    return _Exported(
        export.save, f"transformers.{export.loader}", export.difference, "scores or captions", export.compared_on
    )


def _for_diffusers(settings: ExportSettings, recipe: str) -> _Exported:
    import diffusers
    from diffusers import DiffusionPipeline, VQModel

    diffusers.utils.logging.disable_progress_bar()
    for flag, value in (("--encoder", settings.encoder), ("--language-model", settings.language_model)):
        if value is not None:
            raise InputError(f"{flag} {value!r}: only a captioner has one; leave the flag out")
    outputs = "latents or images"
    if recipe in names("autoencoder"):
        if settings.text_encoder is not None:
            raise InputError(f"--text-encoder {settings.text_encoder!r}: a VQ-VAE reads no text; leave the flag out")
        vqvae = open_vqvae(settings.run).load()
        model: Any = vqvae.model.to_diffusers()
        return _Exported(
            model.save_pretrained,
            "diffusers.VQModel",
            lambda folder: vqvae_difference(vqvae, VQModel.from_pretrained(folder, trust_remote_code=False).eval()),
            outputs,
            "codes drawn at random: their image, and its latents,",
        )
    generator = open_generator(settings.run, text_encoder=settings.text_encoder).load()
    return _Exported(
        to_pipeline(generator).save_pretrained,
        "diffusers.DiffusionPipeline",
        lambda folder: difference(generator, DiffusionPipeline.from_pretrained(folder, trust_remote_code=False)),
        outputs,
        f"one prompt and {CHECK_STEPS} steps: latents from the same noise, and images of the same latents,",
    )


def export(settings: ExportSettings) -> float:
    """Write the folder; returns the largest difference. Raises InputError where it is there already."""
    if "://" in settings.out:
        raise InputError(f"--out {settings.out}: {settings.to} reads folders; name one on this machine")
    out = Path(output_storage(settings.out, "--out").uri)
    if out.exists():
        raise InputError(f"--out {out}: is there already; name a new folder")
    exported = _exported(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        with quiet_load():
            with writing(out):
                exported.save(folder)
            found = exported.difference(folder)
        if not found <= TOLERANCE:
            raise RuntimeError(
                f"{exported.outputs} of the exported model differ by {found:.2g} of 1, more than {TOLERANCE:g}"
            )
        # A temporary folder is its owner's alone; this one is handed on.
        Path(folder).chmod(0o777 & ~_umask())
        Path(folder).rename(out)
        # The context manager removes a folder of that name at its end.
        Path(folder).mkdir()
    print(
        f"export: {out}, loaded again and compared on {exported.compared_on} differ by {found:.1g} of 1 at most\n"
        f"load it with {exported.loader}" + f".from_pretrained({str(out)!r})" * exported.is_folder,
        flush=True,
    )
    return found


def main() -> None:
    export(read_settings(ExportSettings, __doc__, "python jobs/export.py"))


if __name__ == "__main__":
    run_job(main)
