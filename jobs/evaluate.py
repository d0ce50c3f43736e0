#!/usr/bin/env python
"""Score what a run produced: one JSON object on stdout, everything else on stderr, the result in a line last.

    python jobs/evaluate.py captions --predictions captions.csv --references captions.txt
    python jobs/evaluate.py shapes --sweep URI
    python jobs/evaluate.py colours --sweep URI --colours pink black green
    python jobs/evaluate.py photos --storage URI --colours pink black green --word girl
    python jobs/evaluate.py retrieval --run URI --storage URI
    python jobs/evaluate.py labels --run URI --images FOLDER --labels dog cat
    python jobs/evaluate.py clip-score --run URI --storage URI --predictions captions.csv

BLEU on Flickr8k has many dialects that differ by points, so the protocol stands in the JSON beside the
numbers: scorer, smoothing, weights, tokens, case, references per image, which images, which files.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import nltk

from jobs.runtime.commandline import counted, run
from jobs.runtime.retriever_scores import (
    ClipScoreSettings,
    LabelScoreSettings,
    RetrievalScoreSettings,
    evaluate_clip_score,
    evaluate_labels,
    evaluate_retrieval,
)
from jobs.runtime.scores_line import (
    captions_line,
    clip_score_line,
    colours_line,
    labels_line,
    retrieval_line,
    shapes_line,
)
from jobs.runtime.scores_place import DEFAULT_DATASET, find_scores_place
from mmcore.data.manifest import read_finished, read_images
from mmcore.data.predictions import read_predictions
from mmcore.data.prepared import prepared_images, read_prepared, read_split
from mmcore.data.references import References, prepared_references, read_references
from mmcore.errors import InputError
from mmcore.flags import read_subcommand
from mmcore.images import decode_image, resize_image
from mmcore.metrics.bleu import BLEU_WEIGHTS, BleuCounts, Tokens, tokenize
from mmcore.metrics.images import score_colours, score_shapes, words_of
from mmcore.metrics.matching import match_predictions
from mmcore.storage import Storage


@dataclass(frozen=True)
class CaptionScoreSettings:
    """BLEU-1 to BLEU-4 of predicted captions, times 100: nltk's corpus_bleu with method1 smoothing.

    Only the images that the predictions name are scored; `num_images` of the result is their number.
    """

    predictions: str
    """File of predictions: JSON lines, Parquet (or a folder of Parquet parts), or text such as `image,caption`."""
    references: str | None = None
    """File of captions in any form that jobs/prepare.py reads, such as captions.txt; left out, the prepared dataset in
    --storage is read."""
    protocol: Literal["plain", "report"] = "plain"
    """How --references is read. `plain`: the quotation marks of CSV are no part of a caption. `report`: as the report's
    code does, which splits captions.txt at the first comma and keeps them."""
    references_per_image: Literal[1, 5] = 5
    """References an image is scored against: its first one, or its first five."""
    lowercase: bool = False
    """Lower the case of predictions and references before scoring; the report keeps it."""
    tokens: Tokens = "spaces"
    """Tokens of predictions and references alike. `spaces`: split at white space, as the report does. `marks`: every
    mark of punctuation is a token by itself, however a captioner spaces it."""
    split: str | None = None
    """COLUMN:NAME, such as split_report:validation: the predictions must be for exactly these images.
    Needs --storage."""
    storage: str | None = None
    """Folder or s3://bucket/prefix that holds data/{dataset}, for --split and for references."""
    dataset: str | None = None
    """Prepared dataset in --storage; flickr8k where none is named."""
    run: str | None = None
    """Run that made the predictions, STORAGE/runs/RECIPE/NAME: the result is also written to
    STORAGE/scores/RECIPE/NAME.json, which holds one result at a time."""


