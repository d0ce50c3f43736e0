#!/usr/bin/env python
"""Caption the images of a prepared dataset anew, and keep only the captions that match their image (CapFilt).

Paper: BLIP, Li et al. 2022, https://arxiv.org/abs/2201.12086, section 3.3

    python jobs/capfilt.py --matcher RUN --storage URI --dataset NAME --name NEW --share 0.7
    python jobs/capfilt.py --matcher RUN --captioner RUN --action add --storage URI --name NEW --threshold 0.5

Scores each caption of the images that train: by its similarity to its image, or with a Q-Former by the probability
that they match. It writes STORAGE/data/NEW, on which any recipe trains by --dataset NEW, and beside it capfilt.html and
capfilt.json. The scores lie in OUT/parts/*.parquet.
Run it again to go on. Images that do not train keep their captions.
"""

import dataclasses
import heapq
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.runtime.blocks import ROWS_PER_BLOCK, Columns
from jobs.runtime.commandline import counted
from jobs.runtime.commandline import run as run_job
from jobs.runtime.derived_dataset import check_derived, write_derived
from jobs.runtime.image_blocks import ImageRows, plan_blocks
from jobs.runtime.model_flags import parse_with_options
from jobs.runtime.source import output_storage
from jobs.runtime.sweep import PARTS, run_sweep
from mmcore.captioners.search_options import SearchOptions
from mmcore.data.prepared import TRAIN, read_captions
from mmcore.errors import InputError
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.images import decode_image, png_bytes, resize_image
from mmcore.page import Picture, gallery, page, paragraph, section, table
from mmcore.recipe import Captioner, Retriever
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.retriever import open_retriever

PAGE, SUMMARY = "capfilt.html", "capfilt.json"
KEPT, DROPPED, ADDED, REFUSED = "kept", "dropped", "added", "refused"
_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("written", pa.string()),
        ("written_score", pa.float32()),
    ]
)
# Of each fate, so many captions are on the page, as images of so many pixels a side.
_NUM_SHOWN, _THUMBNAIL = 24, 160
# BLIP drops a caption that ITM takes for one of another image.
_ITM_THRESHOLD = 0.5


_ONE_OF_THEM = "--threshold and --share: give one of them, such as --share 0.7"


@dataclass(frozen=True)
class CapfiltSettings:
    """Which captions to judge, by what, and what to do with them."""

    matcher: str
    """The finished run that scores captions: STORAGE/runs/clip/NAME by the cosine of image and text, or
    STORAGE/runs/qformer/NAME by the probability of ITM that they match."""
    storage: str
    """Folder or s3://bucket/prefix that holds data/{dataset}, and gets data/{name}."""
    name: str
    """Name of the new dataset: lower-case letters, digits, - and _."""
    dataset: str = "flickr8k"
    """Prepared dataset in --storage."""
    split: str = "split_report"
    """Column of the dataset. Only the images that are `train` there are judged."""
    captioner: str | None = None
    """The finished run of a captioner, which writes one caption an image, for replace and add."""
    action: Literal["keep", "replace", "add"] = "keep"
    """All drop captions that match too little. replace puts the captioner's caption in the place of the first one that
    an image loses; add gives every image the captioner's. Both do so only where that caption matches."""
    threshold: float | None = None
    """Lowest score of a caption that matches. With a Q-Former it is a probability, by default 0.5 as in BLIP."""
    share: float | None = None
    """Instead of a threshold: this share of the dataset's captions matches, the best ones, such as 0.7."""
    out: str | None = None
    """Folder or s3://bucket/prefix for the scores, by default STORAGE/capfilt/NAME. That of an earlier call gives
    another --name its scores again."""
    encoder: str | None = None
    """Folder or name of the matcher's frozen image encoder, if it is not where its run had it."""
    captioner_encoder: str | None = None
    """The same of the captioner."""
    rows_per_block: int = ROWS_PER_BLOCK
    """Images that are scored and committed together."""
    dry_run: bool = False
    """Say what would be read and written, and stop."""
    stall_timeout: float | None = None
    """Seconds without progress after which the job ends; by default it waits."""

    def check(self) -> None:
        """Raise InputError where the fields do not go together."""
        if self.threshold is not None and self.share is not None:
            raise InputError(_ONE_OF_THEM)
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"--share {self.share:g}: must be between 0 and 1")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise InputError(f"--threshold {self.threshold}: must be a finite number")
        if self.action != "keep" and self.captioner is None:
            raise InputError(f"--action {self.action}: needs --captioner, the run that writes captions")
        if self.action == "keep" and self.captioner is not None:
            raise InputError("--captioner: has no effect with --action keep; give --action replace or add")
        if self.captioner is None and self.captioner_encoder is not None:
            raise InputError("--captioner-encoder: has no effect without --captioner; leave it out")
        if self.rows_per_block < 1:
            raise InputError(f"--rows-per-block {self.rows_per_block}: must be at least 1")

    def with_threshold(self, is_probability: bool) -> "CapfiltSettings":
        """These settings with the default threshold of probabilities. Raises InputError if the threshold is missing,
        or is none of a probability.
        """
        if self.threshold is None and self.share is None:
            if not is_probability:
                raise InputError(_ONE_OF_THEM)
            return dataclasses.replace(self, threshold=_ITM_THRESHOLD)
        if is_probability and self.threshold is not None and not 0 < self.threshold < 1:
            raise InputError(
                f"--threshold {self.threshold:g}: {self.matcher} gives the probability that image and caption match; "
                f"give one between 0 and 1, such as --threshold {_ITM_THRESHOLD:g}"
            )
        return self


