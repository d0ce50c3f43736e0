"""Frozen text encoders, and tokenizers of prompts."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.errors import InputError
from mmcore.frozen.pretrained import effective_config, load_frozen, sha256_of
from mmcore.frozen.tokenizers import TOKENIZER_FILES, load_tokenizer, read_tokenizer, special_ids, tokenizer_files
from mmcore.storage import Storage
from mmcore.text import BOS, EOS, PAD, SPECIAL, UNK

SCRATCH = "scratch"
# Vocabulary built from captions: rarer words become <unk>.
_MIN_WORD_COUNT = 2


@dataclass(frozen=True)
class TextInputs:
    """The text inputs of a network: hidden states of a frozen encoder (`width` channels), or token ids."""

    width: int | None = None
    vocabulary_size: int | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None


class PromptTokenizer:
    """Prompts -> token ids of one length, by a fast tokenizer of Hugging Face."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """Raises InputError for a tokenizer without an end token."""
        self.bos_id, self.eos_id = special_ids(tokenizer)
        if tokenizer.pad_token_id is None:
            # CLIP also pads with its end token. Tokens after the first end token are ignored.
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.eos_id)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = max_tokens
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    @classmethod
    def from_name(cls, name: str, max_tokens: int, flag: str = "--tokenizer") -> "PromptTokenizer":
        """Raises InputError, naming `flag`, if `name` is neither a folder with a tokenizer.json nor on the hub."""
        return cls(load_tokenizer(name, flag), max_tokens)

    @classmethod
    def of_words(cls, captions: Iterable[str], max_tokens: int) -> "PromptTokenizer":
        """A vocabulary of lower-cased words and punctuation that occur at least twice in `captions`."""
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
        """The tokenizer whose `files` are in `folder`."""
        return cls(read_tokenizer(folder), max_tokens)

    def files(self) -> dict[str, bytes]:
        """The tokenizer as files by name, readable by transformers."""
        return tokenizer_files(self.tokenizer)

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the ids. tokenizer_config.json is left out: it has a path."""
        marks = json.dumps([self.max_tokens, dataclasses.asdict(self.inputs())])
        return hashlib.sha256(marks.encode() + self.files()[TOKENIZER_FILES[0]]).hexdigest()

    def inputs(self) -> TextInputs:
        return TextInputs(
            vocabulary_size=len(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
        )

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of each prompt before truncation, including begin and end."""
        if not prompts:
            return []
        # verbose=False turns off a warning about prompts that are too long.
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        """The words of each prompt that are not in the vocabulary; a pretrained tokenizer spells any word."""
        if not prompts:
            return []
        encoded = self.tokenizer(
            list(prompts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        found = []
        for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            unknown = [at for id_, at in zip(ids, offsets, strict=True) if id_ == self.tokenizer.unk_token_id]
            words = [prompt[start:end] for start, end in unknown]
            # Marks of punctuation are no words.
            found.append([word for word in words if any(map(str.isalnum, word))])
        return found

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids (B, T) and the attention mask (B, T), 0 for padding."""
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]


def load_text_model(name: str) -> Any:
    """The text encoder `name` of Hugging Face, frozen; of a two-tower model such as CLIP its text encoder only.

    Raises InputError if it is not found or weights are missing.
    """
    from transformers import AutoModelForTextEncoding, CLIPTextModel

    choose = lambda config: CLIPTextModel if hasattr(config, "text_config") else AutoModelForTextEncoding
    return load_frozen(name, choose, flag="--text-encoder", what="text encoder")


def config_to_json(config: Any) -> str:
    """The configuration of a text encoder, for `text_model_from_json`. It does not depend on where it was read."""
    return json.dumps(effective_config(config), sort_keys=True)


def text_model_from_json(config: str) -> Any:
    """A text encoder of a configuration, in fp32, with random weights."""
    from transformers import AutoConfig, AutoModelForTextEncoding

    fields = json.loads(config)
    settings = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForTextEncoding.from_config(settings, trust_remote_code=False, dtype=torch.float32)
    if not torch.cuda.is_available():
        # The backward pass of PyTorch's fused attention is slow on a CPU.
        model.set_attn_implementation("eager")
    return model


class FrozenTextEncoder:
    """A frozen pretrained text encoder: prompts -> last hidden states."""

    def __init__(self, name: str, max_tokens: int, device: str = "cpu") -> None:
        """Raises InputError if `name` is not a text encoder with a tokenizer, or takes fewer tokens."""
        from transformers import CLIPTextModel

        flag = "--text-encoder"
        self.model = load_text_model(name).to(device)
        most = getattr(self.model.config, "max_position_embeddings", None) or max_tokens
        if max_tokens > most:
            raise InputError(f"max_tokens {max_tokens}: {flag} {name!r} takes at most {most}; change --max-tokens")
        self.tokenize = PromptTokenizer.from_name(name, max_tokens, flag)
        if len(self.tokenize.tokenizer) > self.model.config.vocab_size:
            raise InputError(
                f"{flag} {name!r}: its tokenizer has {len(self.tokenize.tokenizer)} tokens, the model only "
                f"{self.model.config.vocab_size}"
            )
        # CLIP's attention is causal and its padding comes last, so it needs no mask. Pipelines of diffusers give none.
        self.masked = not isinstance(self.model, CLIPTextModel)
        self.name, self.device = name, torch.device(device)

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the hidden states: weights, tokenizer and number of tokens."""
        return sha256_of(self.model, self.tokenize.fingerprint())

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        self.model.to(device)
        self.device = device

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """fp32 hidden states (B, T, E)."""
        return self.with_mask(prompts)[0]

    @torch.inference_mode()
    def with_mask(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """fp32 hidden states (B, T, E), and which tokens there are, bool (B, T)."""
        input_ids, mask = (each.to(self.device) for each in self.tokenize(prompts))
        masks = {"attention_mask": mask} if self.masked else {}
        return self.model(input_ids=input_ids, **masks).last_hidden_state.float(), mask.bool()


NO_TEXT = ""
