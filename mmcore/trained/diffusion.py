"""A trained diffusion: prompts and seeds -> images."""

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from mmcore.frozen.text import NO_TEXT
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.diffusion_recipe import DiffusionRecipe
from mmcore.generators.facts import DiffusionFacts
from mmcore.run_files import VQVAE_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_vqvae
from mmcore.trained.generator_run import GeneratorRun


class TrainedDiffusion(GeneratorRun):
    """A U-Net on pixels, or on the latents of a VQ-VAE.

    The weights are the last, or the best by validation loss if `keep` is `best`.
    """

    model: Denoiser
    vqvae: TrainedVQVAE | None = None
    """Decodes latents to images; None for a pixel diffusion."""

    def __init__(self, run: Storage, file: RunFile[DiffusionRecipe, DiffusionFacts], text_encoder: str | None) -> None:
        super().__init__(run, file, text_encoder)
        self.scaling_factor: float = file.facts.scaling_factor
        self.decides_by_code = file.facts.vqvae_fingerprint is not None
        defaults = DiffusionOptions()
        self.options = defaults if self.guides else dataclasses.replace(defaults, guidance=1.0)

    def check_options(self, options: DiffusionOptions) -> None:
        options.check(self.recipe.noise.num_timesteps, self.guides)

    def load_autoencoder(self, assets: Storage) -> None:
        if fingerprint := self.file.facts.vqvae_fingerprint:
            self.vqvae = open_vqvae((assets / VQVAE_ASSET).uri, fingerprint=fingerprint).load(str(self.device))

    def images(self, x_0: Tensor) -> Tensor:
        """x_0 of the network, (B, C, H, W) -> images in [-1, 1], (B, 3, P, P)."""
        return x_0 if self.vqvae is None else self.vqvae.decode(x_0 / self.scaling_factor)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: DiffusionOptions,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
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
        return self.images(x_0)
