"""The protocol of captioner recipes, and the facts that their runs store in recipe.json.

Shapes: B images, C captions per image, T tokens, L image tokens, E channels of the frozen encoder, P pixels a side.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from mmcore.data.prepared import CaptionTable
from mmcore.frozen.vision import PATCH, Tokens
from mmcore.recipe import Recipe
from mmcore.text import CaptionTokenizer, TokenIds, WordVocabulary


@dataclass(frozen=True)
class CaptionerFacts:
    """Facts of a captioner's run that are not settings."""

    token_ids: TokenIds
    """Special ids of the tokenizer."""
    image_tokens: int
    """Tokens per image from the frozen encoder (L); the number of pixels if the recipe trains its own encoder."""
    encoder_width: int
    """Channels of an image token (E)."""
    encoder_fingerprint: str = ""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the images and, with `flip`, the mirrored images."""
    text_fingerprint: str = ""
    """Fingerprint of the tokenizer."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the tokenizer's files. A finished run has a copy of them."""

    @staticmethod
    def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
        """Convert facts of earlier versions. Up to commit 34e6a7a the words were stored in the field `vocabulary`."""
        if "vocabulary" not in fields:
            return fields
        words = WordVocabulary.from_json(fields["vocabulary"])
        fields = {name: value for name, value in fields.items() if name != "vocabulary"}
        own = {"token_ids": words.token_ids, "text_fingerprint": words.fingerprint(), "text": tokenizer_path(words)}
        return {**fields, **own}


@dataclass(frozen=True)
class ContrastiveFacts(CaptionerFacts):
    """Facts of a run of a contrastive pair that are not settings."""

    text_config: str = ""
    """Configuration of the named text encoder, as JSON; empty for `scratch`."""
    text_encoder_fingerprint: str = ""
    """Fingerprint of the weights that the named text encoder begins with; empty for `scratch`."""


def tokenizer_path(tokenizer: CaptionTokenizer) -> tuple[str, str]:
    """Path of the tokenizer's files under STORAGE."""
    return "tokenizers", tokenizer.fingerprint()[:24]


def tokens_of(recipe: Any) -> Tokens:
    """What a captioner takes of the frozen encoder: its recipe's `tokens`, or a token for each patch without them."""
    return getattr(recipe, "tokens", PATCH)


class CaptionerRecipe(Recipe, Protocol):
    """The fields and methods of a captioner recipe that training, ``open_captioner`` and the service use."""

    @property
    def captions_per_image(self) -> int: ...
    @property
    def encoder(self) -> str:
        """The frozen vision encoder by name or folder; `scratch` if the model takes pixels."""

    @property
    def image_size(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def max_length(self) -> int:
        """Longest caption in tokens, including begin and end."""

    def build_tokenizer(self, table: CaptionTable) -> CaptionTokenizer: ...

    def build(self, facts: CaptionerFacts) -> nn.Module:
        """The trainable part.

        ``forward(batch)`` returns named losses. The batch has `images`, `input_ids` (B, C, T) and `lengths` (B, C).
        `images` are frozen tokens (B, L, E), or uint8 pixels (B, P, P, 3) with `scratch`.

        ``caption(images, options)`` returns the ids of one caption per image, without begin and end tokens. `options`
        are ``SearchOptions`` unless the class that opens the run has others. The default is greedy search.
        A ``caption`` with an argument `on_words` (`mmcore.captioners.decoding.OnWords`) can be streamed.
        A model that writes no captions has no ``caption``.

        ``complete(facts)``, which a recipe may have, adds the facts of that recipe alone before anything is built.
        ``load_pretrained()``, which a model may have, makes what only the training begins with, such as weights of a
        named model.
        ``load_frozen()``, which a model may have, loads those that a finished run does not save.
        """
