"""Opens a trained model that compares images and texts.

Shapes: B images or texts, Q features of an image, F features, T tokens, P pixels a side.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmcore.captioners.contrastive import ContrastiveRecipe
from mmcore.captioners.facts import ContrastiveFacts
from mmcore.catalogue import read_model_file
from mmcore.frozen.tokenizers import read_caption_tokenizer
from mmcore.frozen.vision import FrozenVisionEncoder
from mmcore.recipe import Identity, Retriever
from mmcore.run_files import TOKENIZER_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.image_encoder import encoder_name, load_encoder
from mmcore.trained.network import load_network


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

    def __init__(self, run: Storage, file: RunFile[ContrastiveRecipe, ContrastiveFacts], encoder: str | None) -> None:
        self.run, self.file, self.recipe = run, file, file.recipe
        self.encoder_name = encoder_name(self.recipe, encoder)
        self.image_size, self.max_length = self.recipe.image_size, self.recipe.max_length

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def load(self, device: str = "cpu") -> Self:
        self.device = torch.device(device)
        self.tokenizer = read_caption_tokenizer(self.run / "model" / TOKENIZER_ASSET)
        self.model = load_network(self.run, self.file, self.device)
        if not self.recipe.train_text_encoder:
            # The run saves what it trained, so a frozen text encoder is read again.
            self.model.load_pretrained()
        self.encoder = load_encoder(self.encoder_name, self.run, self.file, device)
        return self

    @torch.inference_mode()
    def image_features(self, pixels: np.ndarray) -> Tensor:
        images = torch.from_numpy(pixels).to(self.device) if self.encoder is None else self.encoder(pixels)
        return self.model.image_features(images)[:, None].float().cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        encoded = [self.tokenizer.encode(text, self.max_length) for text in texts]
        lengths_B = torch.tensor([len(ids) for ids in encoded])
        ids_BT = torch.zeros(len(encoded), int(lengths_B.max()), dtype=torch.long)
        for row, ids in enumerate(encoded):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        return self.model.text_features(ids_BT.to(self.device), mask_BT.to(self.device)).float().cpu()


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Retriever]] = {
    ContrastiveFacts: TrainedPair,
}
"""The class that opens a run, by the type of its facts."""
