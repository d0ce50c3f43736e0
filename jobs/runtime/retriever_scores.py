"""The scores of evaluate.py that a trained retriever gives: settings and results."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from jobs.runtime.csv_file import csv_bytes
from jobs.runtime.scores_place import DEFAULT_DATASET, find_scores_place
from jobs.runtime.source import output_storage
from mmcore.data.prepared import read_split
from mmcore.data.references import prepared_references
from mmcore.errors import InputError

CHOSEN_FILE = "labels.csv"
# BLIP and BLIP-2 re-rank so many answers on Flickr30k.
_NUM_RERANKED = 128


@dataclass(frozen=True)
class RetrievalScoreSettings:
    """How high the right text stands among all texts of a split, and the right image among all images.

    Recall at 1, 5 and 10 in percent, and the median rank, in both directions.
    """

    run: str
    """The finished run of a retriever, STORAGE/runs/clip/NAME or STORAGE/runs/qformer/NAME. The result is also written
    to STORAGE/scores/RECIPE/, in a file that names the run, the dataset and the split."""
    storage: str
    """Folder or s3://bucket/prefix that holds data/{dataset}."""
    dataset: str = DEFAULT_DATASET
    """Prepared dataset in --storage."""
    split: str = "split_karpathy:test"
    """COLUMN:NAME, the images and their captions."""
    captions_per_image: int = 5
    """Captions of each image, the first ones."""
    rerank: int | None = None
    """So many answers of each image and text, the best by ITC, are ordered again by ITM. 0 orders by ITC alone. A
    Q-Former alone has ITM; its default is 128."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    batch_size: int = 64
    """Images or texts whose features are computed at once."""

    def check(self) -> None:
        """Raise InputError for a field that is out of its range."""
        for name, least in (("captions_per_image", 1), ("rerank", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


@dataclass(frozen=True)
class LabelScoreSettings:
    """Zero-shot labels: each image gets the label whose text is the most similar to it.

    The accuracy is known if each image lies in a folder of the name of its label, or has its label in a column.
    """

    run: str
    """The finished run of a retriever, STORAGE/runs/clip/NAME or STORAGE/runs/qformer/NAME."""
    images: str
    """Folder or s3://bucket/prefix with image files such as dog/1.jpg, or with Parquet shards (image_id, image)."""
    labels: tuple[str, ...] = ()
    """The labels to choose from, such as dog cat. By default they are the names of the folders, or of the column."""
    template: str = "a photo of a {}"
    """The text of a label. {} stands for the label, in which _ becomes a space."""
    column: str | None = None
    """Column of the Parquet shards with the true label."""
    split: str | None = None
    """COLUMN:NAME takes one split of a prepared dataset, such as split_karpathy:test."""
    out: str | None = None
    """Folder or s3://bucket/prefix for labels.csv, which has the label and the cosine of each image."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    batch_size: int = 64
    """Images or texts whose features are computed at once."""

    def check(self) -> None:
        """Raise InputError for a field that is wrong."""
        if self.template.count("{}") != 1:
            raise InputError(f"--template {self.template!r}: must have {{}} once, for the label")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise InputError(f"--labels {' '.join(self.labels)}: give two or more, none of them twice")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")


@dataclass(frozen=True)
class ClipScoreSettings:
    """How well texts match their images, by a trained contrastive pair in place of CLIP: 2.5 * max(cosine, 0).

    CLIPScore: Hessel et al. 2021, https://arxiv.org/abs/2104.08718, without its prefix `A photo depicts`. The name of
    the score says which model gave it. Scores of different models cannot be compared. Beside the score stands what the
    same texts get on each other's images (`shuffled`).
    """

    run: str
    """The finished run of a retriever, STORAGE/runs/clip/NAME or STORAGE/runs/qformer/NAME."""
    sweep: str | None = None
    """Images and their prompts, as jobs/generate.py leaves them in its --out."""
    storage: str | None = None
    """Instead of a sweep: folder or s3://bucket/prefix that holds data/{dataset}, whose images are scored."""
    dataset: str | None = None
    """Prepared dataset in --storage; flickr8k where none is named."""
    split: str | None = None
    """COLUMN:NAME, images of the dataset. The predictions must be for exactly these."""
    predictions: str | None = None
    """File of captions of the dataset's images, in any form of `captions`. Without it the dataset's own captions are
    scored."""
    encoder: str | None = None
    """Folder or name of the frozen image encoder, if it is not where the run had it."""
    batch_size: int = 64
    """Images or texts whose features are computed at once."""

    def check(self) -> None:
        """Raise InputError for fields that do not go together."""
        if (self.sweep is None) == (self.storage is None):
            raise InputError("--sweep and --storage: give one of them, generated images or a prepared dataset")
        for name in ("dataset", "split", "predictions"):
            if self.sweep is not None and getattr(self, name) is not None:
                raise InputError(f"--{name} {getattr(self, name)}: has no effect with --sweep; give --storage instead")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")


