"""What the generators of finished runs share: the run, its text, its precision, and the frame of a generation."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmcore.data.pixels import to_pixels
from mmcore.recipe import Identity
from mmcore.run_files import RunFile
from mmcore.storage import Storage
from mmcore.trained.network import check_dtype, load_network
from mmcore.trained.prompts import PromptReader, check_size


class GeneratorRun:
    """The saved weights of a finished run, with the frozen models that it was trained on."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    options: Any
    decides_by_code = True

    def __init__(self, run: Storage, file: RunFile[Any, Any], text_encoder: str | None) -> None:
        self.run, self.file, self.recipe, facts = run, file, file.recipe, file.facts
        self.text = PromptReader(self.recipe.text, text_encoder)
        self.size: tuple[int, int] = (facts.resolution, facts.resolution)
        self.max_tokens: int = self.text.max_tokens
        # Guidance needs a model that was also trained without text.
        self.guides = self.recipe.drop_text > 0

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check_options(self, options: Any) -> None:
        """Raise OptionError for options that the run does not support."""
        raise NotImplementedError

    def check(self, options: Any, size: tuple[int, int]) -> None:
        self.check_options(options)
        check_size(size, self.size)

    def load_autoencoder(self, assets: Storage) -> None:
        """Read the frozen autoencoder from the folder model/ of the run."""
        raise NotImplementedError

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights and return self. With `dtype` bfloat16, images are computed under autocast.

        That is faster, but an image then depends on the batch size. Raises InputError if the weights, the text encoder
        or the autoencoder differ from those in recipe.json.
        """
        check_dtype(dtype)
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_network(self.run, self.file, self.device)
        assets = self.run / "model"
        self.load_autoencoder(assets)
        self.text.load(assets, self.file.facts.text_fingerprint, device)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.text.num_tokens(prompts)

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        return self.text.unknown_words(prompts)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: Any,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Images (B, 3, P, P), about in [-1, 1]."""
        raise NotImplementedError

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: Any,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """See `Generator.generate`."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one seed per prompt")
        self.check(options, size or self.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return to_pixels(self.draw(prompts, seeds, options, on_step)).cpu().numpy()
