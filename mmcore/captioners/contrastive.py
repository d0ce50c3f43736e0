"""A contrastive pair: an image tower and a text tower with one space of features (CLIP).

CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020 (section 2.3: the loss; section 2.4: attention pooling).

Shapes: B images, each with one text; T tokens of a text, L image tokens, E channels of the frozen encoder's tokens, D
width of a tower, F features, P pixels a side.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.captioners.checks import check_batch_of_pairs, check_max_length, check_scratch_encoder
from mmcore.captioners.facts import CaptionerFacts, ContrastiveFacts
from mmcore.captioners.qformer_losses import itc_loss, similarities
from mmcore.captioners.temperature import first_log_scale, limit_, temperature_of
from mmcore.captioners.token_tower import TokenTower
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.distributed import gathered
from mmcore.errors import InputError, check_at_least_one, check_heads, check_share
from mmcore.frozen.pretrained import sha256_of
from mmcore.frozen.text import config_to_json, load_text_model, text_model_from_json
from mmcore.frozen.tokenizers import WORDS, PieceTokenizer, load_tokenizer
from mmcore.frozen.vision import PATCH, SCRATCH, ScratchEncoder, Tokens
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings
from mmcore.text import CaptionTokenizer, WordVocabulary


@dataclass(frozen=True)
class ContrastiveRecipe:
    """A frozen or small image encoder, a small or pretrained text encoder, and trained heads."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_karpathy"
    """Column of the dataset that assigns rows to training and validation."""
    captions_per_image: int = 5
    """Number of captions per image to draw from, the first ones. Each epoch trains on one of them."""
    encoder: str = "microsoft/resnet-18"
    """Frozen vision model of Hugging Face, by name or folder. `scratch` trains a small encoder instead."""
    tokens: Tokens = PATCH
    """Image tokens of the frozen encoder: one for each patch or place, or its pooled vector alone."""
    image_size: int = 224
    """Side in pixels that images are resized to for the encoder."""
    flip: bool = True
    """Mirror images at random with probability 1/2 (the frozen encoder runs on both views)."""
    text_encoder: str = SCRATCH
    """Text encoder of Hugging Face (BERT, CLIP, T5, ...) by name or folder, with its tokenizer. `scratch` trains a
    small one."""
    train_text_encoder: bool = True
    """Train a named text encoder too, from its weights. Otherwise it is frozen."""
    tokenizer: str = WORDS
    """Tokenizer of `scratch`: `words` builds a vocabulary of words from the training captions. Else a Hugging Face
    tokenizer by name or folder. A named text encoder has its own tokenizer."""
    min_word_count: int = 2
    """Words that occur less often become <unk>."""
    lowercase: bool = True
    """Lower-case the captions."""
    max_length: int = 40
    """Longest caption in tokens, including begin and end. Longer captions are truncated."""
    width: int = 512
    """Width of both towers."""
    image_layers: int = 0
    """Transformer layers between the image encoder and the pooling."""
    text_layers: int = 2
    """Transformer layers of `scratch`."""
    num_heads: int = 8
    """Attention heads of the layers and of the pooling."""
    dropout: float = 0.1
    """Dropout of the layers."""
    image_dropout: float = 0.1
    """Dropout of the projected image tokens."""
    feature_width: int = 256
    """Width of the space that images and texts share."""
    label_smoothing: float = 0.0
    """Label smoothing of the training loss."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=20,
            batch_size=128,
            optimizer="adamw",
            lr=5e-4,
            betas=(0.9, 0.98),
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=100,
            clip_grad_norm=1.0,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        sizes = ("width", "num_heads", "feature_width", "image_size", "captions_per_image", "min_word_count")
        check_at_least_one(self, *sizes)
        check_share(self, "dropout", "image_dropout", "label_smoothing")
        for name in ("image_layers", "text_layers"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise InputError(f"{name} {getattr(self, name)} must be at least 0; change --{flag}")
        check_max_length(self)
        check_heads(self)
        check_scratch_encoder(self)
        check_batch_of_pairs(self)

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, for `mmcore.recipe.check_effect`."""
        ignored = {"tokens": "a frozen --encoder"} if self.encoder == SCRATCH else {}
        if self.text_encoder != SCRATCH:
            of_scratch = ("tokenizer", "min_word_count", "lowercase", "text_layers")
            return ignored | dict.fromkeys(of_scratch, f"--text-encoder {SCRATCH}")
        if self.tokenizer != WORDS:
            ignored |= dict.fromkeys(("min_word_count", "lowercase"), f"--tokenizer {WORDS}")
        return ignored | {"train_text_encoder": "--text-encoder MODEL"}

    def build_tokenizer(self, table: CaptionTable) -> CaptionTokenizer:
        """Raises InputError for a pretrained tokenizer that cannot be found."""
        if self.text_encoder != SCRATCH:
            return PieceTokenizer(load_tokenizer(self.text_encoder, "--text-encoder"))
        if self.tokenizer != WORDS:
            return PieceTokenizer(load_tokenizer(self.tokenizer, "--tokenizer"))
        captions = [text for row in table.rows(TRAIN) for text in table.captions[row][: self.captions_per_image]]
        return WordVocabulary.build(captions, min_count=self.min_word_count, lowercase=self.lowercase)

    def text_facts(self, vocabulary_size: int) -> tuple[str, str]:
        """`text_config` and `text_encoder_fingerprint` of `ContrastiveFacts`; two empty strings for `scratch`.

        Raises InputError for a text encoder that cannot be found, takes fewer tokens, or has fewer words than its
        tokenizer (`vocabulary_size`).
        """
        if self.text_encoder == SCRATCH:
            return "", ""
        model, fingerprint = _read_text_encoder(self.text_encoder)
        most = getattr(model.config, "max_position_embeddings", None) or self.max_length
        if self.max_length > most:
            raise InputError(
                f"max_length {self.max_length}: --text-encoder {self.text_encoder!r} takes at most {most} tokens; "
                "change --max-length"
            )
        if vocabulary_size > model.config.vocab_size:
            raise InputError(
                f"--text-encoder {self.text_encoder!r}: its tokenizer has {vocabulary_size} tokens, the model only "
                f"{model.config.vocab_size}; name another"
            )
        return config_to_json(model.config), fingerprint

    def complete(self, facts: CaptionerFacts) -> ContrastiveFacts:
        """`facts` and those of the text encoder. Raises InputError as `text_facts` does."""
        config, fingerprint = self.text_facts(facts.token_ids.size)
        return ContrastiveFacts(**vars(facts), text_config=config, text_encoder_fingerprint=fingerprint)

    def build(self, facts: ContrastiveFacts) -> "ContrastivePair":
        """The model with random weights. `ContrastivePair.load_pretrained` then loads those of a named encoder."""
        return ContrastivePair(self, facts)