class ScoreCaptions:
    """Holds the matcher, and the captioner if there is one, on a worker."""

    def __init__(self, matcher: Retriever, captioner: Captioner | None, options: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.matcher, self.options = matcher.load(device), options
        self.captioner = None if captioner is None else captioner.load(device)

    def __call__(self, rows: ImageRows) -> pa.Table:
        names, captions = rows["file_name"], cast(Columns, rows)["captions"]
        written: list[str | None] = [None] * len(names)
        if self.captioner is not None:
            pixels = pixels_from_bytes(rows["image"], self.captioner.image_size, names)
            written = list(self.captioner.caption(pixels, self.options))
        pixels = pixels_from_bytes(rows["image"], self.matcher.image_size, names)
        texts = [own + ([] if new is None else [new]) for own, new in zip(captions, written, strict=True)]
        scores = match_scores(self.matcher, pixels, texts)
        own_scores = [each[: len(own)] for each, own in zip(scores, captions, strict=True)]
        new_scores = [None if new is None else each[-1] for each, new in zip(scores, written, strict=True)]
        return pa.table([rows["image_id"], captions, own_scores, written, new_scores], schema=_SCHEMA)


def match_scores(matcher: Retriever, pixels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[list[float]]:
    """The score of each image with each of its texts: a probability if the matcher reads pairs, else the cosine."""
    scores = matcher.match(pixels, texts)
    return [(each.double().sigmoid() if matcher.reads_pairs else each).tolist() for each in scores]


@dataclass(frozen=True)
class Scored:
    """A row of the sweep: an image's own captions and the captioner's, if there is one, with their scores."""

    image_id: str
    captions: list[str]
    scores: list[float]
    written: str | None
    written_score: float | None


def decide(row: Scored, action: str, threshold: float) -> tuple[list[str], list[tuple[str, float, str]]]:
    """The captions that an image gets, and what became of each one: its text, score and fate."""
    captions: list[str | None] = []
    fates = []
    for text, score in zip(row.captions, row.scores, strict=True):
        matches = score >= threshold
        captions.append(text if matches else None)
        fates.append((text, score, KEPT if matches else DROPPED))
    if row.written is not None and (action == "add" or None in captions):
        assert row.written_score is not None
        matches = row.written_score >= threshold and row.written not in captions
        fates.append((row.written, row.written_score, ADDED if matches else REFUSED))
        if matches and action == "add":
            captions.append(row.written)
        elif matches:
            captions[captions.index(None)] = row.written
    return [text for text in captions if text is not None], fates


def threshold_of_share(scores: np.ndarray, share: float) -> float:
    """The lowest of the best scores that are `share` of all."""
    number = max(1, round(share * len(scores)))
    return float(np.sort(scores)[-number])


@dataclass
class Shown:
    """A sample of captions of each fate, the same in every run: those with the smallest hashes."""

    of_fate: dict[str, list[tuple[int, str, bytes, str, float]]] = field(default_factory=dict)

    def add(self, image_id: str, image: bytes, fates: Sequence[tuple[str, float, str]]) -> None:
        for place, (text, score, fate) in enumerate(fates):
            chosen = self.of_fate.setdefault(fate, [])
            entry = (-derive_seed(0, image_id, place), image_id, image, text, score)
            if len(chosen) < _NUM_SHOWN:
                heapq.heappush(chosen, entry)
            else:
                heapq.heappushpop(chosen, entry)

    def pictures(self, fate: str) -> list[Picture]:
        """By score, the highest first."""
        rows = sorted(self.of_fate.get(fate, []), key=lambda entry: -entry[-1])
        good = fate in (KEPT, ADDED)
        return [
            Picture(
                png_bytes(resize_image(decode_image(image, name=image_id), _THUMBNAIL)),
                image_id,
                text,
                verdict=f"{'✓' if good else '✗'} {fate}, {score:.3f}",
                good=good,
            )
            for _, image_id, image, text, score in rows
        ]


def capfilt(settings: CapfiltSettings, options: Any = None) -> dict[str, Any]:
    """Score what is not scored yet, then write the new dataset. Returns counts.

    `options`: of the captioner's search, by default the captioner's own.
    """
    settings.check()
    storage = output_storage(settings.storage, "--storage")
    table_of_captions = read_captions(storage, settings.dataset, settings.split)
    if not any(table_of_captions.captions[row] for row in table_of_captions.rows(TRAIN)):
        raise InputError(f"--dataset {settings.dataset}: the images that train have no captions; prepare it with some")
    out = output_storage(settings.out, "--out") if settings.out else storage / "capfilt" / settings.name
    matcher = open_retriever(settings.matcher, encoder=settings.encoder)
    settings = settings.with_threshold(matcher.reads_pairs)
    captioner = None
    if settings.captioner is not None:
        captioner = open_captioner(settings.captioner, encoder=settings.captioner_encoder)
        options = captioner.options if options is None else options
        captioner.check(options)
    elif options not in (None, SearchOptions()):
        raise InputError("the options of the search for captions have no effect without --captioner; leave them out")
    sweep_settings = {
        "dataset": settings.dataset,
        "fingerprint": table_of_captions.facts["fingerprint"],
        "split": settings.split,
        "matcher": matcher.identity(),
        "captioner": None if captioner is None else {**captioner.identity(), **dataclasses.asdict(options)},
        "rows_per_block": settings.rows_per_block,
    }
    chosen = {"action": settings.action, "threshold": settings.threshold, "share": settings.share}
    all_settings = {**sweep_settings, **chosen}
    finished = check_derived(storage, settings.dataset, settings.name, all_settings)
    target = storage / "data" / settings.name
    images = storage / "data" / settings.dataset
    blocks = plan_blocks(images, f"{settings.split}:{TRAIN}", settings.rows_per_block)
    blocks = dataclasses.replace(blocks, columns=("captions",))
    number = counted(blocks.num_rows, "image")
    print(f"capfilt: {number} of {images} that train -> scores in {out}, dataset in {target}", flush=True)
    if settings.dry_run:
        return {"num_rows": blocks.num_rows, "num_blocks": len(blocks.items)}
    if finished is not None:
        print(f"capfilt: {target} is finished and was made with the same settings: kept")
        return json.loads(target.read(SUMMARY))
    run_sweep(
        what="capfilt",
        out=out,
        settings=sweep_settings,
        blocks=blocks,
        worker_type=ScoreCaptions,
        worker_kwargs={"matcher": matcher, "captioner": captioner, "options": options},
        stall_timeout_s=settings.stall_timeout,
    )
    threshold = settings.threshold
    if threshold is None:
        assert settings.share is not None
        own_scores = np.array([score for row in scored_rows(out) for score in row.scores])
        threshold = threshold_of_share(own_scores, settings.share)
    score = "probability" if matcher.reads_pairs else "cosine"
    return _write(settings, storage, out, all_settings, threshold, score)


def scored_rows(out: Storage) -> Iterator[Scored]:
    """The rows of a finished sweep in the order of its plan, one file at a time."""
    folder = out / PARTS
    for name in folder.list(".parquet"):
        for row in pq.read_table(io.BytesIO(folder.read(name))).to_pylist():
            yield Scored(**row)


def _write(
    settings: CapfiltSettings,
    storage: Storage,
    out: Storage,
    all_settings: dict[str, Any],
    threshold: float,
    score: str,
) -> dict[str, Any]:
    """The new dataset with its page and counts, which are written before ``_SUCCESS``."""
    rows, fates, shown = scored_rows(out), Counter[str](), Shown()
    num_images = Counter[str]()
    target = storage / "data" / settings.name

    def change(part: pa.Table) -> pa.Table:
        new: list[list[str]] = []
        for image_id, image, own, split in zip(
            *(part[name].to_pylist() for name in ("image_id", "image", "captions", settings.split)), strict=True
        ):
            if split != TRAIN:
                new.append(own)
                continue
            row = next(rows)
            assert (row.image_id, row.captions) == (image_id, own), f"{image_id}: another row than was scored"
            captions, decided = decide(row, settings.action, threshold)
            fates.update(fate for *_, fate in decided)
            num_images["left" if captions else "left_out"] += 1
            shown.add(image_id, image, decided)
            new.append(captions)
        place = part.schema.get_field_index("captions")
        # Captions that a script described by a further column are other ones now.
        known = [name for name in part.schema.names if name in _COLUMNS or name.startswith("split")]
        column = pa.array(new, part.schema.field("captions").type)
        there = pa.array([bool(captions) for captions in new])
        return part.set_column(place, "captions", column).select(known).filter(there)

    def finish() -> dict[str, Any]:
        if not num_images["left"]:
            raise InputError(
                f"no caption of an image that trains reaches the threshold {threshold:g}; give a lower --threshold"
            )
        summary = {
            "threshold": threshold,
            "score": score,
            **{f"num_{fate}": fates[fate] for fate in (KEPT, DROPPED, ADDED, REFUSED)},
            "num_images": num_images["left"],
            "num_images_left_out": num_images["left_out"],
            "scores": out.uri,
            "settings": all_settings,
        }
        target.write(SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        target.write(PAGE, _page(settings, summary, shown).encode())
        return summary

    summary: dict[str, Any] = {}
    write_derived(storage, settings.dataset, settings.name, all_settings, change, lambda: summary.update(finish()))
    print(
        f"capfilt: from a {score} of {threshold:.4g} on: {fates[KEPT]:,} captions kept, {fates[DROPPED]:,} dropped, "
        f"{fates[ADDED]:,} added; {counted(num_images['left_out'], 'image')} without a caption left out"
    )
    print(f"capfilt: {target}, what was kept and dropped in {target}/{PAGE}", flush=True)
    return summary


_COLUMNS = ("image_id", "file_name", "image", "captions")


def _page(settings: CapfiltSettings, summary: dict[str, Any], shown: Shown) -> str:
    counts = [(fate, f"{summary[f'num_{fate}']:,}") for fate in (KEPT, DROPPED, ADDED, REFUSED)]
    counts.append(("images left out", f"{summary['num_images_left_out']:,}"))
    explanations = {
        KEPT: "Captions of the dataset that match.",
        DROPPED: "Captions of the dataset that match too little.",
        ADDED: "Captions by the captioner that match.",
        REFUSED: "Captions by the captioner that match too little, or that the image has already.",
    }
    sections = [
        section(f"{fate.capitalize()}", paragraph(text), gallery(shown.pictures(fate)))
        for fate, text in explanations.items()
        if fate in shown.of_fate
    ]
    return page(
        f"Captions of {settings.name}",
        paragraph(
            f"Captions of the dataset {settings.dataset}, scored by {settings.matcher}. A caption matches from a "
            f"{summary['score']} of {summary['threshold']:.4g} on. "
            f"Each section shows at most {_NUM_SHOWN} captions, drawn at random."
        ),
        table(("captions", "number"), counts),
        *sections,
    )


def main() -> None:
    families = {"the search for captions": SearchOptions()}
    command = "python jobs/capfilt.py"
    arguments = parse_with_options(
        CapfiltSettings, open_captioner, families, __doc__ or "", command, flag="--captioner"
    )
    capfilt(*arguments)


if __name__ == "__main__":
    run_job(main)
