"""A trained latent diffusion as a pipeline of diffusers, a VQ-VAE as a model of it, and how far both are from ours."""

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

# diffusers' pipeline pads prompts to this many tokens, and divides the image's side by this to get that of its latents.
PIPELINE_TOKENS = 77
PIPELINE_FACTOR = 8
# Largest difference of any value, of latents in units of the noise and of images in [0, 1].
TOLERANCE = 1e-4
_CHECK_PROMPT, CHECK_STEPS, _CHECK_GUIDANCE = "a red circle", 4, 3.0


def to_pipeline(generator: Generator) -> Any:
    """The loaded generator as diffusers' LDMTextToImagePipeline.

    Raises InputError for a generator that this pipeline cannot hold.
    """
    from diffusers import LDMTextToImagePipeline

    if isinstance(generator, TrainedAutoregressive):
        run = generator.run
        try:
            generator.vqvae.model.to_diffusers()
            vqvae = f"export its VQ-VAE by --run {run}/model/{VQVAE_ASSET}"
        except InputError as error:
            vqvae = f"nor can its VQ-VAE be exported ({error})"
        raise InputError(
            f"--run {run}: diffusers has no class for a Transformer that writes codes one by one; its own weights are "
            f"in {run}/model/model.safetensors; {vqvae}"
        )
    if not isinstance(generator, TrainedDiffusion) or generator.vqvae is None:
        raise InputError("--run: is no latent diffusion; diffusers has no pipeline for text to pixels of this kind")
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
        tokenizer=generator.text.tokenizer.tokenizer,
        unet=unet,
        scheduler=make_sampler("ddim", generator.model.noise),
    )


@torch.inference_mode()
def difference(generator: Generator, pipeline: Any) -> float:
    """Largest difference of a value between both, given the same noise: of the latents that they arrive at, in units of
    the noise, and of the images in [0, 1] that they decode from the same latents.

    Not of the images of either's own latents: where a latent lies on the border of two codes, the last bit decides.
    """
    assert isinstance(generator, TrainedDiffusion), "as `to_pipeline` made the pipeline of it"
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
    # The same seed gives the same noise; with DDIM there is no other.
    x_0 = generator.model.generate(
        generator.text([_CHECK_PROMPT]), generator.text([NO_TEXT]), [0], sampler="ddim", **settings
    )
    their_x_0 = latents[0].cpu() * generator.scaling_factor
    ours = (generator.images(their_x_0.to(x_0)).cpu() / 2 + 0.5).clamp(0, 1)
    return max(float((x_0.cpu() - their_x_0).abs().max()), float((ours - theirs).abs().max()))


@torch.inference_mode()
def vqvae_difference(autoencoder: TrainedVQVAE, model: Any) -> float:
    """Largest difference of a value between the loaded VQ-VAE and diffusers' VQModel of it: of the image in [0, 1] that
    they decode from the same codes, and of the latents that they encode that image to, before a code is chosen.

    Not of the codes of those latents: where a latent lies on the border of two codes, the last bit decides.
    """
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(autoencoder.num_codes, (1, *autoencoder.code_shape), generator=random)
    vectors = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, autoencoder.latent_shape[0]))
    both = model.decode(vectors, force_not_quantize=True).sample, autoencoder.decode_codes(codes)
    theirs, ours = ((image / 2 + 0.5).clamp(0, 1) for image in both)
    pixels = to_pixels(both[1])
    latents = model.encode(to_network(pixels)).latents - autoencoder.encode(pixels.numpy())
    return max(float((ours - theirs).abs().max()), float(latents.abs().max()))
