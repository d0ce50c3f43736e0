"""Finished runs with random weights, in the form that training leaves, without training."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, ResNetConfig, ResNetForImageClassification

from mmcore import checkpoint
from mmcore.captioners import qformer_llm
from mmcore.captioners.facts import CaptionerFacts
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_rows
from mmcore.frozen.language import SCRATCH, FrozenLanguageModel, caption_tokenizer
from mmcore.frozen.text import FrozenTextEncoder, PromptTokenizer, TextInputs
from mmcore.generators import latent_diffusion, pixel_diffusion, vqvae
from mmcore.generators.facts import DiffusionFacts, VQVAEFacts
from mmcore.generators.text_context import TextSettings
from mmcore.run_files import TOKENIZER_ASSET, RunFile, write_model
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder

SCALING_FACTOR = 0.7


def write(folder: Path, name: str, recipe: Any, facts: Any, tensors: dict[str, torch.Tensor]) -> None:
    write_model(Storage(str(folder)), tensors, RunFile(name, "smoke", recipe, facts, ""))
    (folder / "_SUCCESS").write_text("{}")


def text_facts(folder: Path, text: TextSettings) -> tuple[TextInputs, str]:
    """The text inputs of the run in `folder`, and the fingerprint of its text encoder.

    For a text encoder from scratch, the tokenizer is written to the run.
    """
    if not text.is_scratch:
        encoder = FrozenTextEncoder(text.text_encoder, text.max_tokens)
        return TextInputs(width=encoder.model.config.hidden_size), encoder.fingerprint()
    tokenizer = word_tokenizer(text.max_tokens)
    write_tokenizer(folder / "model" / "tokenizer", tokenizer)
    return tokenizer.inputs(), tokenizer.fingerprint()


def _write_diffusion(folder: Path, name: str, recipe: Any, shape: tuple[int, int, int], **more: Any) -> Path:
    """Write a run of a diffusion recipe."""
    inputs, fingerprint = text_facts(folder, recipe.text)
    torch.manual_seed(0)
    facts = DiffusionFacts(inputs, shape, text_fingerprint=fingerprint, **more)
    model = recipe.build(facts)
    with torch.no_grad():
        # diffusers initialises the output to nearly zero. Here prompt and noise must affect the images.
        model.unet.conv_out.weight.mul_(3)
    write(folder, name, recipe, facts, checkpoint.trainable_state(model))
    return folder


def word_tokenizer(max_tokens: int) -> PromptTokenizer:
    """The words of Shapes."""
    words = [text for row in shapes_rows(ShapesSettings(40, 0, 0, 32)) for text in row["captions"]]
    return PromptTokenizer.of_words(words, max_tokens)


def write_tokenizer(folder: Path, tokenizer: PromptTokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in tokenizer.files().items():
        (folder / file).write_bytes(data)


def write_clip(folder: Path) -> Path:
    """A frozen text encoder: the text encoder of a CLIP with random weights."""
    tokenizer = word_tokenizer(77)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    inputs = tokenizer.inputs()
    ids = {"pad_token_id": inputs.pad_id, "bos_token_id": inputs.bos_id, "eos_token_id": inputs.eos_id}
    torch.manual_seed(2)
    CLIPTextModel(CLIPTextConfig(vocab_size=inputs.vocabulary_size, **sizes, **ids)).save_pretrained(folder)
    write_tokenizer(folder, tokenizer)
    return folder


def write_resnet(folder: Path) -> Path:
    """A frozen vision encoder: a tiny classifier with random weights, whose head is not part of the encoder."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def write_pixel_run(folder: Path, recipe: pixel_diffusion.PixelDiffusionRecipe | None = None) -> Path:
    recipe = recipe or dataclasses.replace(pixel_diffusion.VARIANTS["smoke"], image_size=16)
    shape = (3, recipe.image_size, recipe.image_size)
    return _write_diffusion(folder, "pixel_diffusion", recipe, shape, resolution=recipe.image_size)


def write_vqvae_run(folder: Path, **changes: Any) -> tuple[vqvae.VQVAERecipe, str]:
    """A VQ-VAE of 32² with 8² codes, and its fingerprint. `changes` apply to its recipe."""
    recipe = dataclasses.replace(vqvae.VARIANTS["smoke"], **changes)
    torch.manual_seed(1)
    model = recipe.build()
    with torch.no_grad():
        model.quantizer.codebook.normal_()
    own = {**checkpoint.trainable_state(model), **{name: model.get_buffer(name) for name in model.state_buffers}}
    write(folder, "vqvae", recipe, VQVAEFacts(), {f"vqvae.{name}": value for name, value in own.items()})
    return recipe, open_autoencoder(str(folder)).load().fingerprint()


def write_latent_run(folder: Path, text: TextSettings | None = None, patch_size: int = 1, **changes: Any) -> Path:
    """`changes` apply to the recipe of the VQ-VAE. Without `text` the text encoder is trained jointly."""
    autoencoder, fingerprint = write_vqvae_run(folder / "model" / "vqvae", **changes)
    recipe = latent_diffusion.VARIANTS["smoke"]
    unet = dataclasses.replace(recipe.unet, patch_size=patch_size)
    recipe = dataclasses.replace(recipe, text=text or recipe.text, unet=unet)
    return _write_diffusion(
        folder,
        "ldm",
        recipe,
        autoencoder.latent_shape,
        resolution=autoencoder.image_size,
        scaling_factor=SCALING_FACTOR,
        vqvae_fingerprint=fingerprint,
    )


def write_language_model(folder: Path) -> Path:
    """A frozen language model: the tiny random one as a folder of Hugging Face."""
    scratch = FrozenLanguageModel.from_name(SCRATCH)
    scratch.model.save_pretrained(folder)
    scratch.tokenizer.tokenizer.save_pretrained(folder)
    return folder


def write_language_run(folder: Path, language_model: str = SCRATCH) -> Path:
    """A finished run of an untrained bridge to a tiny language model."""
    recipe = dataclasses.replace(qformer_llm.VARIANTS["smoke"], language_model=language_model)
    tokenizer = caption_tokenizer(recipe.language_model)
    facts = recipe.complete(CaptionerFacts(tokenizer.token_ids, recipe.image_size**2, 3))
    torch.manual_seed(0)
    run = Storage(str(folder))
    for name, data in tokenizer.files().items():
        (run / "model" / TOKENIZER_ASSET).write(name, data)
    file = RunFile("qformer_llm", "smoke", recipe, facts, "")
    write_model(run, checkpoint.trainable_state(recipe.build(facts)), file)
    return folder
