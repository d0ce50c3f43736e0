#!/usr/bin/env python
"""The whole pipeline on built-in data, small enough for a laptop: prepare, train, caption, score, and a page.

Command: make demo, or: python jobs/demo.py [--storage URI] [--fresh]
Needs no data, no weights and no network. Finished stages are kept; what changed since is done anew.
Exit code 1 if fewer than 80 % of the attributes that the captions name are right, or if they name too few.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow.parquet as pq
import tyro

from jobs.caption import CAPTIONS_FILE, CaptionSettings, caption
from jobs.commandline import run as run_job
from jobs.evaluate import CaptionScoreSettings, evaluate_captions
from jobs.prepare import SHAPES, PrepareSettings, prepare
from jobs.sweep import read_parts
from jobs.train_resnet_captioner import train
from jobs.trainer import Job, RunOptions, recipe_name, source_commit
from mmcore.captioners.resnet import VARIANTS, ResNetCaptionerRecipe
from mmcore.data.shapes import ShapesSettings
from mmcore.errors import InputError
from mmcore.metrics.shapes import score_captions
from mmcore.page import Html, Picture, Series, charts, gallery, line_chart, page, paragraph, section, table
from mmcore.recipe import difference, recipe_to_json
from mmcore.storage import Storage

PAGE = "index.html"
SPLIT = "test"
MIN_CORRECT = 0.8
# A caption that names little is easily right: half of what true captions name is the least.
MIN_NAMED = 0.5
NUM_PICTURES = 24
# Points of a curve: a page of ten thousand would be slow to draw and look the same.
_MAX_POINTS = 300


@dataclass(frozen=True)
class DemoSettings:
    """What the demo makes, and where."""

    storage: str = "runs/demo"
    """Folder or s3://bucket/prefix for everything, the page included."""
    fresh: bool = False
    """Start anew instead of keeping the stages that are finished."""
    num_beams: int = 3
    """Beams of the search for captions; 1 is greedy."""
    shapes: ShapesSettings = field(default_factory=ShapesSettings)
    """The built-in data."""
    captioner: ResNetCaptionerRecipe = VARIANTS["shapes"]
    """The captioner and its training."""


@dataclass
class Demo:
    """What the stages hand on to each other."""

    settings: DemoSettings
    facts: dict[str, Any] = field(default_factory=dict)
    """What each stage returned, by its title."""
    sections: list[Html] = field(default_factory=list)
    """The page, a section for each part of the pipeline."""
    failures: list[str] = field(default_factory=list)
    """One line for each score that is too low."""

    @property
    def storage(self) -> Storage:
        return Storage(self.settings.storage)

    @property
    def job(self) -> Job:
        options = RunOptions(storage=self.storage.uri)
        return Job(recipe_name("train_resnet_captioner.py"), "shapes", self.settings.captioner, options)

    @property
    def captions(self) -> Storage:
        return self.storage / "captions" / self.job.recipe_name / self.job.options.name


# -- stages --------------------------------------------------------------------------------------------------------


def prepare_shapes(demo: Demo) -> str:
    """The built-in data; other settings than last time replace it."""
    settings = PrepareSettings(dataset=SHAPES, storage=demo.storage.uri, shapes=demo.settings.shapes)
    data = demo.storage / "data" / SHAPES
    fresh = demo.settings.fresh
    if not fresh and data.exists("_SUCCESS"):
        there = json.loads(data.read("_SUCCESS"))["settings"]
        changes = difference(settings.identity(), there)
        if changes:
            print(f"the data that is there has other settings ({'; '.join(changes[:3])}): made anew", flush=True)
            fresh = True
    demo.facts["data"] = prepare(dataclasses.replace(settings, fresh=fresh))
    splits = demo.facts["data"]["splits"]["split"]
    return ", ".join(f"{count:,} {name}" for name, count in splits.items()) + " images"


def train_captioner(demo: Demo) -> str:
    """A run that is finished, or under way, with the same settings and data is kept."""
    job, fresh = demo.job, demo.settings.fresh
    if not fresh and job.run.exists("recipe.json"):
        there = json.loads(job.run.read("recipe.json"))
        changes = difference(
            {"settings": recipe_to_json(job.recipe), "dataset_fingerprint": demo.facts["data"]["fingerprint"]},
            {name: there.get(name) for name in ("settings", "dataset_fingerprint")},
        )
        if changes:
            print(f"the run that is there differs ({'; '.join(changes[:3])}): trained anew", flush=True)
            fresh = True
        elif job.run.exists("_SUCCESS"):
            print(
                f"{job.run} is finished, trained at commit {there['commit']} (now {source_commit()}): kept "
                "(--fresh trains anew)",
                flush=True,
            )
            demo.facts["train"] = json.loads(job.run.read("_SUCCESS"))
            return _trained(demo)
    if fresh:
        # Before the training, not after it: captions of the old model must not be taken for those of the new one.
        demo.captions.delete_tree()
    demo.facts["train"] = train(dataclasses.replace(job, options=dataclasses.replace(job.options, fresh=fresh)))
    return _trained(demo)