@dataclass(frozen=True)
class ShapesScoreSettings:
    """Which of the attributes that the prompts of a sweep name are in its images, by the oracle of the Shapes data.

    Beside the score stands what the same prompts get on each other's images (`shuffled`).
    """

    sweep: str
    """Images of prompts of the Shapes data, as jobs/generate.py leaves them in its --out."""
    run: str | None = None
    """Run that made the images, STORAGE/runs/RECIPE/NAME: the result is also written to
    STORAGE/scores/RECIPE/NAME.json, which holds one result at a time."""


@dataclass(frozen=True)
class ColourScoreSettings:
    """Whether the images of a sweep lean towards the colour that their prompt names, rather than to the others."""

    sweep: str
    """Images whose prompts name one of the colours each, as jobs/generate.py leaves them in its --out."""
    colours: tuple[str, ...] = ("pink", "black", "green")
    """The colours that are told apart."""
    run: str | None = None
    """Run that made the images, STORAGE/runs/RECIPE/NAME: the result is also written to
    STORAGE/scores/RECIPE/NAME-colours.json."""


@dataclass(frozen=True)
class PhotoScoreSettings:
    """The score of `colours`, of a dataset's own photos whose captions name just one of the colours.

    What real photos get is what the score of a generator is to be compared with.
    """

    storage: str
    """Folder or s3://bucket/prefix that holds data/{dataset}."""
    dataset: str = DEFAULT_DATASET
    """Prepared dataset in --storage."""
    colours: tuple[str, ...] = ("pink", "black", "green")
    """The colours that are told apart."""
    word: str | None = None
    """Only photos with a caption that holds this word beside the colour, such as girl."""
    image_size: int = 64
    """Pixels a side to which photos are squashed first, as in training."""


def evaluate_captions(settings: CaptionScoreSettings) -> dict[str, Any]:
    """Score the predictions; with `settings.run`, write the result into the run's storage as well.

    Returns:
        bleu1..bleu4 (times 100), num_images, brevity_penalty and the lengths behind it, and `protocol`;
        all of it plain JSON values.

    Raises:
        InputError: settings that do not go together, or input that cannot be read or does not match.
    """
    check_settings(settings)
    # The place for the scores is looked at first: a mistyped run should not cost the scoring.
    scores_place = find_scores_place(settings.run) if settings.run is not None else None
    if scores_place is not None:
        check_no_other_scores(*scores_place, "predictions", Storage(settings.predictions))
    dataset = settings.dataset or DEFAULT_DATASET

    references = load_references(settings, dataset)
    expected = load_split(settings, dataset, references)
    predictions = read_predictions(settings.predictions, references.image_ids)
    captions = match_predictions(predictions, references, expected)

    counts = BleuCounts()
    num_references = []
    for image_id, caption in captions.items():
        chosen = references.captions[image_id][: settings.references_per_image]
        num_references.append(len(chosen))
        counts += BleuCounts.of(
            tokenize(caption, lowercase=settings.lowercase, tokens=settings.tokens),
            [tokenize(reference, lowercase=settings.lowercase, tokens=settings.tokens) for reference in chosen],
        )

    result: dict[str, Any] = {
        **counts.scores(),
        "num_images": len(captions),
        "brevity_penalty": counts.brevity_penalty(),
        "hypothesis_length": counts.hypothesis_length,
        "reference_length": counts.reference_length,
        "protocol": {
            "name": settings.protocol,
            "quotation_marks": "kept" if settings.protocol == "report" else "removed",
            "scorer": f"nltk {nltk.__version__} corpus_bleu",
            "smoothing": "method1",
            "weights": {name: list(weights) for name, weights in BLEU_WEIGHTS.items()},
            "tokenization": "str.split()" if settings.tokens == "spaces" else "words and marks of punctuation",
            "case": "lowered" if settings.lowercase else "kept",
            "references_per_image": {
                "asked": settings.references_per_image,
                "min": min(num_references),
                "max": max(num_references),
            },
            "split": settings.split,
            "dataset": dataset if settings.storage is not None else None,
            "storage": settings.storage,
            "references": references.location,
            "predictions": settings.predictions,
        },
    }
    if scores_place is not None:
        place, file_name = scores_place
        result |= {
            "run": settings.run,
            # Wherever the next scoring is asked for: the same file has the same name.
            "predictions": Storage(settings.predictions).uri,
            "predictions_sha256": predictions.sha256,
        }
        place.write(file_name, (json.dumps(result, indent=2) + "\n").encode())
        print(f"scores written to {place.uri}/{file_name}", file=sys.stderr)
    of = f"captions of {counted(len(references.captions), 'image')}"
    print(f"references: {references.location}: {of}, {references.form}", file=sys.stderr)
    return result


