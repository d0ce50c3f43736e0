"""Opens a trained model that compares images and texts.

Shapes: B images or texts, C texts of one image, Q features of an image, F features, T tokens, L image tokens, E
channels of an image token, P pixels a side.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmcore.captioners.facts import ContrastiveFacts
from mmcore.captioners.qformer_captioner import QFormerFacts
from mmcore.catalogue import read_model_file
from mmcore.frozen.tokenizers import read_caption_tokenizer
from mmcore.frozen.vision import FrozenVisionEncoder
from mmcore.recipe import Identity, Retriever
from mmcore.run_files import TOKENIZER_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.image_encoder import encoder_name, image_inputs, load_encoder
from mmcore.trained.network import load_network

# Pairs of an image and a text that a Q-Former reads at once.
_NUM_PAIRS = 64


def open_retriever(source: str, *, encoder: str | None = None) -> Retriever:
    """The retriever of a finished run. Reads recipe.json and no weights. The result can be sent to another machine.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        encoder: name or folder of the frozen image encoder, if it differs from the one in recipe.json.
    Raises InputError if `source` is not a finished run of a retriever.
    """
    run = Storage(source)
    file = read_model_file(run, "retriever")
    return BY_FACTS[type(file.facts)](run, file, encoder)


class TrainedPair:
    """The two towers of a finished run with its frozen image encoder."""

    model: Any
    encoder: FrozenVisionEncoder | None
    reads_pairs = False

    def __init__(self, run: Storage, file: RunFile[Any, Any], encoder: str | None) -> None:
        self.run, self.file, self.recipe = run, file, file.recipe
        self.encoder_name = encoder_name(self.recipe, encoder)
        self.image_size: int = self.recipe.image_size
        self.max_length: int = self.recipe.max_length

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def load(self, device: str = "cpu") -> Self:
        self.device = torch.device(device)
        self.tokenizer = read_caption_tokenizer(self.run / "model" / TOKENIZER_ASSET)
        self.model = load_network(self.run, self.file, self.device)
        self._load_rest()
        self.encoder = load_encoder(self.encoder_name, self.run, self.file, device)
        return self

    def _load_rest(self) -> None:
        """Load what the run did not save."""
        if not self.recipe.train_text_encoder:
            # The run saves what it trained, so a frozen text encoder is read again.
            self.model.load_pretrained()

    @torch.inference_mode()
    def image_features(self, pixels: np.ndarray) -> Tensor:
        return self.model.image_features(image_inputs(pixels, self.encoder, self.device))[:, None].float().cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        return self.model.text_features(*self._tokens(texts)).float().cpu()

    def match(self, pixels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        numbers = [len(each) for each in texts]
        flat = [text for each in texts for text in each]
        if not flat:
            return [torch.zeros(0) for _ in texts]
        images_BQF = self.image_features(pixels).repeat_interleave(torch.tensor(numbers), dim=0)
        similarity_B = torch.einsum("bqf,bf->bq", images_BQF, self.text_features(flat)).amax(dim=1)
        return list(similarity_B.split(numbers))

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids of the tokens (B, T), int64, and which of them are no padding, bool (B, T)."""
        encoded = [self.tokenizer.encode(text, self.max_length) for text in texts]
        lengths_B = torch.tensor([len(ids) for ids in encoded])
        ids_BT = torch.zeros(len(encoded), int(lengths_B.max()), dtype=torch.long)
        for row, ids in enumerate(encoded):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        return ids_BT.to(self.device), mask_BT.to(self.device)


class TrainedQFormer(TrainedPair):
    """A Q-Former of a finished run: ITC compares features, and ITM reads an image and a text together."""

    reads_pairs = True

    def _load_rest(self) -> None:
        """The run saves all of the Q-Former."""

    @torch.inference_mode()
    def image_features(self, pixels: np.ndarray) -> Tensor:
        return self.model.image_features(image_inputs(pixels, self.encoder, self.device)).float().cpu()

    @torch.inference_mode()
    def match(self, pixels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        memory_BLE = self.model.memory(image_inputs(pixels, self.encoder, self.device))
        return [self._match(memory_BLE[row : row + 1], own) for row, own in enumerate(texts)]

    def _match(self, memory_1LE: Tensor, texts: Sequence[str]) -> Tensor:
        """Log-odds that one image belongs to each text: fp32 (C,). All texts share its keys and values."""
        keys, scores_C = self.model.qformer.memory_keys(memory_1LE), torch.empty(len(texts))
        # Texts of similar length have little padding.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), _NUM_PAIRS):
            places = order[start : start + _NUM_PAIRS]
            ids, mask = self._tokens([texts[place] for place in places])
            scores_C[places] = self.model.match(keys.repeated(len(places)), ids, mask).float().cpu()
        return scores_C


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Retriever]] = {
    ContrastiveFacts: TrainedPair,
    QFormerFacts: TrainedQFormer,
}
"""The class that opens a run, by the type of its facts."""
