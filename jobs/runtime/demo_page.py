"""The sections of the demo's page: what the scores, curves and images of each stage look like."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcore.data.shapes import MAX_OBJECTS, ShapesSettings
from mmcore.data.shapes_oracle import DetectedObject, JudgedText, detect_objects, judge_objects, parse_caption
from mmcore.data.shapes_parser import Span
from mmcore.images import decode_image, image_grid, png_bytes
from mmcore.page import Html, Mark, Picture, Series, beside, gallery, line_chart, paragraph, section, table
from mmcore.storage import Storage

Pixels = npt.NDArray[np.uint8]

# Points of a curve: a page of ten thousand would be slow to draw and look the same.
_MAX_POINTS = 300
_LEGEND = (
    "Green words are right. A wrong word is red and struck out, and an arrow leads to what the image shows instead, if "
    "it shows anything. The oracle takes a patch of one colour for the nearest shape, also where a person sees none. "
    "These are the first ones of the test split, not the best ones."
)


def introduction(shapes: ShapesSettings) -> Html:
    """What was made, of which scenes."""
    most = {1: "one shape", 2: "one and two shapes", 3: "one to three shapes"}[shapes.max_objects]
    fewer = "" if shapes.max_objects == MAX_OBJECTS else ", as more take longer to learn than the demo may last"
    return paragraph(
        "Two models were trained from nothing on drawn scenes. The captioner says what an image shows. The generator "
        "makes an image of a prompt: a Transformer writes one code after the other, and a VQ-VAE turns the codes into "
        f"pixels. The scenes hold {most}{fewer}. The oracle, a program that knows neither model, judges each attribute "
        "that a text names."
    )


# -- images with what is said of them ------------------------------------------------------------------------------


def judged_picture(image: bytes, text: str, shown: Pixels | None = None) -> Picture:
    """`image`, encoded, above `text`, whose words are judged by what is in it, or in the pixels `shown`."""
    found = detect_objects(decode_image(image, name="image") if shown is None else shown)
    judged = judge_objects(found, parse_caption(text))
    return Picture(image, _seen(found), text, _marks(judged), _verdict(judged), judged.whole_scene)


def _seen(found: Sequence[DetectedObject]) -> str:
    """What the oracle sees, for who does not see the image."""
    things = [f"a {it.size} {it.colour} {it.shape}" for it in found]
    return f"an image with {', '.join(things) or 'no shapes'}"


def _marks(judged: JudgedText) -> list[Mark]:
    """A word may be said of several objects ("two red circles"): it is right if it is right of all."""
    instead: dict[Span, list[str]] = {}
    for each in judged.attributes:
        instead.setdefault(each.span, []).extend([] if each.right else [each.found])
    return [
        Mark(*span, good=not wrong, instead=" or ".join(filter(None, dict.fromkeys(wrong))))
        for span, wrong in instead.items()
    ]


def _verdict(judged: JudgedText) -> str:
    if judged.whole_scene:
        return "✓ whole scene right"
    more = judged.num_found - judged.num_named
    number = f", {abs(more)} shape{'s' * (abs(more) > 1)} {'too many' if more > 0 else 'missing'}" if more else ""
    return f"✗ {judged.score.num_correct} of {judged.score.num_named} right{number}"


def captioned_pictures(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Images with their captions, which are judged by them."""
    pictures = [judged_picture(row["image"], row["caption"]) for row in rows]
    return section("Images of the test split, and what the captioner says", paragraph(_LEGEND), gallery(pictures))


