"""Features of many images and texts by a loaded retriever.

Shapes: N images, M texts, Q features of an image, F features, P pixels a side.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.runtime.progress import progress
from mmcore.data.prepared import prepared_images
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.recipe import Retriever

# Images, or pairs, whose products are computed at once.
_AT_ONCE = 64


def image_features(
    retriever: Retriever, images: Iterable[np.ndarray], num_images: int, batch_size: int, what: str
) -> Tensor:
    """Of the `num_images` images, uint8 (P, P, 3) with the retriever's `image_size` -> fp32 (N, Q, F).

    `what`: the work that the progress names.
    """
    features: list[Tensor] = []
    rest = iter(images)
    with progress(what, "images") as report:
        while batch := list(itertools.islice(rest, batch_size)):
            features.append(retriever.image_features(np.stack(batch)))
            report(sum(map(len, features)), num_images)
    return torch.cat(features)


def text_features(retriever: Retriever, texts: Sequence[str], batch_size: int) -> Tensor:
    """fp32 (M, F)."""
    starts = range(0, len(texts), batch_size)
    return torch.cat([retriever.text_features(texts[start : start + batch_size]) for start in starts])


def dataset_features(
    retriever: Retriever, storage: str, dataset: str, image_ids: Sequence[str], batch_size: int, what: str
) -> Tensor:
    """`image_features` of images of a prepared dataset, in the order of `image_ids`."""
    places: list[int] = []

    def pixels() -> Iterator[np.ndarray]:
        for place, image in dataset_pixels(storage, dataset, image_ids, retriever.image_size):
            places.append(place)
            yield image

    features_NQF = image_features(retriever, pixels(), len(image_ids), batch_size, what)
    return features_NQF[np.argsort(places)]


def dataset_pixels(
    storage: str, dataset: str, image_ids: Sequence[str], image_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The place in `image_ids` and the pixels, uint8 (P, P, 3), of each of them, in the order of the dataset."""
    places = {image_id: place for place, image_id in enumerate(image_ids)}
    for image_id, data in prepared_images(storage, dataset):
        if image_id in places:
            yield places[image_id], pixels_from_bytes([data], image_size, [image_id])[0]


def similarities(images_NQF: Tensor, texts_MF: Tensor) -> np.ndarray:
    """Each image with each text, by its most similar feature: float64 (N, M)."""
    # In parts, as all products at once would fill the memory.
    parts = [torch.einsum("bqf,mf->bqm", part, texts_MF).amax(dim=1) for part in images_NQF.split(_AT_ONCE)]
    return torch.cat(parts).double().numpy()


def pair_similarities(images_NQF: Tensor, image_of_text_M: np.ndarray, texts_MF: Tensor) -> np.ndarray:
    """Each text with one image: float64 (M,)."""
    owners = torch.from_numpy(image_of_text_M).split(_AT_ONCE)
    parts = [
        torch.einsum("bqf,bf->bq", images_NQF[of], texts).amax(dim=1)
        for of, texts in zip(owners, texts_MF.split(_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).double().numpy()
