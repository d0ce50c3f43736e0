"""The inputs of a trained generator: prompts as inputs of its network, and the check of the image size."""

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
    """Prompts -> text inputs, by the frozen text encoder of a run or by its own tokenizer."""

    encoder: FrozenTextEncoder | None
    """None if the run trained its own text encoder."""
    tokenizer: PromptTokenizer
    """The tokenizer of the frozen text encoder, or the one stored with the run."""

    def __init__(self, text: TextSettings, text_encoder: str | None) -> None:
        """`text_encoder`: name or folder of the frozen text encoder, if it differs from the one in recipe.json.

        Raises InputError if it is given for a run without a frozen text encoder.
        """
        if text.is_scratch and text_encoder is not None:
            raise InputError(f"--text-encoder {text_encoder!r}: this run trained its own; leave the flag out")
        # Absolute, as `load` may run in another working directory.
        self.name = None if text.is_scratch else absolute_folder(text_encoder or text.text_encoder)
        self.max_tokens: int = text.max_tokens

    def load(self, assets: Storage, fingerprint: str, device: str) -> Self:
        """Read the text encoder or tokenizer and return self.

        Args:
            assets: the folder model/ of the run.
            fingerprint: the fingerprint of the text encoder that the run was trained on.
        Raises InputError if the text encoder has another fingerprint.
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
                    f"{assets}/recipe.json: {self.name!r} is not the text encoder of the training: its weights or "
                    "its tokenizer differ; name the right one with --text-encoder"
                )
        # A copy for `num_tokens`, which may run in another thread: a fast tokenizer stores the settings of each call.
        self._counter = copy.deepcopy(self.tokenizer)
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, including begin and end."""
        return self._counter.lengths(prompts)

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        """The words of each prompt that the tokenizer does not have."""
        return self._counter.unknown_words(prompts)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text inputs of the network. All prompts are padded to `max_tokens`, so no prompt affects another's result."""
        if self.encoder is not None:
            return {"encoder_hidden_states": self.encoder(prompts)}
        return {"input_ids": self.tokenizer(prompts)[0].to(self.device)}


def check_size(asked: tuple[int, int], own: tuple[int, int]) -> None:
    """Raise OptionError if the requested (height, width) `asked` is not the model's own."""
    if asked != own:
        raise OptionError("size", f"{asked[1]}x{asked[0]}: this model makes images of {own[1]}x{own[0]}")