def _trained(demo: Demo) -> str:
    facts = demo.facts["train"]
    return (
        f"{facts['steps']:,} steps of {demo.settings.captioner.train.batch_size} images, "
        f"{facts['train_seconds']:.0f} s of training, {facts['precision']} on {facts['device']}"
    )


def caption_test_split(demo: Demo) -> str:
    facts = caption(
        CaptionSettings(
            run=demo.job.run.uri,
            images=(demo.storage / "data" / SHAPES).uri,
            out=demo.captions.uri,
            split=f"split:{SPLIT}",
            num_beams=demo.settings.num_beams,
        )
    )
    return f"{facts['num_rows']:,} images, {facts['rows_done_now']:,} of them now"


def score(demo: Demo) -> str:
    """BLEU against the references, and the oracle's word on every attribute that is named."""
    job = demo.job
    bleu = evaluate_captions(
        CaptionScoreSettings(
            predictions=f"{demo.captions}/{CAPTIONS_FILE}",
            storage=demo.storage.uri,
            dataset=SHAPES,
            split=f"split:{SPLIT}",
            run=job.run.uri,
        )
    )
    rows = _test_rows(demo)
    attributes = score_captions(
        [row["image"] for row in rows], [row["caption"] for row in rows], [row["captions"] for row in rows]
    )
    whole_scene = attributes.pop("whole_scene")
    text = json.dumps(attributes, indent=1).encode() + b"\n"
    (demo.storage / "scores" / job.recipe_name).write(f"{job.options.name}-attributes.json", text)
    demo.facts["score"] = attributes | {"bleu4": bleu["bleu4"]}
    demo.failures += failures(attributes)
    print("\n".join(_lines(demo.facts["score"])), flush=True)
    demo.sections += [_score_section(demo), _training_section(demo), _picture_section(rows, whole_scene)]
    return (
        f"{attributes['all']['fraction_correct']:.1%} of {sum(attributes['all']['named'].values()):,} attributes right"
    )


