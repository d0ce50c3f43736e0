"""A trained autoregressive generator: prompts and seeds -> images."""

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch

from mmcore.data.pixels import to_pixels
from mmcore.frozen.text import NO_TEXT
from mmcore.generators.autoregressive import AutoregressiveRecipe, CodeTransformer
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.recipe import Identity
from mmcore.run_files import VQVAE_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_vqvae
from mmcore.trained.network import check_dtype, load_network
from mmcore.trained.prompts import PromptReader, check_size


class TrainedAutoregressive:
    """The saved weights of a finished run, with the frozen models that it was trained on.

    The default options are the recipe's `sample`.
    """

    model: CodeTransformer
    vqvae: TrainedVQVAE
    """Decodes codes to images."""
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self, run: Storage, file: RunFile[AutoregressiveRecipe, AutoregressiveFacts], text_encoder: str | None
    ) -> None:
        self.run, self.file, self.recipe, facts = run, file, file.recipe, file.facts
        self.text = PromptReader(self.recipe.text, text_encoder)
        self.size: tuple[int, int] = (facts.resolution, facts.resolution)
        self.max_tokens: int = self.text.max_tokens
        self.decides_by_code = True
        # Guidance needs a model that was also trained on the empty text.
        self.guides = self.recipe.drop_text > 0
        self.options: AutoregressiveOptions = self.recipe.sample

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check(self, options: AutoregressiveOptions, size: tuple[int, int]) -> None:
        options.check(self.guides)
        check_size(size, self.size)

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights and return self. With `dtype` bfloat16, images are computed under autocast.

        That is faster, but an image then depends on the batch size. Raises InputError if the weights, the text encoder
        or the VQ-VAE differ from those in recipe.json.
        """
        facts, assets = self.file.facts, self.run / "model"
        check_dtype(dtype)
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_network(self.run, self.file, self.device)
        fingerprint = facts.autoencoder_fingerprint
        self.vqvae = open_vqvae((assets / VQVAE_ASSET).uri, fingerprint=fingerprint).load(device)
        self.text.load(assets, facts.text_fingerprint, device)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.text.num_tokens(prompts)

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        return self.text.unknown_words(prompts)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: AutoregressiveOptions,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """See `Generator.generate`. `on_step` counts codes."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one seed per prompt")
        self.check(options, size or self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            null = self.text([options.negative_prompt or NO_TEXT] * len(prompts)) if options.guides else None
            codes = self.model.generate(self.text(prompts), null, seeds, options, on_step=on_step)
            return to_pixels(self.vqvae.decode_codes(codes)).cpu().numpy()
