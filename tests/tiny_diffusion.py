"""A diffusion model on tiny images, its rows and a run, small enough for a test to train in seconds."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from mmcore import checkpoint
from mmcore.data.columns import Column
from mmcore.data.prepared import CaptionTable
from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion_rows import GenerationRows, scaling_factor
from mmcore.generators.facts import DiffusionFacts, VQVAEFacts
from mmcore.generators.latent_diffusion import VARIANTS as LDM_VARIANTS
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe
from mmcore.generators.pixel_diffusion import VARIANTS as PIXEL_VARIANTS
from mmcore.generators.pixel_diffusion import PixelDiffusionRecipe
from mmcore.generators.prompt_rows import PromptIds
from mmcore.generators.vqvae import VARIANTS as VQVAE_VARIANTS
from mmcore.generators.vqvae import VQVAETraining
from mmcore.recipe import TrainSettings
from mmcore.run_files import RunFile, write_model
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder
from mmcore.training import RunHooks, Training

SIDE = 8
SHAPE = (3, SIDE, SIDE)
LATENT_SHAPE = (4, 4, 4)


def _settings(settings: TrainSettings, **train: Any) -> TrainSettings:
    tiny_ones = dataclasses.replace(
        settings,
        num_epochs=4,
        max_steps=None,
        lr=3e-3,
        precision="fp32",
        ema_decay=None,
        checkpoint_every_steps=3,
        validate_every_epochs=1,
        log_every_steps=1,
    )
    return dataclasses.replace(tiny_ones, **train)


def recipe(**train: Any) -> PixelDiffusionRecipe:
    """Pixels of 8², two levels. `train` overrides the training settings."""
    smoke = PIXEL_VARIANTS["smoke"]
    return dataclasses.replace(smoke, image_size=SIDE, captions_per_image=2, train=_settings(smoke.train, **train))


def latent_recipe(**train: Any) -> LatentDiffusionRecipe:
    """Latents of 4² and of the mirrored images, two levels. `train` as above."""
    smoke = LDM_VARIANTS["smoke"]
    return dataclasses.replace(smoke, flip=True, captions_per_image=2, train=_settings(smoke.train, **train))


def table(num_train: int = 40, num_validation: int = 12) -> CaptionTable:
    return tiny.table(num_train, num_validation)


def tokenizer(recipe: Any, facts: CaptionTable | None = None) -> PromptTokenizer:
    captions = [text for row in (facts or table()).captions for text in row]
    return PromptTokenizer.of_words(captions, recipe.text.max_tokens)


def pixels(num_rows: int) -> np.ndarray:
    """One colour per image, by its number, with some noise."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (4, 3))
    flat = np.stack([np.broadcast_to(colours[row % 4], (SIDE, SIDE, 3)) for row in range(num_rows)])
    return (flat + random.integers(-10, 10, flat.shape)).clip(0, 255).astype(np.uint8)


def latents(num_rows: int, view: int) -> np.ndarray:
    """Latents from a formula, with the standard deviation of a VQ-VAE's latents."""
    places = np.arange(num_rows * np.prod(LATENT_SHAPE)).reshape(num_rows, *LATENT_SHAPE)
    return (3 * np.cos(places * 0.37 + view)).astype(np.float16)


def rows_of(recipe: Any, facts: CaptionTable | None = None) -> GenerationRows:
    facts = facts or table()
    num_rows, in_pixels = len(facts.image_ids), isinstance(recipe, PixelDiffusionRecipe)
    views = [pixels(num_rows)] if in_pixels else [latents(num_rows, view) for view in range(1 + recipe.flip)]
    return GenerationRows(
        facts,
        [Column(tuple(facts.image_ids), view) for view in views],
        PromptIds([row[: recipe.captions_per_image] for row in facts.captions], tokenizer(recipe, facts)),
        captions_per_image=recipe.captions_per_image,
        drop_text=recipe.drop_text,
        flip=recipe.flip,
        noise=recipe.noise,
        scaling_factor=1.0 if in_pixels else scaling_factor(views[0]),
        seed=recipe.train.seed,
    )


