"""CLIPScore of a dataset's captions, of predicted captions, or of generated images, by a trained retriever.

Shapes: N images, M texts, Q features of an image, F features.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.runtime.retriever_features import dataset_features, image_features, pair_similarities, text_features
from jobs.runtime.retriever_scores import ClipScoreSettings
from jobs.runtime.scores_place import DEFAULT_DATASET
from mmcore.data.manifest import read_finished, read_images
from mmcore.data.predictions import read_predictions
from mmcore.data.prepared import read_split
from mmcore.data.references import prepared_references
from mmcore.errors import InputError
from mmcore.images import resize_image
from mmcore.metrics.clip_score import clip_scores
from mmcore.metrics.matching import match_predictions
from mmcore.recipe import Retriever
from mmcore.storage import Storage

_WHAT = "clip score"


def score_pairs(retriever: Retriever, settings: ClipScoreSettings) -> dict[str, Any]:
    """Load the retriever and score each text on its image. Returns plain JSON values."""
    if settings.sweep is not None:
        images_NQF, texts = _of_sweep(retriever, settings.sweep, settings.batch_size)
    else:
        images_NQF, texts = _of_dataset(retriever, settings)
    texts_MF = text_features(retriever, [text for each in texts for text in each], settings.batch_size)
    own_M = np.repeat(np.arange(len(texts)), [len(each) for each in texts])
    # In a random cyclic order each image gets the texts of the next one, never its own.
    order = random.Random(0).sample(range(len(texts)), len(texts))
    next_N = np.empty(len(texts), dtype=np.int64)
    next_N[order] = [*order[1:], order[0]]
    own, others = (float(_mean_score(images_NQF, of_M, texts_MF)) for of_M in (own_M, next_N[own_M]))
    counts = {"num_images": len(texts), "num_texts": len(own_M)}
    return {score_name(retriever.identity()): own, "shuffled": others, **counts}


def score_name(identity: dict[str, str]) -> str:
    """`clip_score[RECIPE/NAME@WEIGHTS]`: the run, and the first digits of the SHA-256 of its weights."""
    run = "/".join(identity["run"].rstrip("/").split("/")[-2:])
    return f"clip_score[{run}@{identity['weights_sha256'][:8]}]"


def _mean_score(images_NQF: Tensor, image_of_text_M: np.ndarray, texts_MF: Tensor) -> np.floating:
    return clip_scores(pair_similarities(images_NQF, image_of_text_M, texts_MF)).mean()


def _load(retriever: Retriever, num_images: int) -> None:
    if num_images < 2:
        raise InputError(f"{num_images} image: at least 2 are needed to measure chance")
    retriever.load("cuda" if torch.cuda.is_available() else "cpu")


def _of_sweep(retriever: Retriever, sweep_uri: str, batch_size: int) -> tuple[Tensor, Sequence[Sequence[str]]]:
    """Features (N, Q, F) of the images of a sweep, and the prompt of each."""
    sweep = Storage(sweep_uri)
    manifest, _ = read_finished(sweep)
    _load(retriever, len(manifest))
    images = (resize_image(Image.fromarray(image), retriever.image_size) for image in read_images(sweep, manifest))
    features_NQF = image_features(retriever, images, len(manifest), batch_size, _WHAT)
    return features_NQF, [[prompt] for prompt in manifest["prompt"].to_pylist()]


def _of_dataset(retriever: Retriever, settings: ClipScoreSettings) -> tuple[Tensor, Sequence[Sequence[str]]]:
    """Features (N, Q, F) of the images of a dataset, and the predicted caption of each, or its own ones."""
    storage, dataset = settings.storage, settings.dataset or DEFAULT_DATASET
    assert storage is not None, "settings.check() was not called"
    references = prepared_references(storage, dataset)
    expected = None if settings.split is None else read_split(settings.split, storage, dataset)[2]
    if settings.predictions is not None:
        predictions = read_predictions(settings.predictions, references.image_ids)
        captions = {name: [text] for name, text in match_predictions(predictions, references, expected).items()}
    else:
        chosen = references.captions if expected is None else expected
        captions = {name: references.captions[name] for name in chosen if references.captions[name]}
    _load(retriever, len(captions))
    features_NQF = dataset_features(retriever, storage, dataset, list(captions), settings.batch_size, _WHAT)
    return features_NQF, list(captions.values())
