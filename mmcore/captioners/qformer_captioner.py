"""A Q-Former that captions, matches and retrieves by itself (report, Table 1, row 3): BLIP-2's first stage.

Three losses of one batch of images with a caption each (Li et al. 2023, arXiv 2301.12597, section 3.2): ITC compares
the features of all images and captions, ITM classifies pairs with hard negatives, ITG predicts the caption's words.
`mmcore.captioners.qformer` has the model, and `mmcore.captioners.qformer_losses` the losses.

Shapes: B images of this worker, each with one text; M images of all workers; L image tokens, E channels of an image
token, Q queries, F features, D width, T positions, X pairs, N predicted words, V words.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmcore.captioners.checks import check_batch_of_pairs, check_max_length, check_scratch_encoder
from mmcore.captioners.decoding import OnWords, beam_search, greedy
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.momentum import MomentumCopy
from mmcore.captioners.qformer import MatchingHeads, MemoryKeys, QFormer
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.captioners.qformer_losses import (
    itc_loss,
    itg_loss,
    itm_loss,
    itm_negatives,
    itm_scores,
    predicts_word,
    similarities,
)
from mmcore.captioners.qformer_weights import bert_settings, start_from_bert
from mmcore.captioners.search_options import GREEDY, SearchOptions
from mmcore.captioners.temperature import first_log_scale, limit_, temperature_of
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.distributed import gathered
from mmcore.errors import InputError, check_at_least_one, check_heads, check_share
from mmcore.frozen.tokenizers import PieceTokenizer, load_tokenizer
from mmcore.frozen.vision import PATCH, SCRATCH, ScratchEncoder, Tokens
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings
from mmcore.text import PAD_ID, CaptionTokenizer, WordVocabulary

# LAVIS: the token that begins a caption in ITG.
_DECODE = "[DEC]"


@dataclass(frozen=True)
class QFormerFacts(CaptionerFacts):
    """Facts of a Q-Former's run that are not settings."""

    first_id: int = 0
    """Token that begins a text in ITC and ITM: `[CLS]` of a BERT. Captions begin with another one."""
    qformer: QFormerSettings = field(default_factory=QFormerSettings)
    """Sizes of the Q-Former."""


