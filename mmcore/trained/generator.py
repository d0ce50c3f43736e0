"""Opens a trained text-to-image generator: prompts and seeds in, images out."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmcore import checkpoint
from mmcore.catalogue import read_model_file
from mmcore.data.pixels import to_pixels
from mmcore.errors import InputError, OptionError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.text import NO_TEXT, FrozenTextEncoder, PromptTokenizer
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.diffusion_recipe import DiffusionRecipe
from mmcore.generators.facts import DiffusionFacts
from mmcore.recipe import Generator, Identity
from mmcore.run_files import TOKENIZER_ASSET, RunFile, read_weights
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder

# Folder under model/ of the VQ-VAE whose latents a run was trained on.
VQVAE_ASSET = "vqvae"


def open_generator(source: str, *, text_encoder: str | None = None) -> Generator:
    """The generator of a finished run. Reads facts alone; what it returns can be sent to another machine.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        text_encoder: where the frozen text encoder lies on this machine, if not where the run had it.
    Raises InputError where `source` is no finished run of a generator.
    """
    run = Storage(source)
    file = read_model_file(run, "generator")
    return BY_FACTS[type(file.facts)](run, file, text_encoder)


class TrainedDiffusion:
    """The weights that a finished run keeps (these recipes' last, or by `keep` those of the best validation), with the
    frozen parts that it was trained on."""

    model: Denoiser
    vqvae: TrainedVQVAE | None
    """Makes images of the latents; None where the network makes the image itself."""
    text_encoder: FrozenTextEncoder | None
    tokenizer: PromptTokenizer
    """The frozen text encoder's, or that of the run's own."""
    device: torch.device
    dtype: torch.dtype

    def __init__(self, run: Storage, file: RunFile[DiffusionRecipe, DiffusionFacts], text_encoder: str | None) -> None:
        self.run, self.file, self.recipe, facts = run, file, file.recipe, file.facts
        text = self.recipe.text
        if text.is_scratch and text_encoder is not None:
            raise InputError(f"--text-encoder {text_encoder!r}: this run's was trained with it; leave the flag out")
        # Absolute, as whoever loads it may have another working directory.
        self.text_name = None if text.is_scratch else absolute_folder(text_encoder or text.text_encoder)
        self.size: tuple[int, int] = (facts.resolution, facts.resolution)
        self.scaling_factor: float = facts.scaling_factor
        self.max_tokens: int = text.max_tokens
        self.decides_by_code = facts.vqvae_fingerprint is not None
        # Without a prompt that was missing in training there is nothing that guidance could lead away from.
        self.guides = self.recipe.drop_text > 0
        defaults = DiffusionOptions()
        self.options = defaults if self.guides else dataclasses.replace(defaults, guidance=1.0)

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check(self, options: DiffusionOptions, size: tuple[int, int]) -> None:
        options.check(self.recipe.noise.num_timesteps, self.guides)
        if size != self.size:
            (height, width), (own_height, own_width) = size, self.size
            raise OptionError("size", f"{width}x{height}: this model makes images of {own_width}x{own_height}")

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """`dtype`: bfloat16 computes under autocast, faster and with images that depend on the size of the batch.

        Raises InputError where the weights, the text encoder or the VQ-VAE are others than the facts name.
        """
        facts = self.file.facts
        self.device, self.dtype = torch.device(device), dtype
        self.model = self.recipe.build(facts)
        checkpoint.load_trainable(self.model, read_weights(self.run, self.file.weights_sha256), str(self.run))
        self.model.eval().requires_grad_(False).to(self.device)
        assets = self.run / "model"
        self.vqvae = None
        if fingerprint := facts.vqvae_fingerprint:
            self.vqvae = open_autoencoder((assets / VQVAE_ASSET).uri, fingerprint=fingerprint).load(device)
        if self.text_name is None:
            self.text_encoder = None
            self.tokenizer = PromptTokenizer.read(assets / TOKENIZER_ASSET, self.max_tokens)
        else:
            self.text_encoder = FrozenTextEncoder(self.text_name, self.max_tokens, device)
            self.tokenizer = self.text_encoder.tokenize
            if self.text_encoder.fingerprint() != facts.text_fingerprint:
                raise InputError(
                    f"{assets}/recipe.json: trained on another text encoder than {self.text_encoder.name!r}: its "
                    "weights or its tokenizer differ; name the right one with --text-encoder"
                )
        # A fast tokenizer keeps the settings of its last call, and prompts are counted beside the work.
        self._counter = copy.deepcopy(self.tokenizer.tokenizer)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._counter(list(prompts), truncation=False)["input_ids"]]

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as the network takes them."""
        if self.text_encoder is not None:
            return {"encoder_hidden_states": self.text_encoder(prompts)}
        return {"input_ids": self.tokenizer(prompts)[0].to(self.device)}

    def images(self, x_0: Tensor) -> Tensor:
        """x_0 as the network makes it, (B, C, H, W) -> images in [-1, 1], (B, 3, P, P)."""
        return x_0 if self.vqvae is None else self.vqvae.decode(x_0 / self.scaling_factor)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: DiffusionOptions,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: each image has one of both")
        self.check(options, size or self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x_0 = self.model.generate(
                self.encode(prompts),
                self.encode([options.negative_prompt or NO_TEXT] * len(prompts)),
                seeds,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                sampler=options.sampler,
                clip=self.vqvae is None,
                on_step=on_step,
            )
            return to_pixels(self.images(x_0)).cpu().numpy()


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Generator]] = {
    DiffusionFacts: TrainedDiffusion,
}
"""What opens a run, by the facts type of its recipe in the catalogue."""
