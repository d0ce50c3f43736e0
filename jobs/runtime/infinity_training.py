"""How Infinity's Transformer is trained: on latents of a frozen tokenizer, cached, or of scenes that no epoch had."""

import torch
from torch import Tensor

from jobs.runtime.frozen_autoencoder import TOKENIZER
from jobs.runtime.generator_training import (
    GeneratorKind,
    Text,
    read_prompts,
    sample_grids,
    text_assets,
    text_sizes,
    train_generator,
)
from jobs.runtime.job import Job
from jobs.runtime.ray_private import training_device
from jobs.runtime.scene_training import (
    check_scenes,
    encoded_split,
    exhaustive_captions,
    fresh_scenes,
    num_encoded,
    say_images,
    without_train_captions,
)
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, parameters, say_sizes, with_mirrored
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import CaptionTable, read_captions
from mmcore.frozen.text import TextInputs
from mmcore.generators.code_rows import CodeRows
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_recipe import InfinityGenerator, InfinityRecipe
from mmcore.generators.infinity_rows import InfinityRows
from mmcore.rows import Batch
from mmcore.seeding import derive_seed


def train_infinity(job: Job[InfinityRecipe]) -> RunSummary:
    """Make what is missing (Shapes, the tokenizer, latents, hidden states), then train. Returns the run's summary."""
    kind = GeneratorKind(
        _facts,
        _describe,
        _encode,
        _columns,
        setup,
        cached=num_encoded,
        reads=TOKENIZER.reads,
        check=_check,
        more_captions=exhaustive_captions,
    )
    return train_generator(job, kind)


def _check(job: Job[InfinityRecipe]) -> None:
    check_scenes(job.recipe)
    TOKENIZER.recipe(job)
    TOKENIZER.say(job)


def _facts(job: Job[InfinityRecipe], inputs: TextInputs) -> InfinityFacts:
    tokenizer = TOKENIZER.recipe(job)
    return InfinityFacts(inputs, tokenizer.latent_shape, tokenizer.grids, tokenizer.image_size)


def _describe(job: Job[InfinityRecipe], facts: InfinityFacts, text: Text, num_train: int) -> None:
    """Print sizes and steps. Raises InputError for too few rows, or a text that cannot be pooled."""
    recipe = job.recipe
    with torch.device("meta"):
        model = recipe.build(facts)
    sides = ", ".join(map(str, facts.grid_sides))
    say_sizes(job, {"the Transformer": parameters(model.transformer), **text_sizes(model.text, text)})
    num_tokens = sum(side * side for side in facts.grid_sides)
    print(f"tokens: {num_tokens} an image on grids of sides {sides}, each of {facts.latent_shape[0]} bits", flush=True)
    say_images(job, num_train)


def _encode(
    job: Job[InfinityRecipe], table: CaptionTable, facts: InfinityFacts
) -> Encoded[InfinityRecipe, InfinityFacts]:
    return TOKENIZER.encode(job, facts, output="latents", split=encoded_split(job.recipe, table))


def _columns(job: Job[InfinityRecipe], facts: InfinityFacts) -> dict[str, TensorSpec]:
    return with_mirrored({"latents": TensorSpec("float16", facts.latent_shape)}, job.recipe.flip)


def setup(job: Job[InfinityRecipe], facts: InfinityFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker. The tokenizer is loaded once samples are decoded, for fresh scenes at once."""
    recipe = job.recipe
    assert recipe.image_tokenizer is not None
    tokenizer = TOKENIZER.frozen(recipe.image_tokenizer, facts.autoencoder_fingerprint)
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    fresh = None
    if recipe.fresh_scenes:
        table = without_train_captions(table)
        encode = tokenizer.on(training_device()).encode
        fresh = fresh_scenes(job, facts, table, encode, output="latents", image_size=facts.resolution)
    rows = CodeRows(
        table,
        [open_column(job.storage / "features" / key, default_cache(), doing=doing) for key in facts.columns],
        read_prompts(job, facts, table, doing),
        captions_per_image=recipe.captions_per_image,
        # A dropped caption keeps its length.
        drop_text=0.0,
        flip=recipe.flip,
        seed=recipe.train.seed,
        output="latents",
        fresh=fresh,
    )
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build(facts)

    def made(model: InfinityGenerator, prompts: Batch, null: Batch, seeds: list[int]) -> Tensor:
        latents = model.generate(prompts, seeds, recipe.sample)
        return tokenizer.on(str(latents.device)).decode(latents)

    samples = sample_grids(recipe, table, rows.validation, rows.prompts, made)
    with_flips = InfinityRows(
        rows,
        grids=facts.grids,
        num_bits=facts.latent_shape[0],
        flip_strength=recipe.flip_strength,
        drop_text=recipe.drop_text,
        seed=recipe.train.seed,
    )
    return Setup(model, with_flips, samples, {**tokenizer.assets, **text_assets(job, facts)}, tokenizer.check_copy)
