"""Loads fast tokenizers of Hugging Face, by name or from files, and uses them for captions."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import WordPiece

from mmcore.errors import InputError
from mmcore.frozen.hub import not_found, quiet_load, say_fetch
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder
from mmcore.text import BOS, EOS, EOS_ID, PAD, SPECIAL, UNK, WORDS_FILE, CaptionTokenizer, TokenIds, WordVocabulary

# The setting for a vocabulary built from the captions, instead of a pretrained tokenizer.
WORDS = "words"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Beside the files of a LineTokenizer, to tell it from a PieceTokenizer.
_LINES_FILE = "lines.json"
SENTENCE_ENDS = (".", "!", "?")
# Tokenizers such as BERT's and CLIP's put every mark apart and forget the spaces around it. In the captions of
# Flickr8k, hyphens have no spaces (1,081 of 1,083), `'s` is a word (400 of 434 apostrophes), and so is any other mark.
# By these rules 40,430 of the 40,455 captions come back, in lower case. Without them 39,071 do, and 9 % by
# transformers' `decode`.
_JOINED_MARKS = (
    (re.compile(r"(?<=\w) - (?=\w)"), "-"),
    (re.compile(r"n ' t\b"), "n't"),
    (re.compile(r"(?<!\S)' (?=(?:s|t|m|d|re|ve|ll)\b)"), "'"),
)


def load_tokenizer(name: str, flag: str) -> Any:
    """The tokenizer `name`. Raises InputError, naming `flag`, if it is neither a local folder nor on the hub."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    say_fetch(name, TOKENIZER_FILES[0], what="the tokenizer of")
    try:
        with quiet_load():
            # This raises if the file is missing. Without it transformers silently creates an empty tokenizer.
            cached_file(name, TOKENIZER_FILES[0])
            return AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_found(name, flag, "tokenizer", error) from None


def read_tokenizer(folder: Storage) -> Any:
    """The tokenizer whose `tokenizer_files` are in `folder`."""
    from transformers import AutoTokenizer

    with temporary_folder("tokenizer") as local:
        for name in TOKENIZER_FILES:
            folder.download(name, local / name)
        return AutoTokenizer.from_pretrained(local, use_fast=True, trust_remote_code=False)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The tokenizer as files by name, readable by transformers."""
    # Reset the padding and truncation of the last call, which would be saved too.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    with temporary_folder("tokenizer") as local:
        tokenizer.save_pretrained(local)
        return {name: (local / name).read_bytes() for name in TOKENIZER_FILES}


def special_ids(tokenizer: Any, flag: str = "--tokenizer") -> tuple[int | None, int]:
    """The ids of the begin token (or None) and the end token. Raises InputError with `flag` if it has no end."""
    bos_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eos_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end token; choose another with {flag}")
    return bos_id, eos_id


def words_tokenizer(words: WordVocabulary, first_id: int) -> Any:
    """A fast tokenizer of transformers with the ids of `words`. Its texts begin with the token `first_id`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *words.words]
    fast = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNK))
    if words.lowercase:
        fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(
        single=f"{tokens[first_id]} $A {EOS}", special_tokens=[(tokens[first_id], first_id), (EOS, EOS_ID)]
    )
    marks = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    # The clean-up of transformers would join marks of punctuation to their words.
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **marks)


