"""A trained Infinity: prompts and seeds -> images."""

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch

from mmcore.data.pixels import to_pixels
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_recipe import InfinityGenerator, InfinityRecipe
from mmcore.recipe import Identity
from mmcore.run_files import TOKENIZER_OF_BITS_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedInfinityTokenizer, open_tokenizer
from mmcore.trained.network import check_dtype, load_network
from mmcore.trained.prompts import PromptReader, check_size


class TrainedInfinity:
    """The saved weights of a finished run, with the frozen models that it was trained on.

    The default options are the recipe's `sample`.
    """

    model: InfinityGenerator
    tokenizer: TrainedInfinityTokenizer
    """Decodes latents to images."""
    device: torch.device
    dtype: torch.dtype

    def __init__(self, run: Storage, file: RunFile[InfinityRecipe, InfinityFacts], text_encoder: str | None) -> None:
        self.run, self.file, self.recipe, facts = run, file, file.recipe, file.facts
        self.text = PromptReader(self.recipe.text, text_encoder)
        self.size: tuple[int, int] = (facts.resolution, facts.resolution)
        self.max_tokens: int = self.text.max_tokens
        self.decides_by_code = True
        # Guidance needs a model that was also trained without text.
        self.guides = self.recipe.drop_text > 0
        self.options: InfinityOptions = self.recipe.sample

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check(self, options: InfinityOptions, size: tuple[int, int]) -> None:
        options.check(self.recipe.transformer.num_layers, self.guides)
        check_size(size, self.size)

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights and return self. With `dtype` bfloat16, images are computed under autocast.

        That is faster, but an image then depends on the batch size. Raises InputError if the weights, the text encoder
        or the tokenizer differ from those in recipe.json.
        """
        facts, assets = self.file.facts, self.run / "model"
        check_dtype(dtype)
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_network(self.run, self.file, self.device)
        fingerprint = facts.autoencoder_fingerprint
        self.tokenizer = open_tokenizer((assets / TOKENIZER_OF_BITS_ASSET).uri, fingerprint=fingerprint).load(device)
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
        options: InfinityOptions,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """See `Generator.generate`. `on_step` counts grids."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one seed per prompt")
        self.check(options, size or self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            latents = self.model.generate(self.text(prompts), seeds, options, on_step=on_step)
            return to_pixels(self.tokenizer.decode(latents)).cpu().numpy()
