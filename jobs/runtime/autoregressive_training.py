"""How a Transformer over codes is trained: those of a frozen VQ-VAE, made once, or of scenes that no epoch had."""

import torch
from torch import Tensor

from jobs.runtime.frozen_autoencoder import VQVAE
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
from mmcore.generators.autoregressive import AutoregressiveRecipe, CodeTransformer
from mmcore.generators.code_rows import CodeRows, code_dtype
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.rows import Batch
from mmcore.seeding import derive_seed


def train_autoregressive(job: Job[AutoregressiveRecipe]) -> RunSummary:
    """Make what is missing (Shapes, the VQ-VAE, codes, hidden states), then train. Returns the run's summary."""
    kind = GeneratorKind(
        _facts,
        _describe,
        _encode,
        _columns,
        setup,
        cached=num_encoded,
        reads=VQVAE.reads,
        check=_check,
        more_captions=exhaustive_captions,
    )
    return train_generator(job, kind)


def _check(job: Job[AutoregressiveRecipe]) -> None:
    check_scenes(job.recipe)
    VQVAE.recipe(job)
    VQVAE.say(job)


def _facts(job: Job[AutoregressiveRecipe], inputs: TextInputs) -> AutoregressiveFacts:
    vqvae = VQVAE.recipe(job)
    return AutoregressiveFacts(inputs, vqvae.latent_shape[1:], vqvae.num_codes, vqvae.image_size)


def _describe(job: Job[AutoregressiveRecipe], facts: AutoregressiveFacts, text: Text, num_train: int) -> None:
    """Print sizes and steps. Raises InputError for too few rows."""
    recipe = job.recipe
    with torch.device("meta"):
        model = recipe.build(facts)
    (height, width), of_text = facts.code_shape, text_sizes(model.text, text)
    say_sizes(job, {"the Transformer": parameters(model) - parameters(model.text), **of_text})
    print(f"tokens: {height * width} an image ({height} x {width}), each one of {facts.num_codes:,} codes", flush=True)
    say_images(job, num_train)


def _encode(
    job: Job[AutoregressiveRecipe], table: CaptionTable, facts: AutoregressiveFacts
) -> Encoded[AutoregressiveRecipe, AutoregressiveFacts]:
    return VQVAE.encode(job, facts, output="codes", split=encoded_split(job.recipe, table))


def _columns(job: Job[AutoregressiveRecipe], facts: AutoregressiveFacts) -> dict[str, TensorSpec]:
    spec = TensorSpec(str(code_dtype(facts.num_codes)), facts.code_shape)
    return with_mirrored({"codes": spec}, job.recipe.flip)


def setup(job: Job[AutoregressiveRecipe], facts: AutoregressiveFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker; the VQ-VAE is loaded where samples are first decoded, for fresh scenes at once."""
    recipe = job.recipe
    assert recipe.vqvae is not None
    vqvae = VQVAE.frozen(recipe.vqvae, facts.autoencoder_fingerprint)
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    fresh = None
    if recipe.fresh_scenes:
        table, loaded = without_train_captions(table), vqvae.on(training_device())
        fresh = fresh_scenes(job, facts, table, loaded.codes, output="codes", image_size=facts.resolution)
    rows = CodeRows(
        table,
        [open_column(job.storage / "features" / key, default_cache(), doing=doing) for key in facts.columns],
        read_prompts(job, facts, table, doing),
        captions_per_image=recipe.captions_per_image,
        drop_text=recipe.drop_text,
        flip=recipe.flip,
        seed=recipe.train.seed,
        fresh=fresh,
    )
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build(facts)

    def made(model: CodeTransformer, prompts: Batch, null: Batch, seeds: list[int]) -> Tensor:
        codes = model.generate(prompts, null, seeds, recipe.sample)
        return vqvae.on(str(codes.device)).decode_codes(codes)

    samples = sample_grids(recipe, table, rows.validation, rows.prompts, made)
    return Setup(model, rows, samples, {**vqvae.assets, **text_assets(job, facts)}, vqvae.check_copy)