class PieceTokenizer:
    """Captions -> subword ids of a pretrained tokenizer, such as BERT's or a language model's.

    `decode` gives the captions' own form, in which marks of punctuation are words: ``the dog 's ball .``
    """

    def __init__(self, tokenizer: Any, flag: str = "--tokenizer") -> None:
        """Raises InputError, naming `flag`, for a tokenizer without an end token."""
        bos_id, eos_id = special_ids(tokenizer, flag)
        # Language models without a begin token use the end token to begin a text.
        bos_id = eos_id if bos_id is None else bos_id
        silent = sorted({*tokenizer.all_special_ids, bos_id} - {eos_id})
        self.tokenizer, self.token_ids = tokenizer, TokenIds(len(tokenizer), bos_id, eos_id, tuple(silent))
        self._forgets_spaces = self._pieces("a - b") == self._pieces("a-b")

    def _pieces(self, text: str) -> list[int]:
        # verbose=False turns off a warning about texts that are too long.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode(self, caption: str, max_length: int) -> list[int]:
        return [self.token_ids.bos_id, *self._pieces(caption), self.token_ids.eos_id][:max_length]

    def decode(self, ids: Sequence[int]) -> str:
        ended = list(ids)
        start = 1 if ended[:1] == [self.token_ids.bos_id] else 0  # begin and end may be the same token
        if self.token_ids.eos_id in ended[start:]:
            ended = ended[: ended.index(self.token_ids.eos_id, start)]
        # The clean-up of both libraries would join all marks to their words.
        if isinstance(self.tokenizer.backend_tokenizer.decoder, WordPiece):
            pieces = self.tokenizer.convert_ids_to_tokens(ended, skip_special_tokens=True)
            text = WordPiece(cleanup=False).decode(pieces)
        else:
            text = self.tokenizer.decode(ended, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self._forgets_spaces:
            for apart, joined in _JOINED_MARKS:
                text = apart.sub(joined, text)
        return text.strip()

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.token_ids).encode() + self.files()[TOKENIZER_FILES[0]]).hexdigest()

    def files(self) -> dict[str, bytes]:
        return tokenizer_files(self.tokenizer)


def first_sentence(text: str) -> str:
    """`text` up to its first ``.``, ``!`` or ``?``, with that mark."""
    ends = [place for mark in SENTENCE_ENDS if (place := text.find(mark)) >= 0]
    return text[: min(ends) + 1] if ends else text


class LineTokenizer(PieceTokenizer):
    """Captions -> subword ids of a language model: begin, caption, line break. The line break ends a caption.

    `decode` also cuts the caption after its first sentence.
    """

    def __init__(self, tokenizer: Any, flag: str = "--language-model") -> None:
        """Raises InputError, naming `flag`, for a tokenizer without an end token or without a token of a line break."""
        super().__init__(tokenizer, flag)
        # Some tokenizers put a space in front of a text. A line break alone would then be two tokens.
        *letter, line_break = tokenizer("a\n", add_special_tokens=False)["input_ids"]
        if letter != tokenizer("a", add_special_tokens=False)["input_ids"] or tokenizer.decode([line_break]) != "\n":
            name = tokenizer.name_or_path
            raise InputError(f"tokenizer {name!r} has no token of a line break; choose another with {flag}")
        ids = self.token_ids
        self.own_eos_id = ids.eos_id
        silent = tuple(sorted({*ids.silent_ids, ids.eos_id}))
        self.token_ids = TokenIds(ids.size, ids.bos_id, line_break, silent)

    def decode(self, ids: Sequence[int]) -> str:
        return first_sentence(super().decode(ids)).strip()

    def files(self) -> dict[str, bytes]:
        return {**super().files(), _LINES_FILE: b"{}"}

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """The ids of `prompt` with the begin token if the tokenizer puts one there, without an end token."""
        ids = self.tokenizer(prompt)["input_ids"]
        return tuple(ids[:-1] if ids[-1:] == [self.own_eos_id] else ids)

    def sentence_end_ids(self) -> list[int]:
        """The ids of all tokens with a ``.``, ``!`` or ``?`` in their text."""
        texts = self.tokenizer.convert_ids_to_tokens(range(self.token_ids.size))
        return [index for index, text in enumerate(texts) if text and any(mark in text for mark in SENTENCE_ENDS)]


def read_caption_tokenizer(folder: Storage) -> CaptionTokenizer:
    """The tokenizer whose ``CaptionTokenizer.files`` are in `folder`."""
    if folder.exists(WORDS_FILE):
        return WordVocabulary.from_json(folder.read(WORDS_FILE).decode())
    return (LineTokenizer if folder.exists(_LINES_FILE) else PieceTokenizer)(read_tokenizer(folder))
