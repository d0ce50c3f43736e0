"""Prompts to what a generator attends to: a frozen text encoder, or a small one that is trained along.

A frozen encoder's hidden states are computed once for all captions and cached; a trained one takes token ids.

Shapes: B prompts, T tokens, E channels of the encoder's hidden states, D channels that the network attends to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.errors import InputError, check_at_least_one
from mmcore.frozen.text import SCRATCH, TextInputs
from mmcore.frozen.tokenizers import WORDS


@dataclass(frozen=True)
class TextSettings:
    """How prompts reach the network."""

    text_encoder: str = SCRATCH
    """Hugging Face text encoder (BERT, CLIP, T5, ...) by name or folder, frozen; `scratch` trains a small one along."""
    tokenizer: str = WORDS
    """Tokenizer of `scratch`: a Hugging Face tokenizer by name or folder, or `words`, made of the training captions
    (a frozen encoder brings its own)."""
    max_tokens: int = 77
    """Tokens of a prompt with begin and end, padded to as many; longer ones lose their tail."""
    text_width: int = 128
    """Width of `scratch`."""
    text_layers: int = 2
    """Layers of `scratch`."""
    text_heads: int = 4
    """Attention heads of `scratch`."""
    projection_width: int | None = None
    """Width that a frozen encoder's hidden states are projected to (Linear, GELU, LayerNorm, trained along); None
    hands them on as they are."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be. A recipe calls it: of a nested field the command line's reader
        would show the error in a form of its own."""
        check_at_least_one(self, "text_width", "text_layers", "text_heads")
        if self.max_tokens < 2:
            raise InputError(f"max_tokens {self.max_tokens} must be at least 2 (begin, end); mend it with --max-tokens")
        if self.text_width % self.text_heads:
            raise InputError(
                f"text_heads {self.text_heads} does not divide text_width {self.text_width}; mend it with --text-heads"
            )
        if self.is_scratch and self.projection_width is not None:
            raise InputError(
                f"projection_width {self.projection_width} is of a frozen encoder, and text_encoder is {SCRATCH!r}; "
                "choose the width with --text-width, and give --projection-width None"
            )

    def without_effect(self) -> dict[str, str]:
        """Fields that these settings leave without effect, each with the flag that would give it one."""
        if self.is_scratch:
            return {}
        return dict.fromkeys(("tokenizer", "text_width", "text_layers", "text_heads"), f"--text-encoder {SCRATCH}")

    @property
    def is_scratch(self) -> bool:
        return self.text_encoder == SCRATCH


class TextContext(nn.Module):
    """The trainable part of the text's way into the network."""

    def __init__(self, settings: TextSettings, inputs: TextInputs) -> None:
        super().__init__()
        self.encoder: Any = None
        self.eos_id = inputs.eos_id
        self.projection: nn.Module = nn.Identity()
        if settings.is_scratch:
            from transformers import CLIPTextConfig, CLIPTextModel

            assert inputs.vocabulary_size is not None, "a text encoder from scratch takes token ids"
            config = CLIPTextConfig(
                vocab_size=inputs.vocabulary_size,
                hidden_size=settings.text_width,
                intermediate_size=4 * settings.text_width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=settings.text_heads,
                max_position_embeddings=settings.max_tokens,
                pad_token_id=inputs.pad_id,
                bos_token_id=inputs.bos_id,
                eos_token_id=inputs.eos_id,
            )
            self.encoder = CLIPTextModel(config)
            # PyTorch's own start, and T5's. With CLIP's (0.02) a word is no more like itself in another place than like
            # another word in its own (cosines of 0.42 and 0.44; so 0.94 and 0.06): on Shapes of one object, with
            # `timestep_shift` 8, words for places had no influence after 15,000 images, and have it after 9,500 so.
            nn.init.normal_(self.encoder.get_input_embeddings().weight)
            if not torch.cuda.is_available():
                # The backward pass of PyTorch's fused attention is slow on a CPU.
                self.encoder.set_attn_implementation("eager")
            self.width = settings.text_width
            return
        assert inputs.width is not None, "a frozen text encoder hands on hidden states"
        self.width = settings.projection_width or inputs.width
        if settings.projection_width is not None:
            linear = nn.Linear(inputs.width, settings.projection_width)
            self.projection = nn.Sequential(linear, nn.GELU(), nn.LayerNorm(settings.projection_width))

    def mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The tokens of `forward` that are no padding, bool (B, T); None where hidden states come without marks."""
        if self.encoder is None:
            return None
        assert self.eos_id is not None, "a text encoder from scratch takes ids with an end mark"
        # A tokenizer may pad with its end mark: what counts is whether one has come before.
        ends_BT = batch["input_ids"].eq(self.eos_id)
        return ends_BT.cumsum(1) - ends_BT.long() == 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`input_ids` int64 (B, T), or `encoder_hidden_states` (B, T, E) -> (B, T, D)."""
        if self.encoder is None:
            return self.projection(batch["encoder_hidden_states"])
        # Without a mask, as pipelines call it: padding follows the end mark, and the encoder looks back only.
        return self.encoder(input_ids=batch["input_ids"]).last_hidden_state
