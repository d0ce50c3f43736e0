"""Zero-shot labels: the label of an image is the one whose text is the most similar to it.

CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.

Shapes: N images, M labels, F features.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.runtime.blocks import Blocks, Columns, SourceItem
from jobs.runtime.image_blocks import image_files, plan_blocks, read_block
from jobs.runtime.retriever_features import image_features, similarities, text_features
from jobs.runtime.retriever_scores import LabelScoreSettings
from mmcore.errors import InputError
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.metrics.matching import listed
from mmcore.recipe import Retriever
from mmcore.storage import Storage

Chosen = tuple[str, str, str, str]
"""Image, label, cosine and true label; the last one is empty if it is not known."""
# Two texts of other tokens are never so similar, even if they differ in one word.
_ALIKE = 1 - 1e-6


def choose_labels(retriever: Retriever, settings: LabelScoreSettings) -> tuple[dict[str, Any], list[Chosen]]:
    """Load the retriever and choose a label for each image. Returns counts as plain JSON values, and a row per image.

    Raises InputError for labels that are missing, and for images or a column that cannot be read.
    """
    source = Storage(settings.images)
    # What it prints is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        blocks = plan_blocks(source, settings.split, settings.batch_size)
    there = _labels_there(blocks, source, settings.column)
    labels = list(settings.labels) or there
    if len(labels) < 2:
        found = f"only {labels[0]!r} is" if labels else "none are"
        raise InputError(f"--labels: two or more are needed, and {found} there in {source}; give --labels dog cat")
    if others := sorted({*there}.difference(labels)):
        print(f"labels: images of {listed(others)} do not count, as --labels has no such label", file=sys.stderr)
    retriever.load("cuda" if torch.cuda.is_available() else "cpu")
    texts_MF = text_features(retriever, [label_text(settings.template, label) for label in labels], settings.batch_size)
    for both in _alike(labels, texts_MF):
        print(f"labels: {listed(both)} are the same to this run, which knows other words", file=sys.stderr)
    names: list[str] = []
    truth: list[str] = []

    def pixels() -> Iterator[np.ndarray]:
        for item in blocks.items:
            rows = read_block(source, cast(SourceItem, item), [] if settings.column is None else [settings.column])
            files = rows["file_name"]
            names.extend(files)
            if settings.column is None:
                truth.extend(map(_folder, files))
            else:
                truth.extend("" if value is None else str(value) for value in cast(Columns, rows)[settings.column])
            for name, image in zip(files, rows["image"], strict=True):
                yield pixels_from_bytes([image], retriever.image_size, [name])[0]

    images_NQF = image_features(retriever, pixels(), blocks.num_rows, settings.batch_size, "labels")
    similarity_NM = similarities(images_NQF, texts_MF)
    chosen = [labels[place] for place in similarity_NM.argmax(axis=1)]
    known = [true if true in labels else "" for true in truth]
    cosines = [f"{cosine:.6f}" for cosine in similarity_NM.max(axis=1)]
    return count_labels(chosen, known, labels), list(zip(names, chosen, cosines, known, strict=True))


def label_text(template: str, label: str) -> str:
    """``a photo of a {}`` and ``traffic_light`` -> ``a photo of a traffic light``."""
    return template.replace("{}", label.replace("_", " "))


def count_labels(chosen: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """How often each label was chosen and right. Plain JSON values; accuracies are in percent, or None of no image.

    `truth`: the true label of each image, or an empty string if it is not known.
    """
    pairs = Counter(zip(truth, chosen, strict=True))
    num_images, num_chosen = Counter(truth), Counter(chosen)
    num_known = len(truth) - num_images[""]

    def percent(right: int, of: int) -> float | None:
        return 100 * right / of if of else None

    return {
        "accuracy": percent(sum(pairs[label, label] for label in labels), num_known),
        "chance": 100 / len(labels),
        "num_images": len(truth),
        "num_with_true_label": num_known,
        "labels": {
            label: {
                "num_images": num_images[label],
                "num_chosen": num_chosen[label],
                "accuracy": percent(pairs[label, label], num_images[label]),
            }
            for label in labels
        },
    }


def _labels_there(blocks: Blocks, source: Storage, column: str | None) -> list[str]:
    """The labels that the images have, by their folders or by the column. Raises InputError for a missing column."""
    files = image_files(blocks)
    if files is not None:
        if column is not None:
            raise InputError(f"--column {column}: {source} holds image files, whose folders are the labels")
        return sorted({_folder(name) for name in files} - {""})
    if column is None:
        return []
    values: set[str] = set()
    for shard in sorted({cast(Any, item)["shard"] for item in blocks.items}):
        with source.open(shard) as opened, pq.ParquetFile(opened) as file:
            if column not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise InputError(f"{source}/{shard}: no column {column!r}; give --column one of {there}")
            values.update(str(value) for value in file.read(columns=[column])[column].to_pylist() if value is not None)
    return sorted(values)


def _folder(file_name: str) -> str:
    """``animals/dog/1.jpg`` -> ``dog``; an empty string for a file in no folder."""
    return PurePosixPath(file_name).parent.name


def _alike(labels: Sequence[str], texts_MF: Tensor) -> Iterator[list[str]]:
    """Groups of labels with the same text features: the tokenizer knows none of the words that differ."""
    left = list(range(len(labels)))
    same_MM = texts_MF @ texts_MF.T > _ALIKE
    while left:
        group = [place for place in left if same_MM[left[0], place]]
        if len(group) > 1:
            yield [labels[place] for place in group]
        left = [place for place in left if place not in {*group, left[0]}]
