#!/usr/bin/env python
"""Measures trained images per second of a latent diffusion: our loop against the report's, with the same U-Net.

Command: python jobs/bench/ldm_step.py                    (idle machine; 2 CPU cores: about 6 minutes, 12 GB)
         python jobs/bench/ldm_step.py --variants best    (about 3 minutes)
Target: a ratio of at least 5 with the U-Net of `best`. The report's U-Net of 298 M parameters is measured too.

Ours is `mmcore.training.Training`, the loop of jobs/train_ldm.py. It reads memory-mapped latents from the cache of the
frozen VQ-VAE. It uses bf16 if the device supports it, and a fused optimiser. Each variant has its own text encoder,
loss, schedule, gradient clipping and EMA. `report` reads the hidden states of its frozen text encoder from a cache.
`best` trains a small text encoder jointly, and its time is included.

The report's loop runs two frozen encoders in every step, in fp32. They are its VQ-VAE on images of 256 pixels, and the
text encoder of CLIP ViT-B/16 on captions padded to 77 tokens. The loss is the error of the noise, in a plain loop with
Adam. The report also decodes JPEGs, tokenises captions and quantises latents in every step; that time is not counted.

Both have the same U-Net, memory layout, kind of attention, images per step, and latents of 32 x 32 x 4. The U-Net of
`best` takes 192 channels of text. The report's loop therefore has a Linear from CLIP's 512 channels. `best` itself
trains on latents of 16 x 16 x 4 (128 pixels) with 64 images per step. --own-latents measures our loop on these. That is
a smaller task, so there is no target for it. With few images per step the optimiser's time, equal in both, has a larger
share. With the report's U-Net a step has 4 instead of 16 images, which lowers the ratio.

Encoding once is a part of our training. `ratio_with_encoding` includes its time, divided by the variant's number of
epochs. `best` encodes each image twice, as it is and mirrored. `report` also encodes five captions per image. The time
is measured in the same run.

All weights, pixels and words are random, as the time does not depend on them.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.bench import inputs
from jobs.bench.timing import clock, publish, ratio_with_encoding, training_in_turn, verdict
from jobs.runtime.commandline import run
from mmcore.data.columns import Column
from mmcore.data.pixels import to_network
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen.text import PromptTokenizer, TextInputs
from mmcore.generators import vqvae
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion_rows import GenerationRows, scaling_factor
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.latent_diffusion import VARIANTS, LatentDiffusionRecipe
from mmcore.generators.prompt_rows import PromptEmbeddings, PromptIds, Prompts
from mmcore.seeding import derive_seed, generator, permutation

TARGET = 5.0
Variant = Literal["best", "report"]

# The text encoder of openai/clip-vit-base-patch16.
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
}
TINY_CLIP_TEXT: dict[str, Any] = CLIP_TEXT | {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 98,
    "eos_token_id": 99,
}
# Vocabulary size of `best` for its training captions (five of each of Flickr8k's first 7,000 images), including the
# four special tokens.
NUM_WORDS = 4883
# Images or captions per encoding batch.
_ENCODE_BATCH = 16


@dataclass(frozen=True)
class LDMBench:
    """Settings of the benchmark."""

    variants: tuple[Variant, ...] = ("best", "report")
    """Variants whose U-Nets are measured. The target is for `best`."""
    pairs: int = 6
    """Number of pairs: a block of our steps and a block of the report's."""
    our_steps: int = 2
    """Steps per block of our loop."""
    report_steps: int = 1
    """Steps per block of the report's loop."""
    warmup_steps: int = 1
    """Steps of each loop before the first block."""
    batch: int = 16
    """Images per step of both loops, with the U-Net of `best`."""
    large_batch: int = 4
    """Images per step of both loops, with the U-Net of `report`."""
    num_images: int = 32
    """Images to draw from. They do not affect the time."""
    own_latents: bool = False
    """Train our loop on latents of the variant's own VQ-VAE. The report's loop keeps those of 256 pixels."""
    smoke: bool = False
    """Use tiny sizes, to test the script. The figures then mean nothing."""

    def batch_of(self, variant: Variant) -> int:
        return self.large_batch if variant == "report" else self.batch

    def recipe(self, variant: Variant) -> LatentDiffusionRecipe:
        recipe, tiny = VARIANTS[variant], VARIANTS["smoke"]
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch_size=self.batch_of(variant)))
        if not self.smoke:
            return recipe
        return dataclasses.replace(recipe, unet=tiny.unet, text=tiny.text if recipe.text.is_scratch else recipe.text)

    def vqvae(self, variant: Variant) -> vqvae.VQVAERecipe:
        recipe = vqvae.VARIANTS[variant]
        return dataclasses.replace(vqvae.VARIANTS["smoke"], image_size=recipe.image_size // 8) if self.smoke else recipe


class FrozenVQVAE:
    """Pixels -> latents, as for the cache of latents, with random weights."""

    def __init__(self, recipe: vqvae.VQVAERecipe, device: str) -> None:
        torch.manual_seed(recipe.train.seed)
        self.model, self.device = recipe.build().eval().requires_grad_(False).to(device), device

    # no_grad, as autograd does not accept tensors made in inference mode.
    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> (B, C, h, w)"""
        return self.model.encode(to_network(torch.from_numpy(pixels).to(self.device)))


class FrozenText:
    """Token ids -> hidden states of CLIP, with random weights."""

    def __init__(self, sizes: dict[str, Any], device: str) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        self.model: Any = CLIPTextModel(CLIPTextConfig(**sizes)).eval().requires_grad_(False).to(device)
        self.sizes, self.device = sizes, device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, E)"""
        return self.model(input_ids=input_ids.to(self.device)).last_hidden_state


@dataclass(frozen=True)
class Data:
    """Images in memory with five captions each, and the outputs of the frozen encoders like in the caches."""

    pixels: np.ndarray  # uint8 (N, P, P, 3)
    input_ids: Tensor  # int64 (N, K, T), for CLIP
    latents: np.ndarray  # fp16 (N, C, h, w), memory-mapped
    hidden: np.ndarray  # fp16 (N, K, T, E), memory-mapped
    latents_seconds: float  # per image
    hidden_seconds: float  # per caption


def encode_once(encoder: Callable[[Any], Tensor], values: Any, file: Path) -> tuple[np.ndarray, float]:
    """The outputs of `encoder` for `values` as a memory-mapped file, and the seconds per value."""
    encoder(values[:_ENCODE_BATCH])  # warm-up
    started = clock()
    encoded = inputs.encode(encoder, values, _ENCODE_BATCH)
    seconds = (clock() - started) / len(values)
    np.save(file, encoded)
    return np.load(file, mmap_mode="r"), seconds


def load_data(bench: LDMBench, vqvae: FrozenVQVAE, text: FrozenText, folder: Path) -> Data:
    shape = (bench.num_images, inputs.CAPTIONS_PER_IMAGE, text.sizes["max_position_embeddings"])
    input_ids = torch.randint(text.sizes["vocab_size"], shape, generator=generator(0, "ids"))
    hidden, hidden_seconds = encode_once(text, input_ids.flatten(0, 1), folder / "hidden.npy")
    pixels = inputs.synthetic_pixels(bench.num_images, vqvae.model.recipe.image_size, seed=0)
    latents, latents_seconds = encode_once(vqvae, pixels, folder / "latents.npy")
    hidden = hidden.reshape(*shape, hidden.shape[-1])
    return Data(pixels, input_ids, latents, hidden, latents_seconds, hidden_seconds)


def own_latents(bench: LDMBench, variant: Variant, data: Data, device: str, folder: Path) -> Data:
    """`data` with the latents of the variant's own VQ-VAE and image size."""
    vqvae = FrozenVQVAE(bench.vqvae(variant), device)
    pixels = inputs.synthetic_pixels(bench.num_images, vqvae.model.recipe.image_size, seed=0)
    latents, seconds = encode_once(vqvae, pixels, folder / f"latents-{variant}.npy")
    return dataclasses.replace(data, latents=latents, latents_seconds=seconds)


def our_training(recipe: LatentDiffusionRecipe, data: Data) -> tuple[Denoiser, GenerationRows]:
    """The network and the rows of jobs/train_ldm.py. The last image is for validation."""
    num_images, seed = len(data.latents), recipe.train.seed
    vocabulary = inputs.synthetic_vocabulary(NUM_WORDS, lowercase=True)
    captions = inputs.synthetic_captions(vocabulary, num_images, seed)
    table = inputs.caption_table(captions, num_validation=1)
    column = Column(tuple(table.image_ids), data.latents)
    prompts: Prompts
    if recipe.text.is_scratch:
        # Each word twice, as words that occur once are left out.
        tokenizer = PromptTokenizer.of_words(vocabulary.words * 2, recipe.text.max_tokens)
        prompts, text_inputs = PromptIds(captions, tokenizer), tokenizer.inputs()
    else:
        hidden = Column(column.image_ids, data.hidden)
        prompts = PromptEmbeddings(hidden, np.zeros_like(data.hidden[0, 0]), table.image_ids)
        text_inputs = TextInputs(width=data.hidden.shape[-1])
    rows = GenerationRows(
        table,
        # The mirrored view is the same array, as it takes the same time.
        [column] * (2 if recipe.flip else 1),
        prompts,
        captions_per_image=recipe.captions_per_image,
        drop_text=recipe.drop_text,
        flip=recipe.flip,
        noise=recipe.noise,
        scaling_factor=scaling_factor(data.latents),
        seed=seed,
    )
    torch.manual_seed(derive_seed(seed, "weights"))
    return recipe.build(DiffusionFacts(text_inputs, data.latents.shape[1:])), rows


class ReportTraining:
    """The report's loop: each step runs both frozen encoders and updates with PyTorch's default Adam.

    It drops no captions, as that takes no time.
    """

    def __init__(
        self, recipe: LatentDiffusionRecipe, data: Data, vqvae: FrozenVQVAE, text: FrozenText, unet: Any
    ) -> None:
        """`unet`: a copy for this loop."""
        self.data, self.vqvae, self.text, self.device = data, vqvae, text, vqvae.device
        self.noise, self.batch, self.step = recipe.noise, recipe.train.batch_size, 0
        self.scaling_factor = scaling_factor(data.latents)
        widths = data.hidden.shape[-1], unet.config.cross_attention_dim
        projection = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)
        self.model = nn.ModuleDict({"unet": unet, "projection": projection}).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.train.lr)

    def predict(self, pixels: np.ndarray, input_ids: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The U-Net's prediction for noisy images and their captions, (B, C, h, w)."""
        x_0 = self.vqvae(pixels) * self.scaling_factor
        context = self.model["projection"](self.text(input_ids))
        return self.model["unet"](self.noise.add_noise(x_0, noise, timesteps), timesteps, context).sample

    def images_per_s(self, num_steps: int) -> float:
        num_images, num_captions, _ = self.data.input_ids.shape
        started = clock()
        for _ in range(num_steps):
            rows = permutation(num_images, 0, self.step)[: self.batch]
            input_ids = self.data.input_ids[torch.from_numpy(rows), torch.randint(num_captions, (self.batch,))]
            noise = torch.randn(self.batch, *self.latent_shape, device=self.device)
            timesteps = torch.randint(self.noise.num_timesteps, (self.batch,), device=self.device)
            loss = F.mse_loss(self.predict(self.data.pixels[rows], input_ids, noise, timesteps), noise)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
            self.step += 1
        return num_steps * self.batch / (clock() - started)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.vqvae.model.recipe.latent_shape


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure_variant(
    bench: LDMBench, variant: Variant, data: Data, vqvae: FrozenVQVAE, text: FrozenText, folder: Path
) -> dict[str, Any]:
    """Measure both loops with the U-Net of `variant`."""
    recipe = bench.recipe(variant)
    ours = own_latents(bench, variant, data, vqvae.device, folder) if bench.own_latents else data
    model, rows = our_training(recipe, ours)
    report = ReportTraining(recipe, data, vqvae, text, copy.deepcopy(model.unet))
    report.images_per_s(bench.warmup_steps)
    figures = training_in_turn(
        variant,
        "images/s",
        (model, rows, recipe.train),
        lambda: report.images_per_s(bench.report_steps),
        pairs=bench.pairs,
        our_steps=bench.our_steps,
        warmup_steps=bench.warmup_steps,
        items_per_step=recipe.train.batch_size,
    )
    encode_seconds = (2 if recipe.flip else 1) * ours.latents_seconds
    if not recipe.text.is_scratch:
        encode_seconds += recipe.captions_per_image * ours.hidden_seconds
    return figures | {
        "ratio_with_encoding": ratio_with_encoding(figures, encode_seconds / recipe.train.num_epochs),
        "encoded_images_per_s": round(1 / ours.latents_seconds, 2),
        "encoded_captions_per_s": round(1 / ours.hidden_seconds, 2),
        "latents": {"ours": ours.latents.shape[1:], "report": report.latent_shape},
        "parameters": {
            "unet": num_parameters(model.unet),
            "ours": num_parameters(model),
            "report": num_parameters(report.model),
        },
    }


def measure(bench: LDMBench) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vqvae = FrozenVQVAE(bench.vqvae("report"), device)
    text = FrozenText(TINY_CLIP_TEXT if bench.smoke else CLIP_TEXT, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = load_data(bench, vqvae, text, folder)
        figures: dict[str, Any] = {
            variant: measure_variant(bench, variant, data, vqvae, text, folder) for variant in bench.variants
        }
    if "best" not in figures or bench.own_latents:
        return figures
    return verdict("target", figures["best"]["ratio"]["median"] >= TARGET, TARGET, bench.smoke) | figures


def main() -> None:
    bench = read_settings(LDMBench, __doc__, "python jobs/bench/ldm_step.py")
    largest = max(bench.batch_of(variant) for variant in bench.variants)
    if bench.num_images <= largest:
        raise InputError(f"--num-images {bench.num_images}: more than the {largest} images of a step are needed")
    publish("train_ldm", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
