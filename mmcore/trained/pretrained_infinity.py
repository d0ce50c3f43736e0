"""Official checkpoints of Infinity: a Transformer, a tokenizer and a T5 -> prompts and seeds to images.

Han et al. 2024, https://arxiv.org/abs/2412.04431. Files: https://huggingface.co/FoundationVision/Infinity.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from mmcore.checkpoint import sha256_file, sha256_folder
from mmcore.device import free_memory
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder, read_config
from mmcore.frozen.text import FrozenTextEncoder
from mmcore.frozen_weights import store_for_autocast
from mmcore.generators.infinity_batches import InfinityImages, even_parts
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_scales import STRIDE, grids_of, grids_of_size
from mmcore.generators.infinity_weights import load_transformer, load_vae, transformer_settings, vae_settings
from mmcore.recipe import Identity

TEXT_ENCODER = "google/flan-t5-xl"
"""The text encoder of the official 2B and 8B."""
_MODEL, _VAE, _TEXT = "--model", "--vae", "--text-encoder"
# Prompts of a batch of the text encoder.
_NUM_TEXTS = 16


def open_infinity(
    model: str, vae: str, text_encoder: str = TEXT_ENCODER, *, ratio: float = 1.0, budget: str = "1M"
) -> "PretrainedInfinity":
    """The generator of official files. Reads the sizes and no weights. The result can be sent to another machine.

    Args:
        model: file of the Transformer, or folder of its parts with an index.
        vae: file of the tokenizer.
        text_encoder: Hugging Face text encoder by name or folder.
        ratio: height over width of an image by default.
        budget: pixels of an image by default: 0.06M, 0.25M, 0.60M or 1M.
    Raises InputError for files that are not official ones or do not belong together. Raises it also for a ratio or a
    budget that Infinity does not have.
    """
    return PretrainedInfinity(model, vae, text_encoder, ratio=ratio, budget=budget)


class PretrainedInfinity:
    """Official weights as a `Generator`.

    A size decides ratio and budget: each of the 15 ratios has four sizes. A prompt is padded to the longest length, so
    that its image does not depend on the prompts beside it.

    Between batch sizes, sums have another order. Bits then differ where the margin of their logits is as small as the
    rounding. Of 133,120 bits of a small model none did between batches of 8 and of 1. That was in fp32 on one thread of
    a CPU, by `python jobs/bench/infinity_batches.py --num-threads 1`.
    """

    device: torch.device
    dtype: torch.dtype

    def __init__(self, model: str, vae: str, text_encoder: str, *, ratio: float, budget: str) -> None:
        # Absolute, as `load` may run in another working directory.
        self.files = {_MODEL: str(Path(model).absolute()), _VAE: str(Path(vae).absolute())}
        self.text_encoder = absolute_folder(text_encoder)
        self.settings, tokenizer = transformer_settings(model, _MODEL), vae_settings(vae, _VAE)
        self.patch = STRIDE // tokenizer.stride
        bits = tokenizer.num_bits * self.patch**2
        if self.patch not in (1, 2) or bits != self.settings.num_bits:
            raise InputError(
                f"{_VAE} {vae!r}: {tokenizer.num_bits} bits at each {tokenizer.stride} pixels give {bits} bits at each "
                f"{STRIDE}, and {_MODEL} {model!r} has {self.settings.num_bits}; name the VAE of this model"
            )
        config = read_config(self.text_encoder, flag=_TEXT, what="text encoder")
        channels = getattr(config, "hidden_size", None)
        if channels != self.settings.text_channels:
            raise InputError(
                f"{_TEXT} {text_encoder!r}: gives {channels} channels, and {_MODEL} {model!r} reads "
                f"{self.settings.text_channels}; name the text encoder of this model, such as {TEXT_ENCODER}"
            )
        self._revision: str | None = getattr(config, "_commit_hash", None)
        height, width = grids_of(ratio, budget)[-1]
        self.size: tuple[int, int] = (height * STRIDE, width * STRIDE)
        self.max_tokens: int = self.settings.max_text_tokens
        self.decides_by_code = True
        self.options: InfinityOptions = InfinityOptions()

    def identity(self) -> Identity:
        """Paths and SHA-256 of the files, the latter read at the first call, and the revision of a name on the hub."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> Identity:
        names = {_MODEL: "model", _VAE: "vae"}
        found = {names[flag]: path for flag, path in self.files.items()}
        for flag, path in self.files.items():
            # A model of several parts is a folder.
            digest = sha256_folder if Path(path).is_dir() else sha256_file
            found[f"{names[flag]}_sha256"] = digest(Path(path))
        found["text_encoder"] = self.text_encoder
        if Path(self.text_encoder).is_dir():
            found["text_encoder_sha256"] = sha256_folder(Path(self.text_encoder))
        elif self._revision is not None:
            found["text_encoder_revision"] = self._revision
        return found

    def check(self, options: InfinityOptions, size: tuple[int, int]) -> None:
        options.check(self.settings.num_layers)
        grids_of_size(size)

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights and return self.

        With `dtype` bfloat16 or float16 the large weights are stored in it, and images are computed as
        `infinity_batches` says. The text encoder is then in fp16, and its last layers of each feed-forward in fp32, as
        in the official code. What memory is left then limits the batches.
        Raises InputError for weights that are missing or unknown.
        """
        self.device, self.dtype = torch.device(device), dtype
        model, vae = load_transformer(self.files[_MODEL], _MODEL), load_vae(self.files[_VAE], _VAE)
        self.encoder = FrozenTextEncoder(self.text_encoder, self.max_tokens)
        for each in (model, vae):
            each.eval().requires_grad_(False)
            if dtype != torch.float32:
                store_for_autocast(each, dtype)
            each.to(self.device)
        if dtype != torch.float32:
            self.encoder.model.half()
            for name, module in self.encoder.model.named_modules():
                if name.endswith(".wo"):
                    module.float()
        self.encoder.to(self.device)
        # A copy for `num_tokens`, which may run in another thread: a fast tokenizer stores the settings of each call.
        self._counter = copy.deepcopy(self.encoder.tokenize)
        self.images = InfinityImages(model, vae, free=free_memory(self.device), dtype=dtype, patch=self.patch)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self._counter.lengths(prompts)

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        return self._counter.unknown_words(prompts)

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
        """See `Generator.generate`. `on_step` counts grids, over all batches that the memory needs.

        All prompts are encoded first. Raises OptionError also for an image that the memory does not hold.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one seed per prompt")
        self.check(options, size or self.size)
        grids, finest = grids_of_size(size or self.size)
        parts = even_parts(len(prompts), _NUM_TEXTS)
        texts, masks = zip(*(self.encoder.with_mask([prompts[place] for place in part]) for part in parts), strict=True)
        text_BTC, mask_BT = torch.cat(texts)[: len(prompts)], torch.cat(masks)[: len(prompts)]
        return self.images(text_BTC, mask_BT, seeds, grids, finest, options, on_step).cpu().numpy()
