"""Opens a trained captioner: images -> captions."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch

from mmcore.captioners.decoding import OnWords
from mmcore.captioners.facts import CaptionerFacts, CaptionerRecipe
from mmcore.captioners.qformer_captioner import QFormerFacts
from mmcore.captioners.qformer_llm import LanguageCaptionerFacts
from mmcore.captioners.search_options import LanguageSearchOptions, SearchOptions
from mmcore.catalogue import read_model_file
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.tokenizers import read_caption_tokenizer
from mmcore.frozen.vision import FrozenVisionEncoder
from mmcore.recipe import Captioner, Identity
from mmcore.run_files import TOKENIZER_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.text import CaptionTokenizer, WordVocabulary
from mmcore.trained.image_encoder import encoder_name, image_inputs, load_encoder
from mmcore.trained.network import load_network

OnText = Callable[[int, str], None]
"""Is told the index of an image and its caption so far."""


def open_captioner(source: str, *, encoder: str | None = None, language_model: str | None = None) -> Captioner:
    """The captioner of a finished run. Reads recipe.json and no weights. The result can be sent to another machine.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        encoder: name or folder of the frozen image encoder, if it differs from the one in recipe.json.
        language_model: the same of the frozen language model.
    Raises InputError if `source` is not a finished run of a captioner, or has no language model and one is given.
    """
    run = Storage(source)
    file = read_model_file(run, "captioner")
    if language_model is not None:
        if not isinstance(file.facts, LanguageCaptionerFacts):
            raise InputError(f"--language-model {language_model!r}: {run} has none; leave the flag out")
        recipe = dataclasses.replace(file.recipe, language_model=absolute_folder(language_model))
        file = dataclasses.replace(file, recipe=recipe)
    return BY_FACTS[type(file.facts)](run, file, encoder)


class TrainedCaptioner:
    """The saved weights of a finished run with its frozen encoder.

    The weights are the best by validation loss, or the last if `keep` is `last`.
    """

    model: Any
    encoder: FrozenVisionEncoder | None
    options: Any = SearchOptions()
    takes_prompt = False

    def __init__(self, run: Storage, file: RunFile[CaptionerRecipe, CaptionerFacts], encoder: str | None) -> None:
        self.run, self.file, self.recipe = run, file, file.recipe
        self.encoder_name = encoder_name(self.recipe, encoder)
        self.image_size: int = self.recipe.image_size
        self.max_length: int = self.recipe.max_length

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check(self, options: Any) -> None:
        options.check()

    def load(self, device: str = "cpu") -> Self:
        """Read the weights and return self. Raises InputError if they or the encoder differ from recipe.json."""
        self.device = torch.device(device)
        self.tokenizer = self._tokenizer()
        self.model = load_network(self.run, self.file, self.device)
        self.encoder = load_encoder(self.encoder_name, self.run, self.file, device)
        return self

    def _tokenizer(self) -> CaptionTokenizer:
        """The tokenizer stored with the run. Up to commit 34e6a7a the words were stored in recipe.json."""
        if "vocabulary" in self.file.written:
            return WordVocabulary.from_json(self.file.written["vocabulary"])
        return read_caption_tokenizer(self.run / "model" / TOKENIZER_ASSET)

    @torch.inference_mode()
    def caption(
        self, pixels: np.ndarray, options: Any, prompts: Sequence[str] | None = None, on_text: OnText | None = None
    ) -> list[str]:
        if prompts is not None:
            raise ValueError("this captioner takes no text prompts")
        told = self._told(on_text, len(pixels))
        return [
            self.tokenizer.decode(ids)
            for ids in self.model.caption(image_inputs(pixels, self.encoder, self.device), options, **told)
        ]

    def _told(self, on_text: OnText | None, num_images: int) -> dict[str, OnWords]:
        """The argument `on_words` of a search that tells `on_text`; none for a model that tells no words."""
        if on_text is None or "on_words" not in inspect.signature(self.model.caption).parameters:
            return {}
        written: list[list[int]] = [[] for _ in range(num_images)]

        def on_words(words: list[tuple[int, int]]) -> None:
            for image, word in words:
                written[image].append(word)
                on_text(image, self.tokenizer.decode(written[image]))

        return {"on_words": on_words}


class TrainedLanguageCaptioner(TrainedCaptioner):
    """A trained bridge with its frozen image encoder and its frozen language model, which are read by name."""

    options: Any = LanguageSearchOptions()
    takes_prompt = True

    @torch.inference_mode()
    def caption(
        self, pixels: np.ndarray, options: Any, prompts: Sequence[str] | None = None, on_text: OnText | None = None
    ) -> list[str]:
        """`prompts`: one per image; None is that of the recipe."""
        told = self._told(on_text, len(pixels))
        captions = self.model.caption(image_inputs(pixels, self.encoder, self.device), options, prompts, **told)
        return [self.tokenizer.decode(ids) for ids in captions]


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Captioner]] = {
    CaptionerFacts: TrainedCaptioner,
    LanguageCaptionerFacts: TrainedLanguageCaptioner,
    QFormerFacts: TrainedCaptioner,
}
"""The class that opens a run, by the type of its facts."""
