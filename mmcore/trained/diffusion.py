"""A trained diffusion: prompts and seeds -> images."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mmcore.data.pixels import to_pixels
from mmcore.frozen.text import NO_TEXT
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.diffusion_recipe import DiffusionRecipe
from mmcore.generators.facts import DiffusionFacts
from mmcore.recipe import Identity
from mmcore.run_files import VQVAE_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_vqvae
from mmcore.trained.network import check_dtype, load_network
from mmcore.trained.prompts import PromptReader, check_size


class TrainedDiffusion:
    """The saved weights of a finished run with its frozen models.

    The weights are the last, or the best by validation loss if `keep` is `best`.
    """

    model: Denoiser
    vqvae: TrainedVQVAE | None
    """Decodes latents to images; None for a pixel diffusion."""
    device: torch.device
    dtype: torch.dtype

    def __init__(self, run: Storage, file: RunFile[DiffusionRecipe, DiffusionFacts], text_encoder: str | None) -> None:
        self.run, self.file, self.recipe, facts = run, file, file.recipe, file.facts
        self.text = PromptReader(self.recipe.text, text_encoder)
        self.size: tuple[int, int] = (facts.resolution, facts.resolution)
        self.scaling_factor: float = facts.scaling_factor
        self.max_tokens: int = self.text.max_tokens
        self.decides_by_code = facts.vqvae_fingerprint is not None
        # Guidance needs a model that was also trained on the empty text.
        self.guides = self.recipe.drop_text > 0
        defaults = DiffusionOptions()
        self.options = defaults if self.guides else dataclasses.replace(defaults, guidance=1.0)

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check(self, options: DiffusionOptions, size: tuple[int, int]) -> None:
        options.check(self.recipe.noise.num_timesteps, self.guides)
        check_size(size, self.size)

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights and return self. With `dtype` bfloat16, images are computed under autocast.

        That is faster, but an image then depends on the batch size. Raises InputError if the weights, the text encoder
        or the VQ-VAE differ from those in recipe.json.
        """
        facts = self.file.facts
        check_dtype(dtype)
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_network(self.run, self.file, self.device)
        assets = self.run / "model"
        self.vqvae = None
        if fingerprint := facts.vqvae_fingerprint:
            self.vqvae = open_vqvae((assets / VQVAE_ASSET).uri, fingerprint=fingerprint).load(device)
        self.text.load(assets, facts.text_fingerprint, device)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.text.num_tokens(prompts)

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        return self.text.unknown_words(prompts)

    def images(self, x_0: Tensor) -> Tensor:
        """x_0 of the network, (B, C, H, W) -> images in [-1, 1], (B, 3, P, P)."""
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
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one seed per prompt")
        self.check(options, size or self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            null = self.text([options.negative_prompt or NO_TEXT] * len(prompts)) if options.guidance != 1 else None
            x_0 = self.model.generate(
                self.text(prompts),
                null,
                seeds,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                sampler=options.sampler,
                clip=self.vqvae is None,
                on_step=on_step,
            )
            return to_pixels(self.images(x_0)).cpu().numpy()
