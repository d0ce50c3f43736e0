"""What the jobs that train a diffusion model share: the text's way in, the rows, the sample images, what is printed."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jobs.runtime.features import cached_text_column, read_null
from jobs.runtime.job import Job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, Flow, say_what_is_cut, train_by, train_captions
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.pixels import to_pixels
from mmcore.data.prepared import CaptionTable, read_captions
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.text import FrozenTextEncoder, PromptTokenizer, TextInputs
from mmcore.frozen.tokenizers import WORDS
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion import check_timesteps
from mmcore.generators.diffusion_recipe import DiffusionRecipe
from mmcore.generators.diffusion_rows import GenerationRows
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.prompt_rows import PromptEmbeddings, PromptIds, Prompts
from mmcore.images import image_grid
from mmcore.run_files import TOKENIZER_ASSET
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.training_plan import num_steps, resolve_precision

Text = PromptTokenizer | FrozenTextEncoder


@dataclass(frozen=True)
class Samples:
    """What x_0 is: pixels, or the latents of another model."""

    facts: Callable[[Job[Any], TextInputs], DiffusionFacts]
    """Facts of that kind, with the shape of a sample and the size of an image."""
    encode: Callable[[Job[Any], CaptionTable, DiffusionFacts], Encoded[Any, DiffusionFacts]]
    """Makes the columns of samples."""
    columns: Callable[[Job[Any], DiffusionFacts], dict[str, TensorSpec]]
    """What is cached of an image's sample."""
    setup: Callable[[Job[Any], DiffusionFacts, Doing], Setup]
    """Model and rows, on a worker."""
    reads: Callable[[Job[Any]], str] = lambda job: ""
    """What is read for it beside the data, for a dry run."""
    check: Callable[[Job[Any]], object] = lambda job: None
    """Raises InputError for what can be refused without any data."""


def train_diffusion(job: Job[Any], samples: Samples) -> RunSummary:
    """Make what is missing (Shapes, samples, the frozen encoder's hidden states), then train. Returns the summary."""
    opened: list[Text] = []  # once, as a frozen encoder may be large
    lengths: list[int] = []

    def plan(job: Job[Any], table: CaptionTable) -> DiffusionFacts:
        opened.append(open_text(job.recipe, table))
        tokenizer = opened[0] if isinstance(opened[0], PromptTokenizer) else opened[0].tokenize
        lengths.extend(tokenizer.lengths(train_captions(table, job.recipe.captions_per_image)))
        facts = samples.facts(job, text_inputs(opened[0]))
        return dataclasses.replace(facts, dataset_fingerprint=table.facts.get("fingerprint", ""))

    def describe(job: Job[Any], facts: DiffusionFacts, num_train: int) -> None:
        _describe(job, facts, opened[0], num_train)
        say_what_is_cut(lengths, job.recipe.text.max_tokens, _longer(opened[0], job.recipe.text.max_tokens))

    def encode(job: Job[Any], table: CaptionTable, facts: DiffusionFacts) -> Encoded[Any, DiffusionFacts]:
        encoded = samples.encode(job, table, facts)
        return dataclasses.replace(encoded, facts=with_text(encoded.job, encoded.facts, table, opened[0]))

    def columns(job: Job[Any], facts: DiffusionFacts) -> dict[str, TensorSpec]:
        width, recipe = facts.text_inputs.width, job.recipe
        text = {} if width is None else {"text": (recipe.captions_per_image, recipe.text.max_tokens, width)}
        return samples.columns(job, facts) | {name: TensorSpec("float16", shape) for name, shape in text.items()}

    def reads(job: Job[Any]) -> str:
        text = job.recipe.text
        return ", ".join(filter(None, [samples.reads(job), "" if text.is_scratch else text.text_encoder]))

    def check(job: Job[Any]) -> Job[Any]:
        samples.check(job)
        return _check(job)

    return train_by(Flow(check, plan, describe, encode, columns, samples.setup, reads), job)


def _check(job: Job[Any]) -> Job[Any]:
    if job.options.stream:
        raise InputError("--stream: this recipe looks its rows up on the worker's disk; leave it out")
    check_timesteps("ddim", job.recipe.noise.num_timesteps, job.recipe.sample_steps)
    # As a worker, and whoever reads the finished run from elsewhere, finds them.
    text = job.recipe.text
    text = dataclasses.replace(
        text, text_encoder=absolute_folder(text.text_encoder), tokenizer=absolute_folder(text.tokenizer)
    )
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, text=text))


def _describe(job: Job[Any], facts: DiffusionFacts, text: Text, num_train: int) -> None:
    """Print sizes and steps. Raises InputError for a network that does not fit its samples, or for too few rows."""
    recipe: DiffusionRecipe = job.recipe
    with torch.device("meta"):
        model = recipe.build(facts)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters()) / 1e6
    frozen = f"{count(text.model):.2f} M of the frozen {text.name}" if isinstance(text, FrozenTextEncoder) else "none"
    steps_per_epoch, total = num_steps(recipe.train, num_train)
    print(
        f"parameters: {count(model.unet):.2f} M of the U-Net on {' x '.join(map(str, facts.x_0_shape))}, "
        f"{count(model.text):.2f} M of the text's way in; frozen text encoder: {frozen}\n"
        f"steps: {total:,} of {recipe.train.batch_size} images, {steps_per_epoch:,} an epoch",
        flush=True,
    )


