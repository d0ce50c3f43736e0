"""Prompts to what a diffusion network attends to: a frozen text encoder, or a small one that is trained along.

A frozen encoder's hidden states are computed once for all captions and cached; a trained one takes token ids.

Shapes: B prompts, T tokens, E channels of the encoder's hidden states, D channels that the network attends to.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.errors import InputError
from mmcore.pretrained import load_frozen, sha256_of
from mmcore.storage import Storage
from mmcore.text import BOS, EOS, PAD, SPECIAL, UNK

SCRATCH = "scratch"
WORDS = "words"
# Of the tokenizer that is made of the captions: a word that occurs once is not learned, but becomes <unk>.
_MIN_WORD_COUNT = 2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
        for name in ("text_width", "text_layers", "text_heads"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"{name} {getattr(self, name)} must be at least 1; mend it with --{flag}")
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


@dataclass(frozen=True)
class TextInputs:
    """What a network is fed: the hidden states of a frozen encoder (`width` channels), or ids of a vocabulary."""

    width: int | None = None
    vocabulary_size: int | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None


class PromptTokenizer:
    """Prompts to ids of one length; a fast tokenizer of Hugging Face."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """Raises InputError for a tokenizer without an end mark."""
        self.bos_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        self.eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if self.eos_id is None:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end mark; choose another with --tokenizer")
        if tokenizer.pad_token_id is None:
            # As CLIP's does; nothing after the first end mark is looked for.
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.eos_id)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = max_tokens
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    @classmethod
    def from_name(cls, name: str, max_tokens: int, flag: str = "--tokenizer") -> "PromptTokenizer":
        """Raises InputError, naming `flag`, where `name` is neither a folder with a tokenizer.json nor on the hub."""
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        try:
            # Without this file transformers makes an empty tokenizer up and says nothing.
            if cached_file(name, _TOKENIZER_FILES[0], _raise_exceptions_for_missing_entries=False) is None:
                raise OSError(f"no {_TOKENIZER_FILES[0]} there")
            tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{flag} {name!r}: no tokenizer in such a folder, and none by that name can be had ({reason})"
            ) from None
        return cls(tokenizer, max_tokens)

    @classmethod
    def of_words(cls, captions: Iterable[str], max_tokens: int) -> "PromptTokenizer":
        """Lower-cased words and marks of punctuation that occur at least twice in `captions`, most frequent first."""
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel(unk_token=UNK))
        words.normalizer = normalizers.Lowercase()
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            special_tokens=list(SPECIAL), min_frequency=_MIN_WORD_COUNT, show_progress=False
        )
        words.train_from_iterator(captions, trainer)
        words.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(mark, words.token_to_id(mark)) for mark in (BOS, EOS)]
        )
        marks = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
        return cls(PreTrainedTokenizerFast(tokenizer_object=words, **marks), max_tokens)

    @classmethod
    def read(cls, folder: Storage, max_tokens: int) -> "PromptTokenizer":
        """What `files` gave, from a folder of the storage."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as local:
            for name in _TOKENIZER_FILES:
                folder.download(name, Path(local) / name)
            return cls(AutoTokenizer.from_pretrained(local, use_fast=True, trust_remote_code=False), max_tokens)

    def files(self) -> dict[str, bytes]:
        """The tokenizer as files that transformers reads, by name."""
        # What the last call padded to would be written down too.
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        with tempfile.TemporaryDirectory() as local:
            self.tokenizer.save_pretrained(local)
            return {name: (Path(local) / name).read_bytes() for name in _TOKENIZER_FILES}

    def fingerprint(self) -> str:
        """SHA-256 over all that decides the ids (the other file also says where the tokenizer was read from)."""
        marks = json.dumps([self.max_tokens, dataclasses.asdict(self.inputs())])
        return hashlib.sha256(marks.encode() + self.files()[_TOKENIZER_FILES[0]]).hexdigest()

    def inputs(self) -> TextInputs:
        return TextInputs(
            vocabulary_size=len(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
        )

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids (B, T) and the mask of what is no padding (B, T)."""
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]


class FrozenTextEncoder:
    """A pretrained text encoder: prompts to its last hidden state."""

    def __init__(self, name: str, max_tokens: int, device: str = "cpu") -> None:
        """Raises InputError where `name` is no text encoder with its tokenizer, or takes fewer tokens."""
        from transformers import AutoModelForTextEncoding, CLIPTextModel

        # A two-tower model such as CLIP: its text half alone.
        choose = lambda config: CLIPTextModel if hasattr(config, "text_config") else AutoModelForTextEncoding
        flag = "--text-encoder"
        self.model = load_frozen(name, choose, flag=flag, what="text encoder").to(device)
        most = getattr(self.model.config, "max_position_embeddings", None) or max_tokens
        if max_tokens > most:
            raise InputError(f"max_tokens {max_tokens}: {flag} {name!r} takes {most}; mend it with --max-tokens")
        self.tokenize = PromptTokenizer.from_name(name, max_tokens, flag)
        if len(self.tokenize.tokenizer) > self.model.config.vocab_size:
            raise InputError(
                f"{flag} {name!r}: its tokenizer has {len(self.tokenize.tokenizer)} tokens, the model only "
                f"{self.model.config.vocab_size}"
            )
        # CLIP looks back only and pads with its end mark; pipelines call it without a mask, and so does this.
        self.masked = not isinstance(self.model, CLIPTextModel)
        self.name, self.device = name, torch.device(device)

    def fingerprint(self) -> str:
        """SHA-256 over all that decides the hidden states: weights, tokenizer and number of tokens."""
        return sha256_of(self.model, self.tokenize.fingerprint())

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """fp32 hidden states (B, T, E)."""
        input_ids, mask = (each.to(self.device) for each in self.tokenize(prompts))
        masks = {"attention_mask": mask} if self.masked else {}
        return self.model(input_ids=input_ids, **masks).last_hidden_state


class TextContext(nn.Module):
    """The trainable part of the text's way into the network."""

    def __init__(self, settings: TextSettings, inputs: TextInputs) -> None:
        super().__init__()
        self.encoder: Any = None
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

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`input_ids` int64 (B, T), or `encoder_hidden_states` (B, T, E) -> (B, T, D)."""
        if self.encoder is None:
            return self.projection(batch["encoder_hidden_states"])
        # Without a mask, as pipelines call it: padding follows the end mark, and the encoder looks back only.
        return self.encoder(input_ids=batch["input_ids"]).last_hidden_state
