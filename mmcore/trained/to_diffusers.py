"""Exports a latent diffusion and a VQ-VAE to diffusers, and measures the difference of their outputs."""

import copy
from typing import Any

import torch

from mmcore.data.pixels import to_network, to_pixels
from mmcore.errors import InputError
from mmcore.frozen.text import NO_TEXT
from mmcore.generators.diffusion import make_sampler
from mmcore.recipe import Generator
from mmcore.run_files import VQVAE_ASSET
from mmcore.trained.autoencoder import TrainedVQVAE
from mmcore.trained.autoregressive import TrainedAutoregressive
from mmcore.trained.diffusion import TrainedDiffusion

# Fixed in diffusers' pipeline: the padded length of prompts, and the side of an image divided by that of its latents.
PIPELINE_TOKENS = 77
PIPELINE_FACTOR = 8
# Largest allowed difference: of latents in units of the noise, of images in [0, 1].
TOLERANCE = 1e-4
_CHECK_PROMPT, CHECK_STEPS, _CHECK_GUIDANCE = "a red circle", 4, 3.0


def to_pipeline(generator: Generator) -> Any:
    """The loaded generator as diffusers' LDMTextToImagePipeline.

    Raises InputError for a generator that this pipeline does not support.
    """
    from diffusers import LDMTextToImagePipeline

    if isinstance(generator, TrainedAutoregressive):
        run = generator.run
        try:
            generator.vqvae.model.to_diffusers()
            vqvae = f"export its VQ-VAE by --run {run}/model/{VQVAE_ASSET}"
        except InputError as error:
            vqvae = f"its VQ-VAE cannot be exported either ({error})"
        raise InputError(
            f"--run {run}: diffusers has no class for an autoregressive Transformer over codes; its weights are in "
            f"{run}/model/model.safetensors; {vqvae}"
        )
    if not isinstance(generator, TrainedDiffusion) or generator.vqvae is None:
        raise InputError("--run: not a latent diffusion; diffusers has no pipeline for this pixel diffusion")
    recipe, context, frozen = generator.recipe, generator.model.text, generator.text.encoder
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
            f"text_encoder {frozen.name!r}: diffusers' pipeline uses hidden states without a mask or a projection; "
            "train with a CLIP text encoder, or with --text-encoder scratch"
        )
    # Copies, as safetensors needs contiguous weights and the generator keeps its own layout.
    unet = copy.deepcopy(generator.model.unet).to("cpu", memory_format=torch.contiguous_format)
    # The pipeline takes sample_size times the VQ-VAE's factor as the image's side, and an eighth of that for latents.
    factor = generator.vqvae.recipe.factor
    side = generator.model.x_0_shape[-1] * PIPELINE_FACTOR
    if side % factor:
        raise InputError(f"latents of {side // PIPELINE_FACTOR}²: diffusers' pipeline cannot express a factor {factor}")
    unet.register_to_config(sample_size=side // factor)
    return LDMTextToImagePipeline(
        vqvae=copy.deepcopy(generator.vqvae.model).to("cpu").to_diffusers(generator.scaling_factor),
        bert=copy.deepcopy(context.encoder if frozen is None else frozen.model).to("cpu"),
        tokenizer=generator.text.tokenizer.tokenizer,
        unet=unet,
        scheduler=make_sampler("ddim", generator.model.noise),
    )


@torch.inference_mode()
def difference(generator: Generator, pipeline: Any) -> float:
    """The largest difference between generator and pipeline for the same noise.

    It compares the sampled latents, in units of the noise, and the images in [0, 1] decoded from the same latents.
    Images of different latents are not compared: near the border of two codes a rounding error decides the code.
    """
    assert isinstance(generator, TrainedDiffusion), "`to_pipeline` accepts no other generator"
    noise = torch.randn((1, *generator.model.x_0_shape), generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": CHECK_STEPS, "guidance_scale": _CHECK_GUIDANCE}
    decode, latents = pipeline.vqvae.decode, []

    def decode_and_keep(given: torch.Tensor, **options: Any) -> Any:
        latents.append(given)
        return decode(given, **options)

    pipeline.vqvae.decode = decode_and_keep
    theirs = pipeline(_CHECK_PROMPT, latents=noise.clone(), output_type="pt", **settings).images
    pipeline.vqvae.decode = decode
    # Seed 0 gives the noise from above. DDIM draws no further noise.
    x_0 = generator.model.generate(
        generator.text([_CHECK_PROMPT]), generator.text([NO_TEXT]), [0], sampler="ddim", **settings
    )
    their_x_0 = latents[0].cpu() * generator.scaling_factor
    ours = (generator.images(their_x_0.to(x_0)).cpu() / 2 + 0.5).clamp(0, 1)
    return max(float((x_0.cpu() - their_x_0).abs().max()), float((ours - theirs).abs().max()))


@torch.inference_mode()
def vqvae_difference(autoencoder: TrainedVQVAE, model: Any) -> float:
    """The largest difference between the loaded VQ-VAE and its export to diffusers' VQModel.

    It compares the image in [0, 1] decoded from the same codes, and the latents of that image before quantisation.
    Codes are not compared: near the border of two codes a rounding error decides the code.
    """
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(autoencoder.num_codes, (1, *autoencoder.code_shape), generator=random)
    vectors = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, autoencoder.latent_shape[0]))
    both = model.decode(vectors, force_not_quantize=True).sample, autoencoder.decode_codes(codes)
    theirs, ours = ((image / 2 + 0.5).clamp(0, 1) for image in both)
    pixels = to_pixels(both[1])
    latents = model.encode(to_network(pixels)).latents - autoencoder.encode(pixels.numpy())
    return max(float((ours - theirs).abs().max()), float(latents.abs().max()))