@dataclass(frozen=True)
class QFormerRecipe:
    """A frozen image encoder, and a Q-Former that is trained by contrast, matching and generation."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report"
    """Column of the dataset that assigns rows to training and validation."""
    captions_per_image: int = 5
    """Number of captions per image to draw from, the first ones. Each epoch trains on one of them."""
    encoder: str = "Salesforce/blip2-itm-vit-g"
    """Frozen vision model of Hugging Face, by name or folder. `scratch` trains a small encoder instead."""
    tokens: Tokens = PATCH
    """Image tokens of the frozen encoder: one for each patch or place, or its pooled vector alone."""
    image_size: int = 224
    """Side in pixels that images are resized to for the encoder."""
    image_norm: bool = False
    """Add a LayerNorm to the image tokens, for encoders that do not end in one."""
    flip: bool = False
    """Mirror images at random with probability 1/2 (the frozen encoder runs on both views)."""
    text_model: str = "bert-base-uncased"
    """BERT of Hugging Face by name or folder. It gives tokenizer, sizes and first weights. `scratch` has its own."""
    min_word_count: int = 2
    """Words of `scratch` that occur less often become <unk>."""
    lowercase: bool = True
    """Lower-case the captions of `scratch`."""
    max_length: int = 32
    """Longest caption in tokens, including begin and end. Longer captions are truncated."""
    num_queries: int = 32
    """Learned queries of an image."""
    cross_every: int = 2
    """Every so many layers attend to the image."""
    width: int = 768
    """Width of `scratch`."""
    num_layers: int = 12
    """Layers of `scratch`."""
    num_heads: int = 12
    """Attention heads of `scratch`."""
    ffn_width: int = 3072
    """Width of the feed-forward layers of `scratch`."""
    dropout: float = 0.1
    """Dropout of the residual branches and of the attention weights."""
    feature_width: int = 256
    """Width of the space in which images and captions are compared."""
    label_smoothing: float = 0.1
    """Label smoothing of ITC and ITG in training."""
    distillation: float = 0.0
    """Share of ITC and ITG whose targets are those of a slow copy of the Q-Former (ALBEF takes 0.4). It grows from 0 in
    the first epoch."""
    distillation_momentum: float = 0.995
    """Share of its weights that the copy keeps in a step."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=10,
            batch_size=64,
            optimizer="adamw",
            lr=1e-4,
            betas=(0.9, 0.98),
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=500,
            clip_grad_norm=1.0,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        sizes = ("num_queries", "cross_every", "width", "num_layers", "num_heads", "ffn_width", "feature_width")
        check_at_least_one(self, *sizes, "image_size", "captions_per_image", "min_word_count")
        check_share(self, "dropout", "label_smoothing", "distillation", "distillation_momentum")
        check_max_length(self)
        check_batch_of_pairs(self)
        if self.text_model == SCRATCH:
            check_heads(self)
        check_scratch_encoder(self)

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, for `mmcore.recipe.check_effect`."""
        ignored = {"tokens": "a frozen --encoder"} if self.encoder == SCRATCH else {}
        if self.text_model != SCRATCH:
            of_scratch = ("min_word_count", "lowercase", "num_layers", "num_heads", "ffn_width")
            ignored |= dict.fromkeys(of_scratch, f"--text-model {SCRATCH}")
            # The encoder `scratch` has this width too.
            if self.encoder != SCRATCH:
                ignored["width"] = f"--text-model {SCRATCH}"
        if not self.distillation:
            ignored["distillation_momentum"] = "--distillation"
        return ignored

    def build_tokenizer(self, table: CaptionTable) -> CaptionTokenizer:
        """Captions begin with `[DEC]`, or with the begin token of `scratch`.

        Raises InputError for a text model whose tokenizer cannot be found or has no end token.
        """
        if self.text_model == SCRATCH:
            rows = table.rows(TRAIN)
            captions = [text for row in rows for text in table.captions[row][: self.captions_per_image]]
            return WordVocabulary.build(captions, min_count=self.min_word_count, lowercase=self.lowercase)
        tokenizer = load_tokenizer(self.text_model, "--text-model")
        tokenizer.add_special_tokens({"bos_token": _DECODE})
        return PieceTokenizer(tokenizer, "--text-model")

    def complete(self, facts: CaptionerFacts) -> QFormerFacts:
        """The facts with the sizes of the Q-Former, which a named text model decides.

        Raises InputError for a text model that cannot be found, or that takes fewer tokens.
        """
        memory_width = self.width if self.encoder == SCRATCH else facts.encoder_width
        if self.text_model == SCRATCH:
            # No mask shows padding, so its embedding is free to begin the texts of ITC and ITM.
            first_id = PAD_ID
            settings = QFormerSettings(
                vocabulary_size=facts.token_ids.size,
                width=self.width,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                ffn_width=self.ffn_width,
                max_positions=self.max_length,
                memory_width=memory_width,
                num_queries=self.num_queries,
                cross_every=self.cross_every,
            )
        else:
            first_id = load_tokenizer(self.text_model, "--text-model").cls_token_id
            settings = bert_settings(
                self.text_model,
                flag="--text-model",
                memory_width=memory_width,
                num_queries=self.num_queries,
                cross_every=self.cross_every,
            )
            if first_id is None:
                raise InputError(f"--text-model {self.text_model!r}: its tokenizer has no token [CLS]; name another")
        settings = dataclasses.replace(settings, dropout=self.dropout, attention_dropout=self.dropout)
        num_words = settings.vocabulary_size
        assert num_words is not None, "a text half has words"
        if facts.token_ids.size > num_words:
            raise InputError(
                f"--text-model {self.text_model!r}: its tokenizer has {facts.token_ids.size} tokens with {_DECODE}, "
                f"the model only {num_words}; name another"
            )
        if self.max_length > settings.max_positions:
            raise InputError(
                f"max_length {self.max_length}: --text-model {self.text_model!r} has {settings.max_positions} "
                "positions; change --max-length"
            )
        return QFormerFacts(**vars(facts), first_id=first_id, qformer=settings)

    def build(self, facts: QFormerFacts) -> "QFormerCaptioner":
        """The model with random weights. `QFormerCaptioner.load_pretrained` then loads those of the text model."""
        return QFormerCaptioner(self, facts)


class QFormerCaptioner(nn.Module):
    """The Q-Former, its heads and the learned temperature. The frozen encoder runs once, in advance."""

    whole_batch_losses = ("itc", "itm")

    def __init__(self, recipe: QFormerRecipe, facts: QFormerFacts) -> None:
        super().__init__()
        self.recipe, self.facts, self.token_ids = recipe, facts, facts.token_ids
        self.encoder = ScratchEncoder(recipe.width) if recipe.encoder == SCRATCH else None
        width = facts.qformer.memory_width
        self.image_norm = nn.LayerNorm(width) if recipe.image_norm else nn.Identity()
        self.qformer = QFormer(facts.qformer)
        self.heads = MatchingHeads(facts.qformer.width, recipe.feature_width)
        self.log_scale = first_log_scale()
        self.momentum_copy: MomentumCopy | None = None
        self.state_buffers: tuple[str, ...] = ()
        self.training_buffers: tuple[str, ...] = ()

    def load_pretrained(self) -> None:
        """Load the first weights of a named text model, and copy the first weights for momentum distillation."""
        if self.recipe.text_model != SCRATCH:
            start_from_bert(self.qformer, self.recipe.text_model, flag="--text-model")
        if self.recipe.distillation:
            self.momentum_copy = MomentumCopy(self.qformer, self.heads)
            self.state_buffers = tuple(f"momentum_copy.{name}" for name, _ in self.momentum_copy.named_buffers())
            self.training_buffers = self.state_buffers

    def memory(self, images: Tensor) -> Tensor:
        """Frozen tokens (B, L, E), or uint8 pixels (B, P, P, 3) for `scratch` -> image tokens (B, L, E)."""
        return self.image_norm(images if self.encoder is None else self.encoder(images))

    def image_features(self, images: Tensor) -> Tensor:
        """Images as in `memory` -> (B, Q, F), normalised."""
        return self.heads.image_features(self.qformer.queries(self.memory(images)).hidden_BQD)

    def text_features(self, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Captions with begin and end -> (B, F), normalised."""
        return self.heads.text_features(self.qformer.text(self._as_text(input_ids_BT), mask_BT))

    def match(self, memory: Tensor | MemoryKeys, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Log-odds that each image and its caption belong together: (B,), of `memory` or its `memory_keys`."""
        return itm_scores(self._pair_logits(memory, self._as_text(input_ids_BT), mask_BT))

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return self.qformer.blocks()

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pairs of ITM and predicted words of ITG. Each image of a training batch has negatives."""
        return {
            "itm": torch.tensor(3 * len(batch["images"])),
            "itg": batch["lengths"].sub(1).clamp_min(0).sum(),
        }

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The three losses.

        Args:
            batch: of `MatchingRows`.
        Returns: `itc`, `itm` and `itg`, and how often each is right. ITC is right where the nearest of the batch
            belongs to the row, ITM in the class of a pair, ITG in the next word.
        """
        if self.training:
            limit_(self.log_scale)
        index_B, lengths_B = batch["image_index"], batch["lengths"][:, 0]
        ids_BT = batch["input_ids"][:, 0]
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        memory_BLE = self.memory(batch["images"])
        keys = self.qformer.memory_keys(memory_BLE)
        state = self.qformer.queries(keys)
        text_BT = self._as_text(ids_BT)
        images_BQF = self.heads.image_features(state.hidden_BQD)
        texts_BF = self.heads.text_features(self.qformer.text(text_BT, mask_BT))
        # In validation each worker has other batches.
        share = gathered if self.training else (lambda each: each)
        all_index_M = share(index_B)
        cosines = similarities(images_BQF, texts_BF, share(images_BQF), share(texts_BF))
        smoothing = self.recipe.label_smoothing if self.training else 0.0
        temperature = temperature_of(self.log_scale)
        predicts_BT = predicts_word(lengths_B, ids_BT.shape[1])
        soft_cosines = soft_logits = None
        if self.training and self.momentum_copy is not None:
            soft_cosines, soft_logits = self.momentum_copy.targets(
                memory_BLE, text_BT, ids_BT, mask_BT, predicts_BT, share
            )
        soft_weight = self._soft_weight()
        itc = itc_loss(cosines, temperature, index_B, all_index_M, smoothing, soft_cosines, soft_weight)
        right_2B = all_index_M[torch.stack([each.argmax(dim=1) for each in cosines])] == index_B

        negatives = itm_negatives(cosines, temperature, index_B, all_index_M, batch["uniforms"])
        exist_B = negatives.exist_B
        all_memory, all_text, all_mask = share(memory_BLE), share(text_BT), share(mask_BT.long())
        other_texts = all_text[negatives.text_B], all_mask[negatives.text_B].bool()
        # One worker has the keys of all images already.
        other_images = keys.of(negatives.image_B) if all_memory is memory_BLE else all_memory[negatives.image_B]
        logits_XQ2 = torch.cat(
            [
                self._pair_logits(keys, text_BT, mask_BT),
                self._pair_logits(keys, *other_texts)[exist_B],
                self._pair_logits(other_images, text_BT, mask_BT)[exist_B],
            ]
        )
        matches_X = torch.arange(len(logits_XQ2), device=logits_XQ2.device) < len(index_B)
        itm = itm_loss(logits_XQ2, matches_X)
        right_X = (itm_scores(logits_XQ2) > 0) == matches_X

        hidden_BTD = self.qformer.causal(ids_BT, mask_BT, state)
        logits_NV = self.qformer.logits(hidden_BTD[predicts_BT])
        itg, right_words = itg_loss(logits_NV, ids_BT, lengths_B, smoothing, soft_logits, soft_weight)
        return Outputs(
            {
                "itc": Loss(itc, len(index_B)),
                "itm": Loss(itm, len(matches_X)),
                "itg": Loss(itg, len(logits_NV)),
            },
            {
                "itc_correct": Mean(right_2B.sum(), right_2B.numel()),
                "itm_correct": Mean(right_X.sum(), right_X.numel()),
                "itg_correct": Mean(right_words, len(logits_NV)),
            },
            {} if soft_cosines is None else {"epochs": batch["num_train"].double().reciprocal().sum()},
        )

    def after_step(self, statistics: dict[str, Tensor], step: int) -> None:
        """Let the momentum copy follow."""
        assert self.momentum_copy is not None, "only its targets leave statistics"
        momentum = self.recipe.distillation_momentum
        self.momentum_copy.follow(self.qformer, self.heads, momentum, statistics["epochs"])

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        """The share of the copy's targets in the next step."""
        return {"distillation": float(self._soft_weight())}

    def _soft_weight(self) -> Tensor | float:
        """The share of the copy's targets: it grows linearly in the first epoch (ALBEF, section 3.5)."""
        if self.momentum_copy is None:
            return 0.0
        return self.recipe.distillation * self.momentum_copy.epochs.clamp(max=1.0)

    @torch.inference_mode()
    def caption(
        self, images: Tensor, options: SearchOptions = GREEDY, on_words: OnWords | None = None
    ) -> list[list[int]]:
        """The ids of one caption per image, without begin and end tokens; `images` as in `memory`.

        One beam is greedy search, which tells `on_words` its steps.
        """
        max_length, memory_BLE = min(options.max_length, self.recipe.max_length), self.memory(images)
        if options.num_beams == 1:
            return greedy(self.qformer, memory_BLE, max_length, self.token_ids, on_words)
        return beam_search(
            self.qformer, memory_BLE, max_length, self.token_ids, options.num_beams, options.length_penalty
        )

    def _as_text(self, input_ids_BT: Tensor) -> Tensor:
        """Captions as ITC and ITM read them: they begin with another token than those of ITG."""
        return torch.cat([torch.full_like(input_ids_BT[:, :1], self.facts.first_id), input_ids_BT[:, 1:]], dim=1)

    def _pair_logits(self, memory: Tensor | MemoryKeys, text_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The two logits of each query: (B, Q, 2)."""
        return self.heads.pair_logits(self.qformer.multimodal(memory, text_BT, mask_BT)[0])


_REPORT = QFormerRecipe()
_BEST = dataclasses.replace(
    _REPORT,
    split="split_karpathy",
    flip=True,
    image_norm=True,
    train=dataclasses.replace(_REPORT.train, num_epochs=5, warmup_steps=50),
)
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    encoder=SCRATCH,
    image_size=64,
    flip=False,
    text_model=SCRATCH,
    min_word_count=1,
    max_length=40,
    num_queries=16,
    cross_every=1,
    width=128,
    num_layers=4,
    num_heads=4,
    ffn_width=512,
    dropout=0.0,
    feature_width=64,
    label_smoothing=0.0,
    train=dataclasses.replace(_BEST.train, num_epochs=8, batch_size=32, lr=1e-3, warmup_steps=100, ema_decay=0.99),
)
_SMOKE = dataclasses.replace(
    _SHAPES,
    width=32,
    num_layers=2,
    num_heads=2,
    ffn_width=64,
    num_queries=4,
    feature_width=16,
    train=dataclasses.replace(_SHAPES.train, num_epochs=1, max_steps=20, batch_size=8, warmup_steps=5),
)
VARIANTS: dict[str, QFormerRecipe] = {"report": _REPORT, "best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
