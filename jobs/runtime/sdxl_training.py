"""How a LoRA of SDXL is trained: moments of latents and text embeddings are cached, and the adapters are trained."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from jobs.runtime.blocks import ROWS_PER_BLOCK, blocks_of_rows
from jobs.runtime.encoders import EncodeSdxlCaptions, EncodeSdxlImages
from jobs.runtime.features import cached_column
from jobs.runtime.generator_training import sample_grid
from jobs.runtime.image_blocks import plan_blocks
from jobs.runtime.job import Job
from jobs.runtime.ray_private import training_device
from jobs.runtime.run_folder import check_begun
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import (
    Encoded,
    Flow,
    parameters,
    say_sizes,
    say_steps,
    train_by,
    with_mirrored,
)
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.pixels import to_pixels
from mmcore.data.prepared import CaptionTable, read_captions, read_dataset_facts
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.generators.facts import SdxlLoraFacts
from mmcore.generators.sdxl import NUM_TOKENS, write_tiny
from mmcore.generators.sdxl_frozen import load_part, load_scheduler, load_settings
from mmcore.generators.sdxl_lora import TINY_MODEL, SdxlLora, SdxlLoraRecipe
from mmcore.generators.sdxl_rows import EMBEDS, MOMENTS, POOLED, SIZES, SdxlRows
from mmcore.seeding import derive_seed
from mmcore.trained.pipeline import TrainedPipeline
from mmcore.training_plan import resolve_precision

# Folder of the tiny model, in this machine's cache.
_TINY_FOLDER = "tiny-sdxl"


def train_sdxl_lora(job: Job[SdxlLoraRecipe]) -> RunSummary:
    """Make what is missing (Shapes, moments, text embeddings), then train. Returns the run's summary."""
    return train_by(
        Flow(_check, _plan, _describe, _encode, _columns, setup, reads=lambda job: job.recipe.model, writes=""), job
    )


def _check(job: Job[SdxlLoraRecipe]) -> Job[SdxlLoraRecipe]:
    if job.options.stream:
        raise InputError("--stream: this recipe looks its rows up on the worker's disk; leave it out")
    recipe = job.recipe
    model = _tiny_folder() if recipe.model == TINY_MODEL else absolute_folder(recipe.model)
    pipeline = TrainedPipeline(model, recipe.revision)
    if pipeline.class_name != "StableDiffusionXLPipeline":
        raise InputError(f"--model {recipe.model}: is a {pipeline.class_name}; name a StableDiffusionXLPipeline")
    _check_schedule(pipeline)
    # The commit that was found, so that all workers read the same files.
    return dataclasses.replace(job, recipe=dataclasses.replace(recipe, model=model, revision=pipeline.revision))


def _check_schedule(pipeline: TrainedPipeline) -> None:
    """Raise InputError for a noise schedule that the training does not have."""
    from diffusers import DDPMScheduler

    name, prediction = (pipeline.scheduler.get(key) for key in ("_class_name", "prediction_type"))
    if name not in ("DDPMScheduler", *DDPMScheduler._compatibles) or "EDM" in str(name):
        raise InputError(f"--model {pipeline.model}: its {name} has no timesteps of DDPM; name another SDXL")
    if prediction not in (None, "epsilon", "v_prediction"):
        raise InputError(f"--model {pipeline.model}: prediction_type {prediction}; name one of epsilon or v_prediction")


def _tiny_folder() -> str:
    folder = default_cache() / _TINY_FOLDER
    if not (folder / "model_index.json").is_file():
        print(f"writing a tiny SDXL of random weights to {folder}", flush=True)
        write_tiny(str(folder))
    return str(folder)


def _plan(job: Job[SdxlLoraRecipe], table: CaptionTable) -> SdxlLoraFacts:
    return SdxlLoraFacts(
        model_identity=TrainedPipeline(job.recipe.model, job.recipe.revision).files_or_commit(),
        dataset_fingerprint=table.facts.get("fingerprint", ""),
    )


def _text_widths(recipe: SdxlLoraRecipe) -> tuple[int, int]:
    """Channels of a text token, and of the pooled vector."""
    unet = load_settings(recipe.model, recipe.revision, "unet")
    of_sizes = 6 * unet["addition_time_embed_dim"]
    return unet["cross_attention_dim"], unet["projection_class_embeddings_input_dim"] - of_sizes


def _describe(job: Job[SdxlLoraRecipe], facts: SdxlLoraFacts, num_train: int) -> None:
    from diffusers import UNet2DConditionModel

    recipe = job.recipe
    with torch.device("meta"):
        # A configuration is numbers, so there is no code to trust.
        of_config = UNet2DConditionModel.from_config
        model = SdxlLora(
            of_config(load_settings(recipe.model, recipe.revision, "unet")), recipe, torch.empty(1), "epsilon", 1.0
        )
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    say_sizes(job, {"the adapters": trained, "the frozen U-Net": parameters(model) - trained})
    say_steps(job, num_train)


