"""What a trained generator is asked for: prompts, as its network is fed with them, and a size."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from mmcore.errors import InputError, OptionError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.text import FrozenTextEncoder, PromptTokenizer
from mmcore.generators.text_context import TextSettings
from mmcore.run_files import TOKENIZER_ASSET
from mmcore.storage import Storage


class PromptReader:
    """The frozen text encoder that a run was trained on, or the tokenizer of the run's own."""

    encoder: FrozenTextEncoder | None
    """None where the network has its own."""
    tokenizer: PromptTokenizer
    """The frozen text encoder's, or that of the run's own."""

    def __init__(self, text: TextSettings, text_encoder: str | None) -> None:
        """`text_encoder`: where the frozen one lies on this machine, if not where the run had it.

        Raises InputError for a run that has none.
        """
        if text.is_scratch and text_encoder is not None:
            raise InputError(f"--text-encoder {text_encoder!r}: this run's was trained with it; leave the flag out")
        # Absolute, as whoever loads it may have another working directory.
        self.name = None if text.is_scratch else absolute_folder(text_encoder or text.text_encoder)
        self.max_tokens: int = text.max_tokens

    def load(self, assets: Storage, fingerprint: str, device: str) -> Self:
        """Read the weights; returns itself.

        Args:
            assets: the folder model/ of the run.
            fingerprint: of the text encoder that the run was trained on.
        Raises InputError for another one.
        """
        self.device = torch.device(device)
        if self.name is None:
            self.encoder = None
            self.tokenizer = PromptTokenizer.read(assets / TOKENIZER_ASSET, self.max_tokens)
        else:
            self.encoder = FrozenTextEncoder(self.name, self.max_tokens, device)
            self.tokenizer = self.encoder.tokenize
            if self.encoder.fingerprint() != fingerprint:
                raise InputError(
                    f"{assets}/recipe.json: trained on another text encoder than {self.name!r}: its weights or its "
                    "tokenizer differ; name the right one with --text-encoder"
                )
        # A fast tokenizer keeps the settings of its last call, and prompts are counted beside the work.
        self._counter = copy.deepcopy(self.tokenizer)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, with begin and end, before any is cut."""
        return self._counter.lengths(prompts)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as the network takes them, all padded to `max_tokens`: no prompt changes another's sums."""
        if self.encoder is not None:
            return {"encoder_hidden_states": self.encoder(prompts)}
        return {"input_ids": self.tokenizer(prompts)[0].to(self.device)}


def check_size(asked: tuple[int, int], own: tuple[int, int]) -> None:
    """Raise OptionError for another (height, width) than the model's own."""
    if asked != own:
        raise OptionError("size", f"{asked[1]}x{asked[0]}: this model makes images of {own[1]}x{own[0]}")