def _test_rows(demo: Demo) -> list[dict[str, Any]]:
    """Image, references and caption of every image of the test split."""
    table = read_parts(demo.captions, ["image_id", "caption"])
    captions = dict(zip(table["image_id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    filesystem, path = (demo.storage / "data" / SHAPES).arrow()
    images = pq.read_table(
        path, filesystem=filesystem, columns=["image_id", "image", "captions"], filters=[("split", "=", SPLIT)]
    )
    return [{**row, "caption": captions[row["image_id"]]} for row in images.to_pylist()]


def failures(attributes: dict[str, Any]) -> list[str]:
    """What is too low in the oracle's scores, a line each; empty where all is well."""
    lines = []
    correct, named = attributes["all"]["fraction_correct"], attributes["named_per_caption"]
    if correct < MIN_CORRECT:
        lines.append(f"{correct:.1%} of the attributes that the captions name are right; {MIN_CORRECT:.0%} are needed")
    needed = MIN_NAMED * attributes["named_per_reference"]
    if named < needed:
        lines.append(
            f"the captions name {named:.2f} attributes each; {needed:.2f} are needed, "
            f"{MIN_NAMED:.0%} of the {attributes['named_per_reference']:.2f} of true captions"
        )
    return lines


def _lines(scores: dict[str, Any]) -> list[str]:
    right = scores["all"]
    return [
        f"attributes right: {right['fraction_correct']:.1%} (chance {scores['shuffled']['fraction_correct']:.1%}); "
        f"seen pairs {scores['seen']['fraction_correct']:.1%}, "
        f"pairs never seen in training {scores['held_out']['fraction_correct']:.1%}",
        f"whole scenes right: {right['whole_scene']:.1%} (chance {scores['shuffled']['whole_scene']:.1%})",
        f"attributes named: {scores['named_per_caption']:.2f} a caption (true captions "
        f"{scores['named_per_reference']:.2f}); BLEU-4 {scores['bleu4']:.1f}",
    ]


# -- the page ------------------------------------------------------------------------------------------------------


def _score_section(demo: Demo) -> Html:
    scores = demo.facts["score"]
    rows = [
        ("all", scores["all"]),
        ("colour and shape pairs seen in training", scores["seen"]),
        ("with a pair never seen in training", scores["held_out"]),
        *((f"{number} object{'s' * (number != '1')}", each) for number, each in scores["objects"].items()),
        ("chance: each caption on another image", scores["shuffled"]),
    ]
    by_kind = [
        (kind, f"{named:,}", f"{scores['all']['correct'][kind] / named:.1%}" if named else "-")
        for kind, named in scores["all"]["named"].items()
    ]
    return section(
        "Captions of the test split",
        table(
            ("images", "number", "attributes right", "whole scenes right"),
            [
                (name, f"{each['num_scenes']:,}", f"{each['fraction_correct']:.1%}", f"{each['whole_scene']:.1%}")
                for name, each in rows
            ],
        ),
        paragraph(
            f"A caption names {scores['named_per_caption']:.2f} attributes on average, a true one "
            f"{scores['named_per_reference']:.2f}. BLEU-4 against five references: {scores['bleu4']:.1f}. "
            "An attribute counts only on its own object; a scene is right as a whole if all that is named is right "
            "and no object is left out or made up."
        ),
        table(("attribute", "named", "right"), by_kind),
    )


def _training_section(demo: Demo) -> Html:
    text = demo.job.run.read("metrics.jsonl").decode()
    history = [json.loads(line) for line in text.splitlines()]

    def curve(name: str) -> list[tuple[float, float]]:
        points = [(row["epoch"], row[name]) for row in history if name in row]
        size = -(-len(points) // _MAX_POINTS)
        # Means of neighbours, which also calm the noise of single batches.
        groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
        return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]

    return section(
        "Training of the captioner",
        paragraph(f"{_trained(demo)}; weights of step {demo.facts['train']['best_step']:,}, the best on validation."),
        charts(
            line_chart(
                "Loss (nats a word)",
                [Series("training", curve("loss")), Series("validation", curve("validation_loss"))],
                x_label="epoch",
            ),
            line_chart(
                "Words predicted right",
                [Series("training", curve("correct")), Series("validation", curve("validation_correct"))],
                x_label="epoch",
            ),
            line_chart("Learning rate", [Series("learning rate", curve("lr"))], x_label="epoch"),
        ),
        paragraph(
            "Not all words can be known: five captions of an image word it differently, so the loss stays above 0.",
            style="soft",
        ),
    )


def _picture_section(rows: list[dict[str, Any]], whole_scene: list[bool]) -> Html:
    pictures = [
        Picture(row["image"], row["caption"], [f"{'right' if right else 'not all right'} · {row['image_id']}"], right)
        for row, right in zip(rows[:NUM_PICTURES], whole_scene, strict=False)
    ]
    return section(
        "The first images of the test split",
        paragraph("Green: the scene is right as a whole. None was chosen by hand.", style="soft"),
        gallery(pictures),
    )


def write_page(demo: Demo, seconds: list[tuple[str, str, float]]) -> None:
    stages = table(("stage", "seconds now"), [(f"{name}: {work}", f"{spent:.1f}") for name, work, spent in seconds])
    verdict = "; ".join(demo.failures) or "All scores are above what the demo demands."
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = page(
        "From images to scored captions, on Ray",
        paragraph(verdict, style="bad" if demo.failures else "good"),
        *demo.sections,
        section("How it was made", stages, paragraph(f"{when}, commit {source_commit()}", style="soft")),
    )
    demo.storage.write(PAGE, text.encode())


# -- all of it -----------------------------------------------------------------------------------------------------

STAGES: list[tuple[str, Callable[[Demo], str]]] = [
    ("prepare the built-in Shapes data", prepare_shapes),
    ("train a captioner", train_captioner),
    ("caption the test split", caption_test_split),
    ("score the captions", score),
]
"""Title and function, in order; each function adds to the Demo and says in a few words what work was done."""


def run_demo(settings: DemoSettings) -> Demo:
    """All stages, then the page, which is written for low scores too."""
    if settings.shapes.num_test < 2:
        raise InputError(f"--shapes.num-test {settings.shapes.num_test}: at least 2 are needed to score them")
    demo = Demo(settings)
    seconds: list[tuple[str, str, float]] = []
    for number, (title, stage) in enumerate(STAGES, start=1):
        print(f"\n== {number}/{len(STAGES)} {title}", flush=True)
        start = time.perf_counter()
        work = stage(demo)
        seconds.append((title, work, time.perf_counter() - start))
        print(f"== {number}/{len(STAGES)} done in {seconds[-1][2]:.0f} s: {work}", flush=True)
    write_page(demo, seconds)
    print(f"\npage: {demo.storage}/{PAGE} ({sum(spent for _, _, spent in seconds):.0f} s in all)", flush=True)
    return demo


def main() -> None:
    demo = run_demo(tyro.cli(DemoSettings, description=__doc__, prog="python jobs/demo.py"))
    if demo.failures:
        sys.exit(f"error: {'; '.join(demo.failures)}")


if __name__ == "__main__":
    run_job(main)