def generated_pictures(images: Sequence[bytes], prompts: Sequence[str], said: str) -> Html:
    """Images above the prompts that they were made from; `said` of what better ones take."""
    pictures = [judged_picture(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return section("Prompts, and the images made from them", paragraph(_LEGEND), paragraph(said), gallery(pictures))


def reconstructions(originals: Pixels, made: Pixels, captions: Sequence[str], said: str) -> Html:
    """Images (N, H, W, 3) beside what their codes keep of them, judged by a true caption."""
    pictures = [
        judged_picture(png_bytes(image_grid(np.stack(pair), columns=2)), caption, shown=pair[1])
        for *pair, caption in zip(originals, made, captions, strict=True)
    ]
    return section("Images as codes, and back", paragraph(said), gallery(pictures, of_pairs=True))


# -- scores --------------------------------------------------------------------------------------------------------


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _score_tables(scores: dict[str, Any], chance: str) -> Html:
    """By kind of attribute, beside what the same texts score on each other's images; and by kind of scene."""
    own, shuffled = scores["all"], scores["shuffled"]
    kinds = [
        (kind, f"{named:,}", _percent(own["correct"][kind], named), _percent(shuffled["correct"][kind], named))
        for kind, named in own["named"].items()
    ]
    whole = [f"{each['whole_scene']:.1%}" for each in (own, shuffled)]
    everything = [_percent(sum(each["correct"].values()), sum(each["named"].values())) for each in (own, shuffled)]
    by_kind = table(
        ("attribute", "named", "right", "by chance"),
        [
            ("all", f"{sum(own['named'].values()):,}", *everything),
            *kinds,
            ("whole scene", f"{own['num_scenes']:,}", *whole),
        ],
    )
    by_scene = table(
        ("scenes", "number", "attributes right", "whole scenes right"),
        [
            (name, f"{each['num_scenes']:,}", f"{each['fraction_correct']:.1%}", f"{each['whole_scene']:.1%}")
            for name, each in [
                ("colours and shapes paired as in training", scores["seen"]),
                ("with a pair never seen in training", scores["held_out"]),
                *((f"{number} shape{'s' * (number != '1')}", each) for number, each in scores["objects"].items()),
            ]
        ],
    )
    note = (
        f"By chance: {chance}. An attribute counts only on its own object. A scene is right as a whole if all that is "
        "named is right, and no object is left out or made up."
    )
    return Html(beside(by_kind, by_scene) + paragraph(note, style="soft"))


def caption_scores(scores: dict[str, Any]) -> Html:
    """The oracle's word on the captions."""
    return section(
        "Scores of the captions",
        _score_tables(scores, "what the captions get on each other's images"),
        paragraph(
            f"A caption names {scores['named_per_caption']:.2f} attributes on average, a true one "
            f"{scores['named_per_reference']:.2f}. BLEU-4 against five references: {scores['bleu4']:.1f}."
        ),
    )


def image_scores(scores: dict[str, Any], said: str) -> Html:
    """The oracle's word on generated images; `said` of how they were made."""
    return section(
        "Scores of the images",
        paragraph(said),
        _score_tables(scores, "what the prompts get on each other's images"),
    )


# -- trainings -----------------------------------------------------------------------------------------------------


def captioner_training(run: Storage, said: str) -> Html:
    return _training(
        "Training of the captioner",
        run,
        said,
        [
            ("Loss (nats a word)", {"training": "loss", "validation": "validation_loss"}),
            ("Words predicted right", {"training": "correct", "validation": "validation_correct"}),
            ("Learning rate", {"learning rate": "lr"}),
        ],
        "Not all words can be known: five captions of an image word it differently, so the loss stays above 0.",
    )


def vqvae_training(run: Storage, said: str) -> Html:
    return _training(
        "Training of the VQ-VAE",
        run,
        said,
        [
            ("Loss", {"training": "loss", "validation": "validation_loss"}),
            ("Reconstruction (PSNR, dB)", {"training": "psnr", "validation": "validation_psnr"}),
            ("Codes used (share)", {"a batch": "codes_used", "validation": "validation_codes_used"}),
        ],
    )


def generator_training(run: Storage, said: str) -> Html:
    return _training(
        "Training of the Transformer over codes",
        run,
        said,
        [
            ("Loss (nats a code)", {"training": "loss", "validation": "validation_loss"}),
            ("Codes predicted right", {"training": "correct", "validation": "validation_correct"}),
            ("Learning rate", {"learning rate": "lr"}),
        ],
        "Most codes are background, and a caption leaves open where exactly an object stands: the loss stays above 0.",
    )


def _training(title: str, run: Storage, said: str, lines: Sequence[tuple[str, dict[str, str]]], note: str = "") -> Html:
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
    return section(title, paragraph(said), beside(*drawn), *([paragraph(note, style="soft")] if note else []))