def _longer(text: Text, max_tokens: int) -> str:
    """What helps captions that are too long."""
    if isinstance(text, FrozenTextEncoder) and max_tokens == text.model.config.to_dict().get("max_position_embeddings"):
        return f"{text.name} reads no more"
    return "raise --max-tokens"


# -- text ----------------------------------------------------------------------------------------------------------


def open_text(recipe: DiffusionRecipe, table: CaptionTable) -> Text:
    """The frozen text encoder, or the tokenizer of the one that is trained along."""
    text = recipe.text
    if not text.is_scratch:
        return FrozenTextEncoder(text.text_encoder, text.max_tokens)
    if text.tokenizer != WORDS:
        return PromptTokenizer.from_name(text.tokenizer, text.max_tokens)
    return PromptTokenizer.of_words(train_captions(table, recipe.captions_per_image), text.max_tokens)


def text_inputs(text: Text) -> TextInputs:
    """What the network is fed of it."""
    if isinstance(text, PromptTokenizer):
        return text.inputs()
    return TextInputs(width=text([""]).shape[-1])


def with_text(job: Job[Any], facts: DiffusionFacts, table: CaptionTable, text: Text) -> DiffusionFacts:
    """`facts` with where the text lies: the tokenizer is written to the storage, frozen hidden states are cached."""
    fingerprint = text.fingerprint()
    facts = dataclasses.replace(facts, text_fingerprint=fingerprint)
    if isinstance(text, PromptTokenizer):
        folder = job.storage / "tokenizers" / fingerprint[:24]
        for name, data in text.files().items():
            folder.create(name, data)
        return dataclasses.replace(facts, text=(folder.parent.name, folder.name))
    column = cached_text_column(
        job.storage,
        table,
        encoder=text,
        max_tokens=job.recipe.text.max_tokens,
        captions_per_image=job.recipe.captions_per_image,
        stall_timeout_s=job.options.stall_timeout,
    )
    return dataclasses.replace(facts, text=(column.folder.parent.name, column.folder.name))


def _text_folder(job: Job[Any], facts: DiffusionFacts) -> Storage:
    """Where in the storage the tokenizer or the hidden states lie."""
    parent, name = facts.text
    return job.storage / parent / name


def _prompts(job: Job[Any], facts: DiffusionFacts, table: CaptionTable, doing: Doing) -> Prompts:
    recipe, folder = job.recipe, _text_folder(job, facts)
    if recipe.text.is_scratch:
        captions = [row[: recipe.captions_per_image] for row in table.captions]
        return PromptIds(captions, PromptTokenizer.read(folder, recipe.text.max_tokens))
    return PromptEmbeddings(open_column(folder, default_cache(), doing=doing), read_null(folder), table.image_ids)


# -- on a worker ---------------------------------------------------------------------------------------------------


def diffusion_setup(
    job: Job[Any],
    facts: DiffusionFacts,
    doing: Doing,
    images: Callable[[Tensor], Tensor] | None = None,
    assets: dict[str, Storage] | None = None,
) -> Setup:
    """Model and rows, on a worker. `images` makes of x_0 images in [-1, 1]; None where x_0 is the image itself."""
    recipe: DiffusionRecipe = job.recipe
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    rows = GenerationRows(
        table,
        [open_column(job.storage / "features" / key, default_cache(), doing=doing) for key in facts.columns],
        _prompts(job, facts, table, doing),
        captions_per_image=recipe.captions_per_image,
        drop_text=recipe.drop_text,
        flip=recipe.flip,
        noise=recipe.noise,
        scaling_factor=facts.scaling_factor,
        seed=recipe.train.seed,
    )
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build(facts)
    chosen = rows.validation[: recipe.train.num_samples].tolist()
    seeds = [derive_seed(recipe.train.seed, "sample", number) for number in range(len(chosen))]

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        """The same prompts and seeds each time."""
        assert isinstance(model, Denoiser)
        if not chosen:
            return {}
        parameter = next(model.parameters())
        device = parameter.device

        def prompts(captions: list[int | None]) -> dict[str, Tensor]:
            batch = rows.prompts.batch(chosen, captions)
            return {
                name: each.to(device, parameter.dtype if each.is_floating_point() else None)
                for name, each in batch.items()
            }

        in_bf16 = resolve_precision(recipe.train, device) == "bf16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            x_0 = model.generate(
                prompts([0] * len(chosen)),
                prompts([None] * len(chosen)),
                seeds,
                num_inference_steps=recipe.sample_steps,
                guidance_scale=recipe.sample_guidance,
                clip=images is None,
            )
            pixels = to_pixels(x_0 if images is None else images(x_0)).cpu().numpy()
        columns = math.ceil(math.sqrt(len(pixels)))
        return {
            "grid": image_grid(pixels, columns),
            "prompts": " | ".join(table.captions[row][0] for row in chosen),
        }

    kept = dict(assets or {})
    if recipe.text.is_scratch:
        kept[TOKENIZER_ASSET] = _text_folder(job, facts)
    return Setup(model, rows, samples, kept)
