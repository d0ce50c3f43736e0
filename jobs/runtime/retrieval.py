"""The scores of a retriever on the images and captions of a split.

Shapes: N images, M captions, Q features of an image, F features.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jobs.runtime.progress import Report, progress
from mmcore.data.prepared import prepared_images
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.metrics.retrieval import RetrievalCounts, pairs_to_rerank
from mmcore.recipe import Retriever


def score_retrieval(
    retriever: Retriever,
    storage: str,
    dataset: str,
    captions: Mapping[str, Sequence[str]],
    batch_size: int,
    rerank: int = 0,
) -> dict[str, Any]:
    """Load the retriever and rank the `captions` of the images of a prepared dataset. Returns plain JSON values.

    Args:
        captions: by image_id.
        rerank: this number of the best answers is ordered again by `Retriever.match`; 0 is none.
    Raises InputError for an image that is broken, or weights that are not those of the run.
    """
    retriever.load("cuda" if torch.cuda.is_available() else "cpu")
    texts = [text for each in captions.values() for text in each]
    with progress("retrieval", "images and texts") as report:
        similarity_NM = _similarities(retriever, storage, dataset, list(captions), texts, batch_size, report)
    image_of_text_M = np.repeat(np.arange(len(captions)), [len(each) for each in captions.values()])
    counts = {"num_images": len(captions), "num_texts": len(texts)}
    first = RetrievalCounts.of(similarity_NM, image_of_text_M).scores()
    if not rerank:
        return {**first, **counts, "ranked_by": "ITC" if retriever.reads_pairs else "cosine"}
    wanted_NM = pairs_to_rerank(similarity_NM, rerank)
    with progress("retrieval", "pairs") as report:
        scores_NM = _pair_scores(retriever, storage, dataset, list(captions), texts, wanted_NM, report)
    scores = RetrievalCounts.reranked(similarity_NM, scores_NM, rerank, image_of_text_M).scores()
    ranked_by = f"ITC, then the best {rerank} by ITM"
    return {**scores, **counts, "ranked_by": ranked_by, "num_pairs": int(wanted_NM.sum()), "itc": first}


def _similarities(
    retriever: Retriever,
    storage: str,
    dataset: str,
    image_ids: Sequence[str],
    texts: Sequence[str],
    batch_size: int,
    report: Report,
) -> np.ndarray:
    """Each image with each text: float64 (N, M), rows in the order of `image_ids`."""
    images: list[torch.Tensor | None] = [None] * len(image_ids)
    batch: list[tuple[int, bytes]] = []
    total = len(image_ids) + len(texts)

    def flush() -> None:
        names = [image_ids[place] for place, _ in batch]
        features = retriever.image_features(pixels_from_bytes([data for _, data in batch], retriever.image_size, names))
        for (place, _), each in zip(batch, features, strict=True):
            images[place] = each
        batch.clear()

    for done, image in enumerate(_images(storage, dataset, image_ids), 1):
        batch.append(image)
        if len(batch) == batch_size:
            flush()
            report(done, total)
    if batch:
        flush()
    images_NQF = torch.stack([each for each in images if each is not None])
    features = []
    for start in range(0, len(texts), batch_size):
        features.append(retriever.text_features(texts[start : start + batch_size]))
        report(len(image_ids) + min(start + batch_size, len(texts)), total)
    return torch.einsum("nqf,mf->nqm", images_NQF, torch.cat(features)).amax(dim=1).double().numpy()


def _pair_scores(
    retriever: Retriever,
    storage: str,
    dataset: str,
    image_ids: Sequence[str],
    texts: Sequence[str],
    wanted_NM: np.ndarray,
    report: Report,
) -> np.ndarray:
    """The score of each pair in `wanted_NM`, and NaN for the others: float64 (N, M)."""
    scores_NM = np.full(wanted_NM.shape, np.nan)
    done, total = 0, int(wanted_NM.sum())
    report(done, total)
    for place, data in _images(storage, dataset, image_ids):
        # One image at a time: all its texts share the keys and values of the image.
        mine = np.flatnonzero(wanted_NM[place])
        pixels = pixels_from_bytes([data], retriever.image_size, [image_ids[place]])
        scores_NM[place, mine] = retriever.match(pixels, [[texts[text] for text in mine.tolist()]])[0].numpy()
        done += len(mine)
        report(done, total)
    return scores_NM


def _images(storage: str, dataset: str, image_ids: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """The place in `image_ids` and the encoded image of each of them."""
    places = {image_id: place for place, image_id in enumerate(image_ids)}
    for image_id, data in prepared_images(storage, dataset):
        if image_id in places:
            yield places[image_id], data
