#!/usr/bin/env python
"""Measures how many captions of other images `jobs/capfilt.py` finds.

Command: python jobs/bench/shuffled_captions.py write --storage out --name flickr8k-noisy --share 0.3

`write` makes a dataset in which a share of the captions of the images that train is moved to other images. They are
drawn from the seed. No moved caption stays with its image. The column `shuffled` says which captions were moved.

Command: python jobs/bench/shuffled_captions.py score --storage out --name flickr8k-clean

`score` compares what was dropped for a dataset of capfilt.py with what had been moved. It prints one JSON object:
precision and recall at the threshold, and the area under the ROC curve, which needs no threshold.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.capfilt import SUMMARY, scored_rows
from jobs.runtime.commandline import run
from jobs.runtime.derived_dataset import check_derived, write_derived
from jobs.runtime.source import source_commit
from mmcore.data.prepared import TRAIN, read_captions, read_prepared
from mmcore.errors import InputError
from mmcore.flags import read_subcommand
from mmcore.seeding import derive_seed
from mmcore.storage import Storage

SHUFFLED = "shuffled"


@dataclass(frozen=True)
class WriteSettings:
    """Move a share of the captions to other images."""

    storage: str
    """Folder or s3://bucket/prefix that holds data/{dataset}, and gets data/{name}."""
    name: str
    """Name of the new dataset."""
    dataset: str = "flickr8k"
    """Prepared dataset in --storage."""
    split: str = "split_report"
    """Column of the dataset. Only captions of the images that are `train` there are moved."""
    share: float = 0.3
    """The share of the captions that are moved."""
    seed: int = 0
    """Seed of the draw."""


@dataclass(frozen=True)
class ScoreSettings:
    """Precision and recall of what capfilt.py dropped."""

    storage: str
    """Folder or s3://bucket/prefix that holds the datasets."""
    name: str
    """Dataset that jobs/capfilt.py made of one that `write` made."""


def moved(owners: np.ndarray, share: float, seed: int) -> np.ndarray:
    """For each caption the number of the caption that takes its place; `owners` are the images of the captions.

    About `share` of them, at least two, get that of another image, by one cyclic shift over the drawn ones, ordered by
    image. Raises InputError where one image has so many of them that a shift would leave captions with it.
    """
    generator = np.random.default_rng(derive_seed(seed, "shuffled"))
    number = max(2, round(share * len(owners)))
    drawn = generator.permutation(len(owners))[:number]
    # In the order of images that are drawn too, so that captions do not go to the neighbour in the dataset.
    places = generator.permutation(int(owners.max()) + 1)
    drawn = drawn[np.argsort(places[owners[drawn]], kind="stable")]
    most = int(np.bincount(owners[drawn]).max())
    if 2 * most > number:
        raise InputError(f"one image has {most} of the {number} captions to move; give a larger --share or more images")
    result = np.arange(len(owners))
    result[drawn] = np.roll(drawn, most)
    return result


def write(settings: WriteSettings) -> dict[str, Any]:
    """Write the noisy dataset; returns the facts in its ``_SUCCESS``."""
    if not 0 < settings.share <= 1:
        raise InputError(f"--share {settings.share:g}: must be above 0 and at most 1")
    storage = Storage(settings.storage)
    captions = read_captions(storage, settings.dataset, settings.split)
    fingerprint = captions.facts["fingerprint"]
    about = {"dataset": settings.dataset, "fingerprint": fingerprint, "split": settings.split}
    about |= {"shuffled_share": settings.share, "seed": settings.seed}
    if (there := check_derived(storage, settings.dataset, settings.name, about)) is not None:
        return there
    rows = captions.rows(TRAIN)
    owners = np.repeat(np.arange(len(rows)), [len(captions.captions[row]) for row in rows])
    texts = [text for row in rows for text in captions.captions[row]]
    source = moved(owners, settings.share, settings.seed)
    next_caption = iter([(texts[other], place != other) for place, other in enumerate(source.tolist())])

    def change(part: pa.Table) -> pa.Table:
        new, marks = [], []
        for own, split in zip(part["captions"].to_pylist(), part[settings.split].to_pylist(), strict=True):
            pairs = [next(next_caption) for _ in own] if split == TRAIN else [(text, False) for text in own]
            new.append([text for text, _ in pairs])
            marks.append([is_moved for _, is_moved in pairs])
        place = part.schema.get_field_index("captions")
        column = pa.array(new, part.schema.field("captions").type)
        return part.set_column(place, "captions", column).append_column(SHUFFLED, pa.array(marks, pa.list_(pa.bool_())))

    return write_derived(storage, settings.dataset, settings.name, about, change)


def detection(scores: np.ndarray, is_moved: np.ndarray, threshold: float) -> dict[str, Any]:
    """How well a score below `threshold` tells the moved captions.

    ``auc`` is the chance that a moved caption scores lower than one that stayed; equal scores count half.
    """
    dropped = scores < threshold
    hits = int((dropped & is_moved).sum())
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_moved, num_stayed = int(is_moved.sum()), int((~is_moved).sum())
    wins = ranks[~is_moved].sum() - num_stayed * (num_stayed + 1) / 2
    return {
        "num_captions": len(scores),
        "num_shuffled": num_moved,
        "num_dropped": int(dropped.sum()),
        "num_dropped_shuffled": hits,
        "precision": hits / max(1, int(dropped.sum())),
        "recall": hits / max(1, num_moved),
        "auc": float(wins / max(1, num_moved * num_stayed)),
    }


def score(settings: ScoreSettings) -> dict[str, Any]:
    """Raises InputError for a dataset that capfilt.py did not make, or not of one with moved captions."""
    storage = Storage(settings.storage)
    place = storage / "data" / settings.name
    if not place.exists(SUMMARY):
        raise InputError(f"{place}: no {SUMMARY}; name a dataset that jobs/capfilt.py made")
    summary = json.loads(place.read(SUMMARY))
    about = summary["settings"]
    table = read_prepared(settings.storage, about["dataset"], [about["split"], "image_id", SHUFFLED])
    marks = {
        image_id: marks
        for image_id, split, marks in zip(
            *(table[name].to_pylist() for name in ("image_id", about["split"], SHUFFLED)), strict=True
        )
        if split == TRAIN
    }
    scores, is_moved = [], []
    for row in scored_rows(Storage(summary["scores"])):
        scores += row.scores
        is_moved += marks[row.image_id]
    found = detection(np.array(scores), np.array(is_moved), summary["threshold"])
    return {"bench": "shuffled_captions", "commit": source_commit(), "threshold": summary["threshold"], **found} | {
        "settings": about
    }


def main() -> None:
    kinds = {"write": WriteSettings, "score": ScoreSettings}
    settings = read_subcommand(kinds, __doc__, "python jobs/bench/shuffled_captions.py", "what to do")
    result = write(settings) if isinstance(settings, WriteSettings) else score(settings)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
