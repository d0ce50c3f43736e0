"""The scores of a retriever on the images and captions of a split.

Shapes: N images, M captions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jobs.runtime.progress import progress
from jobs.runtime.retriever_features import dataset_features, dataset_pixels, similarities, text_features
from mmcore.metrics.retrieval import RetrievalCounts, pairs_to_rerank
from mmcore.recipe import Retriever

_WHAT = "retrieval"


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
    image_ids, texts = list(captions), [text for each in captions.values() for text in each]
    images_NQF = dataset_features(retriever, storage, dataset, image_ids, batch_size, _WHAT)
    similarity_NM = similarities(images_NQF, text_features(retriever, texts, batch_size))
    image_of_text_M = np.repeat(np.arange(len(captions)), [len(each) for each in captions.values()])
    counts = {"num_images": len(captions), "num_texts": len(texts)}
    first = RetrievalCounts.of(similarity_NM, image_of_text_M).scores()
    if not rerank:
        return {**first, **counts, "ranked_by": "ITC" if retriever.reads_pairs else "cosine"}
    wanted_NM = pairs_to_rerank(similarity_NM, rerank)
    scores_NM = _pair_scores(retriever, storage, dataset, image_ids, texts, wanted_NM)
    scores = RetrievalCounts.reranked(similarity_NM, scores_NM, rerank, image_of_text_M).scores()
    ranked_by = f"ITC, then the best {rerank} by ITM"
    return {**scores, **counts, "ranked_by": ranked_by, "num_pairs": int(wanted_NM.sum()), "itc": first}


def _pair_scores(
    retriever: Retriever,
    storage: str,
    dataset: str,
    image_ids: Sequence[str],
    texts: Sequence[str],
    wanted_NM: np.ndarray,
) -> np.ndarray:
    """The score of each pair in `wanted_NM`, and NaN for the others: float64 (N, M)."""
    scores_NM = np.full(wanted_NM.shape, np.nan)
    done, total = 0, int(wanted_NM.sum())
    with progress(_WHAT, "pairs") as report:
        report(done, total)
        # One image at a time: all its texts share the keys and values of the image.
        for place, image in dataset_pixels(storage, dataset, image_ids, retriever.image_size):
            mine = np.flatnonzero(wanted_NM[place])
            own = [texts[text] for text in mine.tolist()]
            scores_NM[place, mine] = retriever.match(image[None], [own])[0].numpy()
            done += len(mine)
            report(done, total)
    return scores_NM
