"""Numbers of parameters of captioners and retrievers at full size, without data and without a download."""

from typing import Any

import torch

from mmcore.captioners.bridge import build_bridge
from mmcore.captioners.contrastive import ContrastiveRecipe
from mmcore.captioners.facts import CaptionerFacts, ContrastiveFacts, tokens_of
from mmcore.captioners.qformer import MatchingHeads, QFormer
from mmcore.captioners.qformer_captioner import QFormerFacts, QFormerRecipe
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.captioners.qformer_llm import LanguageCaptionerRecipe
from mmcore.frozen import published
from mmcore.frozen.published import num_parameters
from mmcore.text import TokenIds

# Words of Flickr8k, special tokens included, that occur at least twice in lower case: in the first captions of all
# images, and in all captions of Karpathy's 6,000 training images.
_WORDS_OF_FIRST_CAPTIONS, _WORDS_OF_ALL_CAPTIONS = 2_366, 4_521


def sizes(recipe: Any) -> tuple[int, int]:
    """Total and trainable parameters. The total includes the frozen encoder and the frozen language model.

    Raises InputError for a frozen model that `mmcore.frozen.published` does not have.
    """
    encoder = published.vision_model(recipe.encoder)
    image_tokens, width = published.token_shape(encoder, recipe.image_size, tokens_of(recipe))
    if isinstance(recipe, LanguageCaptionerRecipe):
        return _with_language_model(recipe, num_parameters(encoder), width)
    words = _WORDS_OF_FIRST_CAPTIONS if recipe.captions_per_image == 1 else _WORDS_OF_ALL_CAPTIONS
    facts = CaptionerFacts(TokenIds(words, 1, 2, (0,)), image_tokens, width)
    if isinstance(recipe, ContrastiveRecipe):
        facts = ContrastiveFacts(**vars(facts))
    if isinstance(recipe, QFormerRecipe):
        # The sizes of BERT, which the recipe's text model would tell.
        facts = QFormerFacts(**vars(facts), qformer=QFormerSettings(memory_width=width))
    with torch.device("meta"):
        trainable = num_parameters(recipe.build(facts))
    return num_parameters(encoder) + trainable, trainable


def _with_language_model(recipe: LanguageCaptionerRecipe, num_encoder: int, image_width: int) -> tuple[int, int]:
    """The total includes the text half of the Q-Former that BLIP-2 publishes, as Table 1 does. It is not trained."""
    language_model = published.language_model(recipe.language_model)
    with torch.device("meta"):
        bridge = build_bridge(recipe.bridge, image_width, language_model.config.hidden_size)
        whole = QFormer(QFormerSettings()), MatchingHeads(QFormerSettings().width)
        queries_alone = QFormer(QFormerSettings(vocabulary_size=None))
    text_half = sum(map(num_parameters, whole)) - num_parameters(queries_alone)
    trainable = num_parameters(bridge)
    return num_encoder + trainable + text_half + num_parameters(language_model), trainable
