"""Text embeddings for the cross-attention of a generator.

The hidden states of a frozen text encoder are computed once for all captions and cached. A small encoder that is
trained jointly takes token ids.

Shapes: B prompts, T tokens, E channels of the frozen encoder's hidden states, D channels of the text embeddings.
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
    """Text encoder, tokenizer and projection."""

    text_encoder: str = SCRATCH
    """Frozen Hugging Face text encoder (BERT, CLIP, T5, ...) by name or folder. `scratch` trains a small one."""
    tokenizer: str = WORDS
    """Tokenizer of `scratch`: a Hugging Face tokenizer by name or folder. `words` builds a vocabulary from the training
    captions. A frozen encoder has its own tokenizer."""
    max_tokens: int = 77
    """Tokens per prompt, including begin and end. Shorter prompts are padded, longer ones truncated."""
    text_width: int = 128
    """Width of `scratch`."""
    text_layers: int = 2
    """Layers of `scratch`."""
    text_heads: int = 4
    """Attention heads of `scratch`."""
    projection_width: int | None = None
    """Width of the trained projection of a frozen encoder's hidden states (Linear, GELU, LayerNorm). None has no
    projection."""

    def check(self) -> None:
        """Raise InputError for invalid settings. The recipe calls this: tyro would reformat an error of a nested
        field."""
        check_at_least_one(self, "text_width", "text_layers", "text_heads")
        if self.max_tokens < 2:
            raise InputError(f"max_tokens {self.max_tokens} must be at least 2 (begin, end); change --max-tokens")
        if self.text_width % self.text_heads:
            raise InputError(
                f"text_heads {self.text_heads} does not divide text_width {self.text_width}; change --text-heads"
            )
        if self.is_scratch and self.projection_width is not None:
            raise InputError(
                f"projection_width {self.projection_width} is for a frozen encoder, but text_encoder is {SCRATCH!r}; "
                "give --projection-width None, and set the width with --text-width"
            )

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, each with the flag that would make it effective."""
        if self.is_scratch:
            return {}
        return dict.fromkeys(("tokenizer", "text_width", "text_layers", "text_heads"), f"--text-encoder {SCRATCH}")

    @property
    def is_scratch(self) -> bool:
        return self.text_encoder == SCRATCH


class TextContext(nn.Module):
    """The trainable text encoder, or the projection of a frozen encoder's hidden states."""

    def __init__(self, settings: TextSettings, inputs: TextInputs) -> None:
        super().__init__()
        self.encoder: Any = None
        self.bos_id, self.eos_id = inputs.bos_id, inputs.eos_id
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
            # A standard deviation of 1, as PyTorch and T5 use. With CLIP's 0.02 position embeddings dominate. A word is
            # as similar to itself at another position (cosine 0.42) as to another word at its position (0.44). With 1
            # the cosines are 0.94 and 0.06. On Shapes with one object and `timestep_shift` 8, words for places had no
            # effect after 15,000 images with 0.02. With 1 they had an effect after 9,500.
            nn.init.normal_(self.encoder.get_input_embeddings().weight)
            if not torch.cuda.is_available():
                # The backward pass of PyTorch's fused attention is slow on a CPU.
                self.encoder.set_attn_implementation("eager")
            self.width = settings.text_width
            return
        assert inputs.width is not None, "a frozen text encoder gives hidden states"
        self.width = settings.projection_width or inputs.width
        if settings.projection_width is not None:
            linear = nn.Linear(inputs.width, settings.projection_width)
            self.projection = nn.Sequential(linear, nn.GELU(), nn.LayerNorm(settings.projection_width))

    def mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Mask of the tokens that are not padding, bool (B, T); None for hidden states of a frozen encoder."""
        if self.encoder is None:
            return None
        assert self.eos_id is not None, "a text encoder from scratch takes ids with an end token"
        # A tokenizer may pad with its end token. Padding is everything after the first one.
        ends_BT = batch["input_ids"].eq(self.eos_id)
        if self.bos_id == self.eos_id:
            # OPT's tokenizer begins with the same mark.
            ends_BT[:, 0] = False
        return ends_BT.cumsum(1) - ends_BT.long() == 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`input_ids` int64 (B, T) or `encoder_hidden_states` (B, T, E) of `batch` -> text embeddings (B, T, D)."""
        if self.encoder is None:
            return self.projection(batch["encoder_hidden_states"])
        # No mask is needed, and pipelines of diffusers give none: padding comes last and attention is causal.
        return self.encoder(input_ids=batch["input_ids"]).last_hidden_state
