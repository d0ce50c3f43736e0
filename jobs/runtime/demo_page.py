"""The sections of the demo's page: what the scores, curves and images of each stage look like."""

import json
from collections.abc import Sequence
from typing import Any

from mmcore.page import Html, Picture, Series, charts, gallery, line_chart, paragraph, section, table
from mmcore.storage import Storage

NUM_PICTURES = 24
# Points of a curve: a page of ten thousand would be slow to draw and look the same.
_MAX_POINTS = 300


def _percent(correct: int, named: int) -> str:
    return f"{correct / named:.1%}" if named else "-"


def _attribute_table(what: str, scores: dict[str, Any], chance: str) -> Html:
    rows = [
        ("all", scores["all"]),
        ("colour and shape pairs seen in training", scores["seen"]),
        ("with a pair never seen in training", scores["held_out"]),
        *((f"{number} object{'s' * (number != '1')}", each) for number, each in scores["objects"].items()),
        (f"chance: {chance}", scores["shuffled"]),
    ]
    return table(
        (what, "number", "attributes right", "whole scenes right"),
        [
            (name, f"{each['num_scenes']:,}", f"{each['fraction_correct']:.1%}", f"{each['whole_scene']:.1%}")
            for name, each in rows
        ],
    )


def _kind_table(scores: dict[str, Any]) -> Html:
    named, correct = scores["all"]["named"], scores["all"]["correct"]
    rows = [(kind, f"{named[kind]:,}", _percent(correct[kind], named[kind])) for kind in named]
    return table(("attribute", "named", "right"), rows)


def caption_scores(scores: dict[str, Any]) -> Html:
    """The oracle's word on the captions."""
    return section(
        "Captions of the test split",
        _attribute_table("images", scores, "each caption on another image"),
        paragraph(
            f"A caption names {scores['named_per_caption']:.2f} attributes on average, a true one "
            f"{scores['named_per_reference']:.2f}. BLEU-4 against five references: {scores['bleu4']:.1f}. "
            "An attribute counts only on its own object; a scene is right as a whole if all that is named is right "
            "and no object is left out or made up."
        ),
        _kind_table(scores),
    )


def image_scores(scores: dict[str, Any], said: str) -> Html:
    """The oracle's word on generated images; `said` of how they were made."""
    return section(
        "Images generated from the prompts of the test split",
        _attribute_table("prompts", scores, "each prompt on another's image"),
        paragraph(said),
        _kind_table(scores),
    )


def training(title: str, run: Storage, said: str, lines: Sequence[tuple[str, dict[str, str]]], note: str = "") -> Html:
    """Curves over the epochs. `lines`: of each chart its title, and of each line its legend and its name in
    metrics.jsonl."""
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]

    def curve(name: str) -> list[tuple[float, float]]:
        points = [(row["epoch"], row[name]) for row in history if name in row]
        size = -(-len(points) // _MAX_POINTS)
        # Means of neighbours, which also calm the noise of single batches.
        groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
        return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]

    drawn = [
        line_chart(chart, [Series(legend, curve(name)) for legend, name in names.items()], x_label="epoch")
        for chart, names in lines
    ]
    return section(title, paragraph(said), charts(*drawn), *([paragraph(note, style="soft")] if note else []))


def captioned_pictures(rows: list[dict[str, Any]], whole_scene: list[bool]) -> Html:
    """The first images with their captions."""
    pictures = [
        Picture(row["image"], row["caption"], [f"{'right' if right else 'not all right'} · {row['image_id']}"], right)
        for row, right in zip(rows[:NUM_PICTURES], whole_scene, strict=False)
    ]
    return section(
        "The first images of the test split",
        paragraph("Green: the scene is right as a whole. None was chosen by hand.", style="soft"),
        gallery(pictures),
    )


def generated_pictures(images: list[bytes], prompts: list[str], whole_scene: list[bool]) -> Html:
    """The first generated images under which their prompts stand."""
    pictures = [
        Picture(image, prompt, ["right" if right else "not all right"], right)
        for image, prompt, right in zip(images[:NUM_PICTURES], prompts, whole_scene, strict=False)
    ]
    return section(
        "The first images of the sweep",
        paragraph(
            "Green: all that the prompt names is there and no object more. None was chosen by hand.", style="soft"
        ),
        gallery(pictures),
    )
