"""How a Transformer over codes is trained: those of a frozen VQ-VAE, made once, or of scenes that no epoch had."""

import dataclasses

import torch
from torch import Tensor

from jobs.prepare import SHAPES
from jobs.runtime.features import cached_autoencoder_column
from jobs.runtime.frozen_autoencoder import VQVAE
from jobs.runtime.generator_training import (
    GeneratorKind,
    Text,
    read_prompts,
    read_tokenizer,
    sample_grids,
    text_assets,
    text_sizes,
    train_generator,
)
from jobs.runtime.job import Job
from jobs.runtime.ray_private import training_device
from jobs.runtime.run_folder import check_begun
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, parameters, say_sizes, say_steps
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import TRAIN, CaptionTable, read_captions
from mmcore.data.shapes import ShapesSettings, make_scene
from mmcore.data.shapes_captions import exhaustive_caption
from mmcore.errors import InputError
from mmcore.frozen.text import TextInputs
from mmcore.generators.autoregressive import AutoregressiveRecipe, CodeTransformer
from mmcore.generators.code_rows import CodeRows, code_dtype
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.generators.fresh_scenes import FreshScenes
from mmcore.rows import Batch
from mmcore.seeding import derive_seed
from mmcore.trained.autoencoder import open_autoencoder

# Scenes whose exhaustive captions tell how many are cut, and hold every word: a fifth of a second of drawing.
_TOLD_SCENES = 400


def train_autoregressive(job: Job[AutoregressiveRecipe]) -> RunSummary:
    """Make what is missing (Shapes, the VQ-VAE, codes, hidden states), then train. Returns the run's summary."""
    kind = GeneratorKind(
        _facts,
        _describe,
        _encode,
        _columns,
        setup,
        cached=_cached,
        reads=VQVAE.reads,
        check=_check,
        more_captions=_exhaustive_captions,
    )
    return train_generator(job, kind)


def _check(job: Job[AutoregressiveRecipe]) -> None:
    check_scenes(job.recipe)
    VQVAE.recipe(job)
    VQVAE.say(job)


def check_scenes(recipe: AutoregressiveRecipe) -> None:
    """Raise InputError for fresh scenes, or exhaustive captions, of what is not rendered."""
    if recipe.exhaustive_captions and not recipe.fresh_scenes:
        raise InputError(
            f"exhaustive_captions {recipe.exhaustive_captions} are made for fresh scenes alone; give --fresh-scenes, "
            "or --exhaustive-captions 0"
        )
    if recipe.fresh_scenes:
        mend = "give --no-fresh-scenes --exhaustive-captions 0"
        if recipe.dataset != SHAPES:
            raise InputError(f"fresh_scenes: --dataset {recipe.dataset} is not rendered, only {SHAPES} is; {mend}")
        if not recipe.text.is_scratch:
            raise InputError(
                f"fresh_scenes: their captions are new, and the hidden states of --text-encoder "
                f"{recipe.text.text_encoder} are computed once; {mend}"
            )


def _exhaustive_captions(job: Job[AutoregressiveRecipe], table: CaptionTable) -> list[str]:
    """Those of the first scenes, of the epochs that follow where the data have fewer."""
    if not job.recipe.exhaustive_captions:
        return []
    settings = _shapes(table)
    return [
        exhaustive_caption(settings.seed, TRAIN, index, make_scene(settings.seed, TRAIN, index, settings.max_objects))
        for index in range(_TOLD_SCENES)
    ]


def _shapes(table: CaptionTable) -> ShapesSettings:
    """What the scenes of the data were drawn with; of data that a dry run only plans, its defaults."""
    return ShapesSettings(**table.facts.get("settings", {}))


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
            # Fresh scenes stand for those that train.
            split=f"{recipe.split}:{table.validation_split}" if recipe.fresh_scenes else None,
            stall_timeout_s=job.options.stall_timeout,
        )
        for flip in ([False, True] if recipe.flip else [False])
    ]
    facts = dataclasses.replace(facts, columns=tuple(column.folder.name for column in columns))
    return Encoded(dataclasses.replace(job, recipe=recipe), facts)


def _columns(job: Job[AutoregressiveRecipe], facts: AutoregressiveFacts) -> dict[str, TensorSpec]:
    spec = TensorSpec(str(code_dtype(facts.num_codes)), facts.code_shape)
    return {"codes": spec, "mirrored_codes": spec} if job.recipe.flip else {"codes": spec}


def _cached(job: Job[AutoregressiveRecipe], table: CaptionTable) -> int:
    return len(table.validation_rows() if job.recipe.fresh_scenes else table.image_ids)


def setup(job: Job[AutoregressiveRecipe], facts: AutoregressiveFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker; the VQ-VAE is loaded where samples are first decoded, for fresh scenes at once."""
    recipe = job.recipe
    assert recipe.vqvae is not None
    vqvae = VQVAE.frozen(recipe.vqvae, facts.autoencoder_fingerprint)
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    fresh = None
    if recipe.fresh_scenes:
        # Nobody asks for the captions of the scenes that fresh ones stand for.
        captions = [[] if split == TRAIN else row for split, row in zip(table.splits, table.captions, strict=True)]
        table = dataclasses.replace(table, captions=captions)
        loaded = vqvae.on(training_device())
        fresh = FreshScenes(
            _shapes(table),
            loaded.codes,
            read_tokenizer(job, facts),
            output="codes",
            image_size=loaded.image_size,
            captions_per_image=recipe.captions_per_image,
            exhaustive_captions=recipe.exhaustive_captions,
        )
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