def evaluate_images(settings: ShapesScoreSettings | ColourScoreSettings) -> dict[str, Any]:
    """Score the images of a sweep; with `settings.run`, write the result into the run's storage as well.

    Returns the scores and the sweep's own settings, all of it plain JSON values. Raises InputError where there is no
    finished sweep, an image is not the one of the manifest, or the prompts are of another kind.
    """
    sweep = Storage(settings.sweep)
    manifest, plan = read_finished(sweep)
    of_shapes = isinstance(settings, ShapesScoreSettings)
    if settings.run is not None:
        # Before the scoring, which takes its time.
        place, file_name = find_scores_place(settings.run)
        name = file_name if of_shapes else f"{file_name.removesuffix('.json')}-colours.json"
        check_made_by(settings.run, sweep, plan["settings"])
        check_no_other_scores(place, name, "sweep", sweep)
    images, prompts = read_images(sweep, manifest), manifest["prompt"].to_pylist()
    if isinstance(settings, ShapesScoreSettings):
        scores = score_shapes(images, prompts)
    else:
        scores = score_colours(images, prompts, settings.colours)
    result = {**scores, "num_images": len(manifest), "sweep": sweep.uri, "settings": plan["settings"]}
    if settings.run is not None:
        place.write(name, (json.dumps(result, indent=2) + "\n").encode())
        print(f"scores written to {place.uri}/{name}", file=sys.stderr)
    return result


def evaluate_photos(settings: PhotoScoreSettings) -> dict[str, Any]:
    """Score the photos that name one of the colours in any of their captions. Returns plain JSON values.

    Raises InputError where the dataset is not prepared or no photo names one of the colours.
    """
    table = read_prepared(settings.storage, settings.dataset, ["image_id", "captions"])
    colour_of = {}
    for row in table.to_pylist():
        words = [words_of(caption) for caption in row["captions"]]
        named = set().union(*words) & set(settings.colours)
        beside = {settings.word} if settings.word is not None else set()
        if len(named) == 1 and any(each >= named | beside for each in words):
            colour_of[row["image_id"]] = named.pop()
    images, prompts = [], []
    for image_id, image in prepared_images(settings.storage, settings.dataset):
        if image_id in colour_of:
            images.append(resize_image(decode_image(image, name=image_id), settings.image_size))
            prompts.append(colour_of[image_id])
    return score_colours(images, prompts, settings.colours) | dataclasses.asdict(settings)


def check_made_by(run_uri: str, sweep: Storage, settings: dict[str, Any]) -> None:
    """Raise InputError if the images of `sweep` are not from this run.

    Runs are compared by their weights. A storage may have been moved, and a run trained again under its old name.
    """
    model = Storage(run_uri.rstrip("/")) / "model"
    weights = json.loads(model.read("recipe.json"))["weights_sha256"] if model.exists("recipe.json") else None
    if weights is None or weights != settings["weights_sha256"]:
        raise InputError(
            f"--run {run_uri}: its weights did not make the images of {sweep}, those of {settings['run']} did, as it "
            "was then; name that run, or leave --run out"
        )


