"""What every captioner is to its training and to what opens it: its recipe, and the facts of its runs.

Shapes: B images, L image tokens, E channels of the frozen encoder.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from mmcore.data.prepared import CaptionTable
from mmcore.recipe import Recipe
from mmcore.text import CaptionTokenizer, TokenIds, WordVocabulary


@dataclass(frozen=True)
class CaptionerFacts:
    """What a run of a captioner knows beside its settings."""

    token_ids: TokenIds
    """Of its tokenizer."""
    image_tokens: int
    """Tokens of an image by the frozen encoder (L); its pixels where the recipe trains its own."""
    encoder_width: int
    """Channels of such a token (E)."""
    encoder_fingerprint: str = ""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the images, and the mirrored ones where half are to be mirrored."""
    text_fingerprint: str = ""
    """Of the tokenizer."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the tokenizer's files, of which a finished run has a copy."""

    @staticmethod
    def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
        """Facts as JSON. Up to commit 34e6a7a they held the words themselves, under `vocabulary`."""
        if "vocabulary" not in fields:
            return fields
        words = WordVocabulary.from_json(fields["vocabulary"])
        fields = {name: value for name, value in fields.items() if name != "vocabulary"}
        own = {"token_ids": words.token_ids, "text_fingerprint": words.fingerprint(), "text": tokenizer_path(words)}
        return {**fields, **own}


def tokenizer_path(tokenizer: CaptionTokenizer) -> tuple[str, str]:
    """Where under STORAGE its files lie."""
    return "tokenizers", tokenizer.fingerprint()[:24]


class CaptionerRecipe(Recipe, Protocol):
    """What training, ``open_captioner`` and the service ask of the recipe of a captioner."""

    @property
    def captions_per_image(self) -> int: ...
    @property
    def encoder(self) -> str:
        """The frozen vision encoder by name or folder; `scratch` where the model is fed pixels."""

    @property
    def image_size(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def max_length(self) -> int:
        """Longest caption in tokens, with begin and end."""

    def build_tokenizer(self, table: CaptionTable) -> CaptionTokenizer: ...

    def build(self, facts: CaptionerFacts) -> nn.Module:
        """The trainable half.

        ``forward(batch)`` takes `images`, the frozen tokens (B, L, E) or with `scratch` uint8 pixels (B, P, P, 3),
        `input_ids` (B, C, T) and `lengths` (B, C) of C captions, and returns named losses. ``caption(images,
        options)`` returns the ids of a caption of each image, without begin and end; `options` are those of what opens
        it (by default ``SearchOptions``), without them the search is greedy.
        """
