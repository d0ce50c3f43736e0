#!/usr/bin/env python
"""Hand a trained generator on in the form of another library.

    python jobs/export.py --run STORAGE/runs/ldm/NAME --to diffusers --out DIR

A latent-diffusion run becomes a folder that ``diffusers.DiffusionPipeline.from_pretrained(DIR)`` loads, without code
of ours: an LDMTextToImagePipeline. Before the folder takes its name, it is loaded again and compared, on one prompt and
4 DDIM steps: the latents that both arrive at from the same noise, and the images that both decode from the same
latents. Images of either's own latents can differ further: where a latent lies on the border of two codes, the last bit
decides.
"""

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from jobs.runtime.commandline import run as run_job
from jobs.runtime.source import output_storage
from mmcore.errors import InputError
from mmcore.frozen.text import NO_TEXT
from mmcore.generators.diffusion import make_sampler
from mmcore.trained.generator import TrainedDiffusion, open_generator

# diffusers' pipeline pads prompts to this many tokens, and divides the image's side by this to get that of its latents.
PIPELINE_TOKENS = 77
PIPELINE_FACTOR = 8
# Largest difference of any value, of latents in units of the noise and of images in [0, 1].
TOLERANCE = 1e-4
_CHECK_PROMPT, _CHECK_STEPS, _CHECK_GUIDANCE = "a red circle", 4, 3.0


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


def to_pipeline(generator: TrainedDiffusion) -> Any:
    """The generator as diffusers' LDMTextToImagePipeline.

    Raises InputError for a run that this pipeline cannot hold.
    """
    from diffusers import LDMTextToImagePipeline

    if generator.vqvae is None:
        raise InputError("--run: is no latent diffusion; diffusers has no pipeline for text to pixels of this kind")
    recipe, context, frozen = generator.recipe, generator.model.text, generator.text_encoder
    if recipe.text.max_tokens != PIPELINE_TOKENS:
        raise InputError(
            f"max_tokens {recipe.text.max_tokens}: diffusers' pipeline pads prompts to {PIPELINE_TOKENS} tokens; train "
            f"with --max-tokens {PIPELINE_TOKENS}"
        )
    if recipe.unet.patch_size != 1:
        raise InputError(
            f"patch_size {recipe.unet.patch_size}: diffusers' pipeline has no patches; train with --patch-size 1"
        )
    if frozen is not None and (frozen.masked or recipe.text.projection_width is not None):
        raise InputError(
            f"text_encoder {frozen.name!r}: diffusers' pipeline takes hidden states as they come, without a mask or a "
            "projection; train with the text half of a CLIP, or with --text-encoder scratch"
        )
    # Copies: safetensors are written from weights in plain order, and the generator keeps its own.
    unet = copy.deepcopy(generator.model.unet).to("cpu", memory_format=torch.contiguous_format)
    # What the pipeline takes for the image's side is this times the VQ-VAE's factor, and of that it takes an eighth.
    factor = generator.vqvae.recipe.factor
    side = generator.model.x_0_shape[-1] * PIPELINE_FACTOR
    if side % factor:
        raise InputError(f"latents of {side // PIPELINE_FACTOR}²: diffusers' pipeline cannot express a factor {factor}")
    unet.register_to_config(sample_size=side // factor)
    return LDMTextToImagePipeline(
        vqvae=copy.deepcopy(generator.vqvae.model).to("cpu").to_diffusers(generator.scaling_factor),
        bert=copy.deepcopy(context.encoder if frozen is None else frozen.model).to("cpu"),
        tokenizer=generator.tokenizer.tokenizer,
        unet=unet,
        scheduler=make_sampler("ddim", generator.model.noise),
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@torch.inference_mode()
def difference(generator: TrainedDiffusion, pipeline: Any) -> float:
    """Largest difference of a value between both, given the same noise: of the latents that they arrive at, in units of
    the noise, and of the images in [0, 1] that they decode from the same latents.

    Not of the images of either's own latents: where a latent lies on the border of two codes, the last bit decides.
    """
    noise = torch.randn((1, *generator.model.x_0_shape), generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": _CHECK_STEPS, "guidance_scale": _CHECK_GUIDANCE}
    decode, latents = pipeline.vqvae.decode, []

    def decode_and_keep(given: torch.Tensor, **options: Any) -> Any:
        latents.append(given)
        return decode(given, **options)

    pipeline.vqvae.decode = decode_and_keep
    theirs = pipeline(_CHECK_PROMPT, latents=noise.clone(), output_type="pt", **settings).images
    pipeline.vqvae.decode = decode
    # The same seed gives the same noise; with DDIM there is no other.
    x_0 = generator.model.generate(
        generator.encode([_CHECK_PROMPT]), generator.encode([NO_TEXT]), [0], sampler="ddim", **settings
    )
    their_x_0 = latents[0].cpu() * generator.scaling_factor
    ours = (generator.images(their_x_0.to(x_0)).cpu() / 2 + 0.5).clamp(0, 1)
    return max(float((x_0.cpu() - their_x_0).abs().max()), float((ours - theirs).abs().max()))


def export(settings: ExportSettings) -> float:
    """Write the folder; returns the `difference`. Raises InputError where it is there already."""
    from diffusers import DiffusionPipeline

    if "://" in settings.out:
        raise InputError(f"--out {settings.out}: diffusers reads folders; name one on this machine")
    out = Path(output_storage(settings.out, "--out").uri)
    if out.exists():
        raise InputError(f"--out {out}: is there already; name a new folder")
    generator = open_generator(settings.run, text_encoder=settings.text_encoder).load()
    assert isinstance(generator, TrainedDiffusion)
    pipeline = to_pipeline(generator)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
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
        f"export: {out}, loaded again and compared on one prompt and {_CHECK_STEPS} steps: latents from the same "
        f"noise, and images of the same latents, differ by {found:.1g} of 1 at most\n"
        f"load it with diffusers.DiffusionPipeline.from_pretrained({str(out)!r})",
        flush=True,
    )
    return found


def main() -> None:
    export(tyro.cli(ExportSettings, description=__doc__, prog="python jobs/export.py"))


if __name__ == "__main__":
    run_job(main)