def _without_pooler(model: Any) -> Any:
    """`model` without the layer behind its hidden states, which is not used and would get no gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _read_text_encoder(name: str) -> tuple[Any, str]:
    """The text encoder `name` with its weights, and its fingerprint. Raises InputError if it cannot be found."""
    model = _without_pooler(load_text_model(name))
    return model, sha256_of(model, "text encoder")


class ContrastivePair(nn.Module):
    """Both towers and the learned temperature. A frozen image encoder is not part of it: it runs once, in advance."""

    whole_batch_losses = ("loss",)

    def __init__(self, recipe: ContrastiveRecipe, facts: ContrastiveFacts) -> None:
        super().__init__()
        self.recipe, self.facts = recipe, facts
        num_tokens, encoder_width = facts.image_tokens, facts.encoder_width
        self.image_encoder = None
        if recipe.encoder == SCRATCH:
            self.image_encoder = ScratchEncoder(recipe.width)
            num_tokens, encoder_width = (recipe.image_size // 8) ** 2, recipe.width
        self.text_encoder: Any = None
        self.words: nn.Embedding | None = None
        text_width, text_layers = recipe.width, recipe.text_layers
        if recipe.text_encoder == SCRATCH:
            self.words = nn.Embedding(facts.token_ids.size, recipe.width)
        else:
            self.text_encoder = _without_pooler(text_model_from_json(facts.text_config))
            self.text_encoder.requires_grad_(recipe.train_text_encoder)
            text_width, text_layers = self.text_encoder.config.hidden_size, 0
        self.has_text_weights = recipe.text_encoder == SCRATCH or recipe.train_text_encoder

        def tower(token_width: int, num_positions: int, num_layers: int, input_dropout: float) -> TokenTower:
            return TokenTower(
                token_width=token_width,
                num_positions=num_positions,
                width=recipe.width,
                num_layers=num_layers,
                num_heads=recipe.num_heads,
                feature_width=recipe.feature_width,
                input_dropout=input_dropout,
                dropout=recipe.dropout,
            )

        self.image_tower = tower(encoder_width, num_tokens, recipe.image_layers, recipe.image_dropout)
        self.text_tower = tower(text_width, recipe.max_length, text_layers, 0.0)
        self.log_scale = first_log_scale()

    def load_pretrained(self) -> None:
        """Load the weights of the named text encoder: the first weights of a trained one, or those of a frozen one.

        It does nothing for `scratch`. Raises InputError if the encoder cannot be found, or is not the one of the facts.
        """
        name = self.recipe.text_encoder
        if name == SCRATCH:
            return
        loaded, fingerprint = _read_text_encoder(name)
        if fingerprint != self.facts.text_encoder_fingerprint:
            raise InputError(f"--text-encoder {name!r}: this run was begun with another text encoder; name that one")
        self.text_encoder.load_state_dict(loaded.state_dict())
        self.has_text_weights = True

    def image_features(self, images: Tensor) -> Tensor:
        """Frozen tokens (B, L, E), or uint8 pixels (B, P, P, 3) for `scratch` -> (B, F), normalised, fp32 or above."""
        tokens_BLE = images if self.image_encoder is None else self.image_encoder(images)
        return _normalised(self.image_tower(tokens_BLE))

    def text_features(self, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts -> (B, F), normalised, fp32 or above.

        Args:
            input_ids_BT: int64, at most `max_length` tokens with begin and end.
            mask_BT: bool, the real tokens: the first ones of a row, and at least one.
        """
        assert self.has_text_weights, "load_pretrained was not called"
        num_positions = int(mask_BT.sum(dim=1).max())
        ids_BT, mask_BT = input_ids_BT[:, :num_positions], mask_BT[:, :num_positions]
        if self.words is not None:
            tokens_BTD = self.words(ids_BT)
        else:
            tokens_BTD = self.text_encoder(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
        return _normalised(self.text_tower(tokens_BTD, mask_BT))

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return [*self.image_tower.layers, *self.text_tower.layers]

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The contrastive loss over the whole batch, in both directions.

        Args:
            batch: of `MatchingRows`: `images` as in `image_features`, `input_ids` int64 (B, 1, T), `lengths` int64
                (B, 1) and `image_index` int64 (B,).
        Returns: `loss` over the rows, and the metric `correct`: how often the most similar one of the batch is right.
        """
        if self.training:
            limit_(self.log_scale)
        ids_BT, lengths_B = batch["input_ids"][:, 0], batch["lengths"][:, 0]
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        images_BF, texts_BF = self.image_features(batch["images"]), self.text_features(ids_BT, mask_BT)
        index_B = batch["image_index"]
        # In validation each worker has other batches.
        all_images_MF, all_texts_MF, all_index_M = (
            gathered(each) if self.training else each for each in (images_BF, texts_BF, index_B)
        )
        cosines = similarities(images_BF[:, None], texts_BF, all_images_MF[:, None], all_texts_MF)
        smoothing = self.recipe.label_smoothing if self.training else 0.0
        loss = itc_loss(cosines, temperature_of(self.log_scale), index_B, all_index_M, smoothing)
        right_2B = all_index_M[torch.stack([each.argmax(dim=1) for each in cosines])] == index_B
        return Outputs({"loss": Loss(loss, len(index_B))}, {"correct": Mean(right_2B.sum(), right_2B.numel())})


def _normalised(features_BF: Tensor) -> Tensor:
    return F.normalize(features_BF.to(torch.promote_types(features_BF.dtype, torch.float32)), dim=-1)


_BEST = ContrastiveRecipe()
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    encoder=SCRATCH,
    image_size=64,
    flip=False,
    min_word_count=1,
    width=128,
    image_layers=2,
    text_layers=2,
    num_heads=4,
    dropout=0.0,
    image_dropout=0.0,
    feature_width=128,
    train=dataclasses.replace(_BEST.train, num_epochs=6, batch_size=64, lr=1e-3),
)
_SMOKE = dataclasses.replace(
    _SHAPES,
    width=32,
    image_layers=1,
    text_layers=1,
    num_heads=2,
    feature_width=16,
    train=dataclasses.replace(_SHAPES.train, num_epochs=1, max_steps=20, batch_size=8, warmup_steps=5),
)
VARIANTS: dict[str, ContrastiveRecipe] = {"best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
