"""Opens a trained captioner: pixels in, captions out."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch

from mmcore import checkpoint
from mmcore.captioners.facts import CaptionerFacts, CaptionerRecipe
from mmcore.captioners.search_options import SearchOptions
from mmcore.catalogue import read_model_file
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.tokenizers import read_caption_tokenizer
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder
from mmcore.recipe import Captioner, Identity
from mmcore.run_files import TOKENIZER_ASSET, RunFile, read_weights
from mmcore.storage import Storage
from mmcore.text import CaptionTokenizer, WordVocabulary


def open_captioner(source: str, *, encoder: str | None = None) -> Captioner:
    """The captioner of a finished run. Reads facts alone; what it returns can be sent to another machine.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        encoder: where the frozen image encoder lies on this machine, if not where the run had it.
    Raises InputError where `source` is no finished run of a captioner.
    """
    run = Storage(source)
    file = read_model_file(run, "captioner")
    return BY_FACTS[type(file.facts)](run, file, encoder)


class TrainedCaptioner:
    """The weights that a finished run keeps (of the best validation, or by `keep` the last), with the frozen encoder
    that it was trained on."""

    model: Any
    encoder: FrozenVisionEncoder | None
    options: Any = SearchOptions()
    takes_prompt = False

    def __init__(self, run: Storage, file: RunFile[CaptionerRecipe, CaptionerFacts], encoder: str | None) -> None:
        self.run, self.file, self.recipe = run, file, file.recipe
        is_scratch = self.recipe.encoder == SCRATCH
        if is_scratch and encoder is not None:
            raise InputError(f"--encoder {encoder!r}: this run's was trained with it; leave the flag out")
        # Absolute, as whoever loads it may have another working directory.
        self.encoder_name = None if is_scratch else absolute_folder(encoder or self.recipe.encoder)
        self.image_size: int = self.recipe.image_size
        self.max_length: int = self.recipe.max_length

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def check(self, options: Any) -> None:
        options.check()

    def load(self, device: str = "cpu") -> Self:
        """Raises InputError where the weights or the frozen encoder are others than the facts name."""
        facts = self.file.facts
        self.device = torch.device(device)
        self.tokenizer = self._tokenizer()
        self.model = self.recipe.build(facts)
        checkpoint.load_trainable(self.model, read_weights(self.run, self.file.weights_sha256), str(self.run))
        self.model.eval().to(self.device)
        self.encoder = None
        if self.encoder_name is not None:
            self.encoder = FrozenVisionEncoder(self.encoder_name, self.image_size, device)
            if self.encoder.fingerprint() != facts.encoder_fingerprint:
                raise InputError(
                    f"--encoder {self.encoder_name!r}: not the encoder that {self.run} was trained on; name that one"
                )
        return self

    def _tokenizer(self) -> CaptionTokenizer:
        """The copy that the run keeps. Up to commit 34e6a7a it was words, which recipe.json held."""
        if "vocabulary" in self.file.written:
            return WordVocabulary.from_json(self.file.written["vocabulary"])
        return read_caption_tokenizer(self.run / "model" / TOKENIZER_ASSET)

    @torch.inference_mode()
    def caption(self, pixels: np.ndarray, options: Any, prompts: Sequence[str] | None = None) -> list[str]:
        if prompts is not None:
            raise ValueError("this captioner takes no words beside an image")
        inputs = torch.from_numpy(pixels).to(self.device) if self.encoder is None else self.encoder(pixels)
        return [self.tokenizer.decode(ids) for ids in self.model.caption(inputs, options)]


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Captioner]] = {
    CaptionerFacts: TrainedCaptioner,
}
"""What opens a run, by the facts type of its recipe in the catalogue."""
