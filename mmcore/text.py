"""Tokenizers of captions: the protocol, and a vocabulary of words built from the training captions.

Pretrained tokenizers are in `mmcore.frozen.tokenizers`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(len(SPECIAL))
# The file of a WordVocabulary.
WORDS_FILE = "words.json"


@dataclass(frozen=True)
class TokenIds:
    """The size of a vocabulary and its special ids."""

    size: int
    """Size of the vocabulary; ids are 0 to size - 1."""
    bos_id: int
    """Begin token."""
    eos_id: int
    """End token."""
    silent_ids: tuple[int, ...]
    """Tokens that a decoder never generates, such as padding, begin and unknown."""


class CaptionTokenizer(Protocol):
    """Captions to ids and back."""

    @property
    def token_ids(self) -> TokenIds: ...

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Begin token, caption, end token: at most `max_length` ids. A longer caption is truncated at its end."""

    def decode(self, ids: Sequence[int]) -> str:
        """The caption up to the first end token, without begin, padding and unknown tokens."""

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the ids."""

    def files(self) -> dict[str, bytes]:
        """The tokenizer as files by name, for `mmcore.frozen.tokenizers.read_caption_tokenizer`."""


@dataclass(frozen=True)
class WordVocabulary:
    """Words split at white space, the most frequent first. Ids 0 to 3 are padding, begin, end and unknown."""

    words: tuple[str, ...]
    lowercase: bool

    @classmethod
    def build(cls, captions: Iterable[str], *, min_count: int, lowercase: bool) -> "WordVocabulary":
        """The words that occur at least `min_count` times in `captions`. Ties are in alphabetical order."""
        counts = Counter(word for caption in captions for word in (caption.lower() if lowercase else caption).split())
        kept = sorted(
            (word for word, count in counts.items() if count >= min_count and word not in SPECIAL),
            key=lambda word: (-counts[word], word),
        )
        return cls(words=tuple(kept), lowercase=lowercase)

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    @property
    def token_ids(self) -> TokenIds:
        return TokenIds(len(self), BOS_ID, EOS_ID, (PAD_ID, BOS_ID, UNK_ID))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        return {WORDS_FILE: self.to_json().encode()}

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, start=len(SPECIAL))}

    def encode(self, caption: str, max_length: int) -> list[int]:
        """``<bos> words <eos>``: at most `max_length` ids. A longer caption is truncated at its end."""
        words = (caption.lower() if self.lowercase else caption).split()
        ids = [BOS_ID, *(self.ids.get(word, UNK_ID) for word in words), EOS_ID]
        return ids[:max_length]

    def decode(self, ids: Sequence[int]) -> str:
        """The words up to the first end token, without begin, padding and unknown tokens."""
        words = []
        for index in ids:
            if index == EOS_ID:
                break
            if index >= len(SPECIAL):
                words.append(self.words[index - len(SPECIAL)])
        return " ".join(words)

    def to_json(self) -> str:
        return json.dumps({"lowercase": self.lowercase, "words": self.words}, ensure_ascii=False, indent=0)

    @classmethod
    def from_json(cls, text: str) -> "WordVocabulary":
        fields = json.loads(text)
        return cls(words=tuple(fields["words"]), lowercase=bool(fields["lowercase"]))
