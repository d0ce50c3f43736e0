"""How a Transformer over codes is trained: those of a frozen VQ-VAE, made once, or of scenes that no epoch had."""

import dataclasses

import torch
from torch import Tensor

from jobs.runtime.features import cached_autoencoder_column
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
from jobs.runtime.run_folder import check_begun
from jobs.runtime.scene_training import (
    check_scenes,
    encoded_split,
    exhaustive_captions,
    fresh_scenes,
    num_encoded,
    without_train_captions,
)
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, parameters, say_sizes, say_steps
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import CaptionTable, read_captions
from mmcore.frozen.text import TextInputs
from mmcore.generators.autoregressive import AutoregressiveRecipe, CodeTransformer
from mmcore.generators.code_rows import CodeRows, code_dtype
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.rows import Batch
from mmcore.seeding import derive_seed
from mmcore.trained.autoencoder import open_autoencoder


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
    seen = "scenes are drawn while it trains, each seen once" if recipe.fresh_scenes else "are seen"
    say_sizes(job, {"the Transformer": parameters(model) - parameters(model.text), **of_text})
    print(f"tokens: {height * width} an image ({height} x {width}), each one of {facts.num_codes:,} codes", flush=True)
    num_images = say_steps(job, num_train) * recipe.train.batch_size
    print(f"images: {num_images:,} {seen}", flush=True)


def _encode(
    job: Job[AutoregressiveRecipe], table: CaptionTable, facts: AutoregressiveFacts
) -> Encoded[AutoregressiveRecipe, AutoregressiveFacts]:
    run = VQVAE.ensure(job)
    fingerprint = open_autoencoder(run.uri).load().fingerprint()
    facts = dataclasses.replace(facts, autoencoder_fingerprint=fingerprint)
    check_begun(job, facts)
    recipe = dataclasses.replace(job.recipe, vqvae=run.uri)
    columns = [
        cached_autoencoder_column(
            job.storage,
            recipe.dataset,
            output="codes",
            run=run,
            fingerprint=fingerprint,
            flip=flip,
            num_views=1 + recipe.flip,
            split=encoded_split(recipe, table),
            stall_timeout_s=job.options.stall_timeout,
        )
        for flip in ([False, True] if recipe.flip else [False])
    ]
    facts = dataclasses.replace(facts, columns=tuple(column.folder.name for column in columns))
    return Encoded(dataclasses.replace(job, recipe=recipe), facts)


def _columns(job: Job[AutoregressiveRecipe], facts: AutoregressiveFacts) -> dict[str, TensorSpec]:
    spec = TensorSpec(str(code_dtype(facts.num_codes)), facts.code_shape)
    return {"codes": spec, "mirrored_codes": spec} if job.recipe.flip else {"codes": spec}


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