def evaluate_retrieval(settings: RetrievalScoreSettings) -> dict[str, Any]:
    """Score the retriever on one split, and write the result beside the run. Returns plain JSON values.

    Raises InputError for a run of another kind, a dataset that is not prepared, or a split without images.
    """
    # torch is imported here, as it takes seconds and the scores of captions need none of it.
    from jobs.runtime.retrieval import score_retrieval
    from mmcore.trained.retriever import open_retriever

    settings.check()
    retriever = open_retriever(settings.run, encoder=settings.encoder)
    if settings.rerank and not retriever.reads_pairs:
        raise InputError(
            f"--rerank {settings.rerank}: {settings.run} compares features alone and has no ITM; leave the flag out"
        )
    rerank = settings.rerank
    if rerank is None:
        rerank = _NUM_RERANKED if retriever.reads_pairs else 0
    place, file_name = find_scores_place(settings.run)
    column, name, image_ids = read_split(settings.split, settings.storage, settings.dataset)
    references = prepared_references(settings.storage, settings.dataset).captions
    captions = {image_id: references[image_id][: settings.captions_per_image] for image_id in image_ids}
    if without := [image_id for image_id, texts in captions.items() if not texts]:
        raise InputError(
            f"--split {settings.split}: {len(without)} of its {len(image_ids)} images have no captions, such as "
            f"{without[0]!r}; name a split whose images all have some"
        )
    scores = score_retrieval(retriever, settings.storage, settings.dataset, captions, settings.batch_size, rerank)
    result = {**scores, **retriever.identity()}
    result |= {"settings": dataclasses.asdict(settings)}
    again = f"-rerank{rerank}" if rerank else ""
    scores_name = f"{file_name.removesuffix('.json')}-{settings.dataset}-{column}-{name}{again}.json"
    place.write(scores_name, (json.dumps(result, indent=2) + "\n").encode())
    print(f"scores written to {place.uri}/{scores_name}", file=sys.stderr)
    return result


def evaluate_labels(settings: LabelScoreSettings) -> dict[str, Any]:
    """Choose a label for each image, and count how many are right where that is known. Returns plain JSON values.

    Raises InputError for a run of another kind, images that cannot be read, and labels that are missing.
    """
    from jobs.runtime.labels import choose_labels
    from mmcore.trained.retriever import open_retriever

    settings.check()
    retriever = open_retriever(settings.run, encoder=settings.encoder)
    # Before the images are read, which takes its time.
    out = output_storage(settings.out, "--out") if settings.out is not None else None
    result, rows = choose_labels(retriever, settings)
    if out is not None:
        out.write(CHOSEN_FILE, csv_bytes(("image", "label", "cosine", "true_label"), rows))
        print(f"the label of each image is in {out}/{CHOSEN_FILE}", file=sys.stderr)
    return {**result, **retriever.identity(), "settings": dataclasses.asdict(settings)}


def evaluate_clip_score(settings: ClipScoreSettings) -> dict[str, Any]:
    """Score texts on their images. Returns plain JSON values, among them `clip_score[RECIPE/NAME@WEIGHTS]`.

    Raises InputError for a run of another kind, a sweep or dataset that is not there, and fewer than two images.
    """
    from jobs.runtime.clip_score import score_pairs
    from mmcore.trained.retriever import open_retriever

    settings.check()
    retriever = open_retriever(settings.run, encoder=settings.encoder)
    return {**score_pairs(retriever, settings), **retriever.identity(), "settings": dataclasses.asdict(settings)}
