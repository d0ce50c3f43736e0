"""The scores of a retriever on the images and captions of a split.

Shapes: N images, M captions, Q features of an image, F features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmcore.data.prepared import prepared_images
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.metrics.retrieval import RetrievalCounts
from mmcore.recipe import Retriever


def score_retrieval(
    retriever: Retriever, storage: str, dataset: str, captions: Mapping[str, Sequence[str]], batch_size: int
) -> dict[str, Any]:
    """Load the retriever and rank the `captions` of the images of a prepared dataset. Returns plain JSON values.

    `captions`: by image_id. Raises InputError for an image that is broken, or weights that are not those of the run.
    """
    retriever.load("cuda" if torch.cuda.is_available() else "cpu")
    texts = [text for each in captions.values() for text in each]
    similarity_NM = _similarities(retriever, storage, dataset, list(captions), texts, batch_size)
    image_of_text_M = np.repeat(np.arange(len(captions)), [len(each) for each in captions.values()])
    scores = RetrievalCounts.of(similarity_NM, image_of_text_M).scores()
    return {**scores, "num_images": len(captions), "num_texts": len(texts)}


def _similarities(
    retriever: Retriever, storage: str, dataset: str, image_ids: Sequence[str], texts: Sequence[str], batch_size: int
) -> np.ndarray:
    """Each image with each text: float64 (N, M), rows in the order of `image_ids`."""
    places = {image_id: place for place, image_id in enumerate(image_ids)}
    images: list[torch.Tensor | None] = [None] * len(image_ids)
    batch: list[tuple[str, bytes]] = []

    def flush() -> None:
        names = [name for name, _ in batch]
        features = retriever.image_features(pixels_from_bytes([data for _, data in batch], retriever.image_size, names))
        for name, each in zip(names, features, strict=True):
            images[places[name]] = each
        batch.clear()

    for image_id, data in prepared_images(storage, dataset):
        if image_id in places:
            batch.append((image_id, data))
            if len(batch) == batch_size:
                flush()
    if batch:
        flush()
    images_NQF = torch.stack([each for each in images if each is not None])
    starts = range(0, len(texts), batch_size)
    texts_MF = torch.cat([retriever.text_features(texts[start : start + batch_size]) for start in starts])
    return torch.einsum("nqf,mf->nqm", images_NQF, texts_MF).amax(dim=1).double().numpy()
