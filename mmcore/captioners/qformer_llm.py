"""A captioner with a frozen image encoder, a trained bridge and a frozen language model (report, Table 1, row 4).

The bridge turns image tokens into tokens that the language model reads between its prompt and the caption. Q-Former and
frozen language model: BLIP-2 (Li et al. 2023, arXiv 2301.12597). `mmcore.captioners.bridge` has the other bridges.

Shapes: B images, C captions per image, T tokens, L image tokens, E channels of the encoder, Q tokens of the bridge, W
width of the language model, V tokens of its vocabulary, N predicted tokens of the batch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.captioners.bridge import BridgeSettings, Instruction, build_bridge
from mmcore.captioners.bridge_weights import FirstWeights, check_instruction, first_weights
from mmcore.captioners.decoding import OnWords, beam_search, greedy
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.qformer_captioner import QFormerFacts, QFormerRecipe
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.captioners.search_options import LanguageSearchOptions
from mmcore.data.prepared import CaptionTable
from mmcore.errors import InputError, check_at_least_one
from mmcore.frozen.caption_writer import CaptionWriter
from mmcore.frozen.language import FLAG, FrozenLanguageModel, caption_tokenizer, check_causal
from mmcore.frozen.tokenizers import load_tokenizer
from mmcore.frozen.vision import SCRATCH, ScratchEncoder
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings
from mmcore.text import CaptionTokenizer

# Channels of the encoder `scratch`.
_SCRATCH_WIDTH = 32
_OPTIONS = LanguageSearchOptions()


@dataclass(frozen=True)
class LanguageCaptionerFacts(CaptionerFacts):
    """Facts of a run of this captioner that are not settings."""

    language_model_fingerprint: str = ""
    """Fingerprint of the frozen language model, whose weights are not saved. Empty before it is known."""
    language_model_config: str = ""
    """Configuration of the language model, as JSON."""
    qformer: QFormerSettings | None = None
    """Sizes of a Q-Former with first weights; None for those of the recipe."""
    image_norm: bool = False
    """Whether a LayerNorm is before the Q-Former, as in the run that gave its first weights."""


@dataclass(frozen=True)
class LanguageCaptionerRecipe:
    """ViT-g (frozen), Q-Former, Linear, TinyLlama (frozen). The defaults are the settings of the report."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report"
    """Column of the dataset that assigns rows to training and validation."""
    captions_per_image: int = 1
    """Number of captions per image to train on, the first ones. They share the image's prefix."""
    encoder: str = "Salesforce/blip2-itm-vit-g"
    """Frozen vision model of Hugging Face, by name or folder. `scratch` trains a small encoder instead."""
    image_size: int = 224
    """Side in pixels that images are resized to for the encoder."""
    flip: bool = False
    """Mirror images at random with probability 1/2 (the frozen encoder runs on both views)."""
    language_model: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    """Frozen causal language model of Hugging Face, by name or folder. `scratch` is a tiny random one."""
    prompt: str = "Generate a simple short caption:"
    """Text that the language model reads before the image."""
    max_length: int = 50
    """Longest caption in tokens, including begin and line break. Longer captions are truncated."""
    lora: int = 0
    """Rank of trainable adapters in the language model (LoRA); 0 has none."""
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    """The bridge."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=50,
            batch_size=24,
            optimizer="adam",
            lr=1e-4,
            weight_decay=1e-4,
            schedule="step",
            step_epoch=30,
            clip_grad_norm=None,
            seed=2024,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "captions_per_image", "image_size")
        self.bridge.check()
        if self.max_length < 3:
            raise InputError(
                f"max_length {self.max_length} must be at least 3 (begin, a token, line break); change --max-length"
            )
        if self.lora < 0:
            raise InputError(f"lora {self.lora} must be at least 0; change --lora")
        if self.encoder == SCRATCH and self.image_size % 8:
            raise InputError(
                f"encoder {SCRATCH!r} takes an image_size divisible by 8, not {self.image_size}; change --image-size"
            )

    def build_tokenizer(self, table: CaptionTable) -> CaptionTokenizer:
        """The tokenizer of the language model. Raises InputError if model or tokenizer do not fit."""
        check_causal(self.language_model)  # first, as the tokenizer of another model may lack something
        return caption_tokenizer(self.language_model)

    def complete(self, facts: CaptionerFacts) -> LanguageCaptionerFacts:
        """`facts` and those of the language model and of the first weights of the bridge.

        Raises InputError if one of them cannot be found or does not fit.
        """
        language_model = FrozenLanguageModel.from_name(self.language_model)
        own = {
            "language_model_fingerprint": language_model.fingerprint(),
            "language_model_config": language_model.config_json(),
        }
        complete = LanguageCaptionerFacts(**{**vars(facts), **own})
        if (weights := self.bridge_source()) is None:
            return complete
        width = _SCRATCH_WIDTH if self.encoder == SCRATCH else facts.encoder_width
        qformer, image_norm = weights.sizes(self, complete, width)
        return dataclasses.replace(complete, qformer=qformer, image_norm=image_norm)

    def bridge_source(self) -> FirstWeights | None:
        """The first weights of the bridge; None if it begins at random. Raises InputError if there are none."""
        name = self.bridge.bridge_weights
        return None if name == SCRATCH else first_weights(name, _RUN_TYPES)

    def build(self, facts: LanguageCaptionerFacts) -> "LanguageCaptioner":
        """The trainable part, and the language model without weights. `LanguageCaptioner.load_frozen` loads those.

        Raises InputError if the language model does not fit.
        """
        sizes = FrozenLanguageModel.without_weights(facts.language_model_config, self.language_model)
        return LanguageCaptioner(self, facts, sizes)


class LanguageCaptioner(nn.Module):
    """The bridge and the language model. The frozen image encoder is not part of it: it runs once, in advance."""

    def __init__(
        self, recipe: LanguageCaptionerRecipe, facts: LanguageCaptionerFacts, language_model: FrozenLanguageModel
    ) -> None:
        super().__init__()
        self.recipe, self.token_ids, self.facts = recipe, facts.token_ids, facts
        num_tokens, encoder_width = facts.image_tokens, facts.encoder_width
        self.encoder = None
        if recipe.encoder == SCRATCH:
            encoder_width = _SCRATCH_WIDTH if facts.qformer is None else facts.qformer.memory_width
            num_tokens, self.encoder = (recipe.image_size // 8) ** 2, ScratchEncoder(encoder_width)
        self.instruct_tokenizer = None
        if recipe.bridge.instruct:
            self.instruct_tokenizer = load_tokenizer(recipe.bridge.instruct_tokenizer, "--instruct-tokenizer")
        num_words = None if self.instruct_tokenizer is None else len(self.instruct_tokenizer)
        if facts.qformer is not None and num_words is not None:
            check_instruction(facts.qformer, num_words, recipe.bridge.instruct_tokenizer)
        self.bridge = build_bridge(
            recipe.bridge,
            encoder_width,
            language_model.width,
            num_words,
            sizes=facts.qformer,
            image_norm=facts.image_norm,
        )
        self.num_image_tokens = recipe.bridge.num_tokens(num_tokens)
        self.prefix_ids = language_model.prefix_ids(recipe.prompt)
        language_model.check_positions(len(self.prefix_ids), self.num_image_tokens, recipe.max_length)
        # After the bridge: the first parameter of a model tells the dtype of its inputs.
        self.language_model = language_model
        self._add_lora()

    def _add_lora(self) -> None:
        if self.recipe.lora:
            self.language_model.add_lora(self.recipe.lora)

    def load_frozen(self) -> None:
        """Load the weights of the language model. Adapters begin anew.

        Raises InputError if it cannot be found, or is not the one of the facts.
        """
        language_model = FrozenLanguageModel.from_name(self.recipe.language_model)
        if language_model.fingerprint() != self.facts.language_model_fingerprint:
            name = self.recipe.language_model
            raise InputError(f"{FLAG} {name!r}: the run was trained on another one; name that one")
        self.language_model = language_model
        self._add_lora()

    def load_pretrained(self) -> None:
        """Load what the training begins with: the language model, as `load_frozen`, and first weights of the bridge."""
        self.load_frozen()
        if (weights := self.recipe.bridge_source()) is not None:
            weights.load(self.bridge, self.encoder)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return [*self.bridge.blocks(), *self.language_model.blocks()]  # type: ignore[operator]

    def _instruction(self, prompt: str, num_images: int, device: torch.device) -> Instruction | None:
        if self.instruct_tokenizer is None:
            return None
        ids_T = torch.tensor(self.instruct_tokenizer(prompt)["input_ids"], device=device)
        return ids_T.expand(num_images, -1), torch.ones_like(ids_T).expand(num_images, -1)

    def image_tokens(self, images: Tensor, prompt: str) -> Tensor:
        """Frozen tokens (B, L, E), or uint8 pixels (B, P, P, 3) for `scratch` -> (B, Q, W).

        The bridge reads `prompt` if the recipe has `instruct`.
        """
        tokens_BLE = images if self.encoder is None else self.encoder(images)
        return self.bridge(tokens_BLE, self._instruction(prompt, len(images), images.device))

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Number of tokens that `forward` predicts: all of a caption but the begin token."""
        return {"loss": batch["lengths"].sub(1).clamp_min(0).sum()}

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The cross-entropy of the captions' tokens and line breaks, behind prompt, begin token and image.

        Args:
            batch: `images` as in `image_tokens`; `input_ids` int64 (B, C, T) with begin and line break; `lengths` int64
                (B, C), the number of real tokens (0 for a missing caption).
        Returns: `loss` and the metric `correct`, both over the predicted tokens.
        """
        image_BQW = self.image_tokens(batch["images"], self.recipe.prompt)
        logits_NV, labels_N = self.language_model.caption_logits(
            self.prefix_ids, image_BQW, batch["input_ids"], batch["lengths"]
        )
        # fp32 or above, as the loss is a sum over thousands of tokens.
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
        correct = (logits_NV.argmax(-1) == labels_N).sum()
        return Outputs({"loss": Loss(loss, labels_N.numel())}, {"correct": Mean(correct, labels_N.numel())})

    def writer(self, prompt: str, options: LanguageSearchOptions) -> CaptionWriter:
        """Writes captions behind `prompt`."""
        return CaptionWriter(self.language_model, self.language_model.prefix_ids(prompt), options.repetition_penalty)

    @torch.inference_mode()
    def caption(
        self,
        images: Tensor,
        options: LanguageSearchOptions = _OPTIONS,
        prompts: Sequence[str] | None = None,
        on_words: OnWords | None = None,
    ) -> list[list[int]]:
        """The ids of one caption per image, without begin and end tokens, up to the end of its first sentence.

        Args:
            images: as in `image_tokens`.
            options: one beam is greedy search, which tells `on_words` its steps.
            prompts: one per image; None is the recipe's. Images of the same prompt are computed together.
        Raises InputError for a prompt that leaves no room for a caption.
        """
        texts = [self.recipe.prompt] * len(images) if prompts is None else list(prompts)
        assert len(texts) == len(images), "one prompt per image"
        captions: list[list[int]] = [[]] * len(images)
        for prompt in dict.fromkeys(texts):
            rows = [row for row, text in enumerate(texts) if text == prompt]
            tell = None if on_words is None else _of_rows(on_words, rows)
            for row, ids in zip(rows, self._caption(images[rows], options, prompt, tell), strict=True):
                captions[row] = ids
        return captions

    def _caption(
        self, images: Tensor, options: LanguageSearchOptions, prompt: str, on_words: OnWords | None
    ) -> list[list[int]]:
        max_length = min(options.max_length, self.recipe.max_length)  # later positions were not trained
        writer = self.writer(prompt, options)
        self.language_model.check_positions(len(writer.prefix_ids), self.num_image_tokens, max_length)
        image_BQW = self.image_tokens(images, prompt)
        if options.num_beams == 1:
            return greedy(writer, image_BQW, max_length, self.token_ids, on_words, writer.closing_V)
        return beam_search(writer, image_BQW, max_length, self.token_ids, options.num_beams, options.length_penalty)


def _of_rows(on_words: OnWords, rows: list[int]) -> OnWords:
    """`on_words` for a search over the images `rows` alone."""
    return lambda words: on_words([(rows[image], token) for image, token in words])


# Recipes whose runs can give the first weights of a bridge.
_RUN_TYPES: dict[str, tuple[type, type]] = {
    "qformer": (QFormerRecipe, QFormerFacts),
    "qformer_llm": (LanguageCaptionerRecipe, LanguageCaptionerFacts),
}

_REPORT = LanguageCaptionerRecipe()
_BEST = dataclasses.replace(
    _REPORT,
    captions_per_image=5,
    encoder="microsoft/resnet-18",
    flip=True,
    language_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_length=40,
    # The sizes of MiniLM, whose weights can begin the Q-Former.
    bridge=BridgeSettings(bridge_width=384, bridge_layers=6),
    train=TrainSettings(
        # A step of 80 captions took 6.1 s of two CPU threads with SmolLM2-135M, so these take about 100 minutes.
        num_epochs=3,
        max_steps=1_000,
        batch_size=16,
        lr=3e-4,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=200,
        clip_grad_norm=1.0,
    ),
)
_LLAVA = dataclasses.replace(_BEST, bridge=BridgeSettings(bridge="mlp"))
# LLaVA's second stage trains the projection further, and the language model too. --bridge-weights names the first.
_LLAVA_LORA = dataclasses.replace(
    _LLAVA,
    lora=16,
    bridge=dataclasses.replace(_LLAVA.bridge, bridge_weights=""),
    train=dataclasses.replace(_LLAVA.train, lr=2e-4),
)
_SMOKE = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    encoder=SCRATCH,
    image_size=64,
    flip=False,
    captions_per_image=2,
    language_model=SCRATCH,
    prompt="A picture of",
    max_length=100,  # a token of the tiny language model is a byte
    bridge=BridgeSettings(num_queries=4, bridge_width=32, bridge_layers=2, bridge_heads=2, bridge_dropout=0.0),
    train=TrainSettings(num_epochs=1, max_steps=20, batch_size=8, lr=1e-2, warmup_steps=5),
)
# Without a network there is no language model: this and `smoke` read a tiny random one.
_SHAPES = dataclasses.replace(
    _SMOKE, train=dataclasses.replace(_SMOKE.train, num_epochs=6, max_steps=None, batch_size=16)
)
VARIANTS: dict[str, LanguageCaptionerRecipe] = {
    "report": _REPORT,
    "best": _BEST,
    "llava": _LLAVA,
    "llava-lora": _LLAVA_LORA,
    "shapes": _SHAPES,
    "smoke": _SMOKE,
}