def _encode(
    job: Job[SdxlLoraRecipe], table: CaptionTable, facts: SdxlLoraFacts
) -> Encoded[SdxlLoraRecipe, SdxlLoraFacts]:
    check_begun(job, facts)
    recipe, storage = job.recipe, job.storage
    data = read_dataset_facts(storage, recipe.dataset)
    model = {"model": recipe.model, "revision": recipe.revision}
    folders = []
    for flip in [False, True] if recipe.flip else [False]:
        column = cached_column(
            storage,
            what=f"encode {recipe.dataset}{', mirrored,' if flip else ''} with the VAE of {recipe.model}",
            key=["sdxl", facts.model_identity, recipe.image_size, flip, data["fingerprint"]],
            blocks=lambda: plan_blocks(storage / "data" / recipe.dataset),
            worker_type=EncodeSdxlImages,
            worker_kwargs={**model, "image_size": recipe.image_size, "flip": flip},
            stall_timeout_s=job.options.stall_timeout,
        )
        folders.append(column.folder.name)
    captions = [row[: recipe.captions_per_image] for row in table.captions]
    text = cached_column(
        storage,
        what=f"encode captions with the text encoders of {recipe.model}",
        key=["sdxl text", facts.model_identity, recipe.captions_per_image, table.facts["fingerprint"]],
        blocks=lambda: blocks_of_rows({"image_id": table.image_ids, "captions": captions}, ROWS_PER_BLOCK),
        worker_type=EncodeSdxlCaptions,
        worker_kwargs={**model, "captions_per_image": recipe.captions_per_image},
        stall_timeout_s=job.options.stall_timeout,
    )
    return Encoded(job, dataclasses.replace(facts, columns=tuple(folders), text=text.folder.name))


def _columns(job: Job[SdxlLoraRecipe], facts: SdxlLoraFacts) -> dict[str, TensorSpec]:
    recipe = job.recipe
    channels, height, width = recipe.latent_shape
    token, pooled = _text_widths(recipe)
    image = {MOMENTS: TensorSpec("float16", (2 * channels, height, width)), SIZES: TensorSpec("int32", (4,))}
    number = recipe.captions_per_image
    text = {
        EMBEDS: TensorSpec("float16", (number, NUM_TOKENS, token)),
        POOLED: TensorSpec("float16", (number, pooled)),
    }
    return with_mirrored(image, recipe.flip) | text


def setup(job: Job[SdxlLoraRecipe], facts: SdxlLoraFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker. The frozen weights are read once, in the precision of the training."""
    recipe = job.recipe
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    views, text = (
        [open_column(job.storage / "features" / key, default_cache(), doing=doing) for key in keys]
        for keys in (facts.columns, [facts.text])
    )
    scheduler = load_scheduler(recipe.model, recipe.revision)
    rows = SdxlRows(
        table,
        views,
        text[0],
        captions_per_image=recipe.captions_per_image,
        image_size=recipe.image_size,
        num_timesteps=scheduler.config.num_train_timesteps,
        seed=recipe.train.seed,
    )
    in_bf16 = resolve_precision(recipe.train, torch.device(training_device())) == "bf16"
    unet = load_part(recipe.model, recipe.revision, "unet", torch.bfloat16 if in_bf16 else torch.float32)
    vae = _Vae(recipe)
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = SdxlLora(unet, recipe, scheduler.alphas_cumprod, scheduler.config.prediction_type, vae.scale)
    return Setup(model, rows, _samples(recipe, table, rows, vae, scheduler))


class _Vae:
    """The frozen VAE, read at its first use."""

    def __init__(self, recipe: SdxlLoraRecipe) -> None:
        self.scale = float(load_settings(recipe.model, recipe.revision, "vae")["scaling_factor"])
        self.recipe, self.loaded = recipe, None

    def on(self, device: torch.device) -> Any:
        if self.loaded is None:
            self.loaded = load_part(self.recipe.model, self.recipe.revision, "vae", torch.float32).to(device)
        return self.loaded


def _samples(recipe: SdxlLoraRecipe, table: CaptionTable, rows: SdxlRows, vae: _Vae, scheduler: Any) -> Any:
    """Images of the first validation captions, from the same noise each time. `scheduler`: that of the training."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    chosen = rows.validation[: recipe.train.num_samples].tolist()
    seeds = [derive_seed(recipe.train.seed, "sample", number) for number in range(len(chosen))]

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        assert isinstance(model, SdxlLora)
        if not chosen:
            return {}
        device = next(model.parameters()).device
        batch = rows.validation_batch(np.arange(len(chosen)))
        # A configuration is numbers, so there is no code to trust.
        configured = DPMSolverMultistepScheduler.from_config
        pipeline: Any = StableDiffusionXLPipeline(
            vae.on(device), None, None, None, None, model.unet, configured(scheduler.config), add_watermarker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        embeds, pooled = (batch[name].to(device, model.unet.dtype) for name in (EMBEDS, POOLED))
        with torch.inference_mode():
            latents = pipeline(
                prompt_embeds=embeds,
                negative_prompt_embeds=torch.zeros_like(embeds),
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=torch.zeros_like(pooled),
                height=recipe.image_size,
                width=recipe.image_size,
                num_inference_steps=recipe.sample_steps,
                guidance_scale=recipe.sample_guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
            images = vae.on(device).decode(latents.float() / vae.scale).sample
        return sample_grid(to_pixels(images).cpu().numpy(), table, chosen)

    return samples