def check_no_other_scores(place: Storage, name: str, key: str, source: Storage) -> None:
    """InputError where the scores of another sweep, or of other predictions (`key`), would be lost."""
    if not place.exists(name):
        return
    scored = json.loads(place.read(name)).get(key)
    if scored is None or Storage(scored) != source:
        raise InputError(
            f"{place}/{name}: holds the scores of {scored or 'something else'}, which those of {source} would replace; "
            "rename that file, or leave --run out"
        )


def check_settings(settings: CaptionScoreSettings) -> None:
    """InputError for a combination in which a setting is missing or would be ignored."""
    if settings.references is None and settings.storage is None:
        raise InputError("no references: give --references captions.txt, or --storage with a prepared dataset")
    if settings.split is not None and settings.storage is None:
        raise InputError(f"--split {settings.split}: needs --storage, which holds the dataset with that column")
    if settings.storage is not None and settings.references is not None and settings.split is None:
        raise InputError(f"--storage {settings.storage}: not read with --references but no --split; leave it out")
    if settings.protocol == "report" and settings.references is None:
        raise InputError(
            "--protocol report: needs --references captions.txt; a prepared dataset holds captions without the "
            "quotation marks that this protocol keeps"
        )
    if settings.protocol == "report" and settings.lowercase:
        raise InputError("--protocol report: keeps the case; leave --lowercase out, or --protocol")
    if settings.protocol == "report" and settings.tokens != "spaces":
        raise InputError("--protocol report: splits at spaces; leave --tokens out, or --protocol")
    if settings.dataset is not None and settings.storage is None:
        raise InputError(f"--dataset {settings.dataset}: needs --storage, which holds the dataset")


def load_references(settings: CaptionScoreSettings, dataset: str) -> References:
    """From the file where it is given, else from the prepared dataset."""
    if settings.references is not None:
        return read_references(settings.references, keep_quotes=settings.protocol == "report")
    assert settings.storage is not None
    return prepared_references(settings.storage, dataset)


def load_split(settings: CaptionScoreSettings, dataset: str, references: References) -> Collection[str] | None:
    """The image_ids of --split, each with references; None without --split."""
    if settings.split is None:
        return None
    assert settings.storage is not None
    _, _, images = read_split(settings.split, settings.storage, dataset)
    without = [image_id for image_id in images if image_id not in references.captions]
    if without:
        raise InputError(
            f"{references.location}: {len(without)} of the {len(images)} images of {settings.split} have no "
            f"references there, such as {without[0]!r}"
        )
    return images


# What scores by these settings, and what sums the result up in a line.
_SCORES: dict[type[Any], tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    CaptionScoreSettings: (evaluate_captions, captions_line),
    ShapesScoreSettings: (evaluate_images, shapes_line),
    ColourScoreSettings: (evaluate_images, colours_line),
    PhotoScoreSettings: (evaluate_photos, colours_line),
    RetrievalScoreSettings: (evaluate_retrieval, retrieval_line),
    LabelScoreSettings: (evaluate_labels, labels_line),
    ClipScoreSettings: (evaluate_clip_score, clip_score_line),
}


def main() -> None:
    kinds = {
        "captions": CaptionScoreSettings,
        "shapes": ShapesScoreSettings,
        "colours": ColourScoreSettings,
        "photos": PhotoScoreSettings,
        "retrieval": RetrievalScoreSettings,
        "labels": LabelScoreSettings,
        "clip-score": ClipScoreSettings,
    }
    settings = read_subcommand(kinds, __doc__, "python jobs/evaluate.py", "which scores")
    evaluate, in_a_line = _SCORES[type(settings)]
    result = evaluate(settings)
    print(json.dumps(result, indent=2), flush=True)
    # Below the many lines of the result, where it is seen.
    print(in_a_line(result), file=sys.stderr)
    if isinstance(settings, CaptionScoreSettings | ShapesScoreSettings | ColourScoreSettings) and settings.run is None:
        made = "captions" if isinstance(settings, CaptionScoreSettings) else "images"
        print(f"not saved: name the run that made the {made} with --run to keep the scores", file=sys.stderr)


if __name__ == "__main__":
    run(main)