def model_of(recipe: Any, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    shape = SHAPE if isinstance(recipe, PixelDiffusionRecipe) else LATENT_SHAPE
    return recipe.build(DiffusionFacts(tokenizer(recipe).inputs(), shape))


def fill_by_formula(model: Denoiser) -> None:
    """Weights without a random generator; gains stay 1."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1 or name.endswith("bias"):
                places = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
                width = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
                parameter.copy_(torch.sin(places * 0.7 + len(name)) * width**-0.5)


def golden_losses(recipe: Any, folder: Path) -> list[float]:
    """The loss of each step, with weights from a formula."""
    model = model_of(recipe)
    fill_by_formula(model)
    history = train(recipe, folder, model=model).training.state.history
    return [row["loss"] for row in history if "validation_loss" not in row]


def train(recipe: Any, folder: Path, *, resume_from: Path | None = None, model: Denoiser | None = None) -> tiny.Run:
    """Train in this process and keep every checkpoint under `folder`."""
    kept: list[Path] = []

    def commit(saved: Path | None, metrics: dict[str, Any]) -> None:
        if saved is not None:
            kept.append(Path(shutil.move(saved, folder / saved.name)))

    folder.mkdir(parents=True, exist_ok=True)
    training = Training(
        model_of(recipe) if model is None else model,
        rows_of(recipe),
        recipe.train,
        RunHooks(commit=commit),
        workdir=folder / "work",
        resume_from=resume_from,
    )
    return tiny.Run(training, training.run(), kept)


# -- run folders, as the jobs leave them ---------------------------------------------------------------------------


def write_run(
    run: Storage, recipe: Any, name: str, x_0_shape: tuple[int, int, int], **facts: Any
) -> tuple[Denoiser, PromptTokenizer]:
    """A finished run of a network with random weights and a text encoder from scratch."""
    words = tokenizer(recipe)
    torch.manual_seed(0)
    more = {"resolution": x_0_shape[1], "text_fingerprint": words.fingerprint(), **facts}
    content = DiffusionFacts(words.inputs(), x_0_shape, **more)
    model = recipe.build(content)
    write_model(run, checkpoint.trainable_state(model), RunFile(name, "smoke", recipe, content, ""))
    for file, data in words.files().items():
        (run / "model" / "tokenizer").write(file, data)
    return model.eval(), words


def write_pixel_run(run: Storage) -> tuple[Denoiser, PromptTokenizer]:
    """Pixel diffusion on 8²."""
    return write_run(run, recipe(), "pixel_diffusion", SHAPE)


def write_vqvae_run(run: Storage, seed: int = 1, **changes: Any) -> VQVAETraining:
    """A VQ-VAE of 32² with random weights. `changes` apply to its recipe."""
    vqvae = dataclasses.replace(VQVAE_VARIANTS["smoke"], **changes)
    torch.manual_seed(seed)
    model = VQVAETraining(vqvae)
    write_model(run, checkpoint.trainable_state(model), RunFile("vqvae", "smoke", vqvae, VQVAEFacts(), ""))
    return model.eval()


def write_ldm_run(run: Storage, vqvae_run: Storage) -> tuple[Denoiser, LatentDiffusionRecipe]:
    """Latent diffusion on the latents of `write_vqvae_run`."""
    vqvae = write_vqvae_run(vqvae_run).recipe
    ldm = dataclasses.replace(LDM_VARIANTS["smoke"], vqvae=vqvae_run.uri)
    fingerprint = open_autoencoder(vqvae_run.uri).load().fingerprint()
    facts = {"resolution": vqvae.image_size, "scaling_factor": 0.5, "vqvae_fingerprint": fingerprint}
    model, _ = write_run(run, ldm, "ldm", vqvae.latent_shape, **facts)
    for file in ("recipe.json", "model.safetensors"):
        (run / "model" / "vqvae" / "model").write(file, (vqvae_run / "model").read(file))
    return model, ldm
