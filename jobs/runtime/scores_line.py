"""The scores of evaluate.py in one line, for a person. Each function takes a result and returns its line."""

from collections.abc import Mapping
from typing import Any

from jobs.runtime.commandline import counted


def captions_line(scores: Mapping[str, Any]) -> str:
    """``BLEU-1 62.4, BLEU-4 20.1 (of 100), 300 images of split_report:validation``."""
    split = scores["protocol"]["split"]
    return (
        f"BLEU-1 {scores['bleu1']:.1f}, BLEU-4 {scores['bleu4']:.1f} (of 100), {counted(scores['num_images'], 'image')}"
        f"{'' if split is None else f' of {split}'}"
    )


def shapes_line(scores: Mapping[str, Any]) -> str:
    """The share of correct attributes, and chance."""
    right, chance = scores["all"]["fraction_correct"], scores["shuffled"]["fraction_correct"]
    return (
        f"{right:.1%} of the attributes that the prompts of {counted(scores['num_images'], 'image')} name are in the "
        f"images; {chance:.1%} with the images exchanged, which is chance"
    )


def colours_line(scores: Mapping[str, Any]) -> str:
    """The share of images of the right colour, and chance."""
    return (
        f"{scores['fraction_correct']:.1%} of {counted(scores['num_images'], 'image')} lean towards the colour that is "
        f"named; chance {scores['chance']:.1%}"
    )


def retrieval_line(scores: Mapping[str, Any]) -> str:
    """``recall@1 0.7 %, recall@10 5.3 % image to text; ...``, then the images and texts."""
    directions = [
        f"recall@1 {scores[f'{way}_recall_at_1']:.1f} %, recall@10 {scores[f'{way}_recall_at_10']:.1f} % "
        + way.replace("_", " ")
        for way in ("image_to_text", "text_to_image")
    ]
    of = f"{counted(scores['num_images'], 'image')} and {counted(scores['num_texts'], 'text')}"
    return f"{'; '.join(directions)}; {of} of {scores['settings']['split']}"


def labels_line(scores: Mapping[str, Any]) -> str:
    """The accuracy where true labels are known, and chance."""
    if scores["accuracy"] is None:
        return f"{counted(scores['num_images'], 'image')} labelled; no true label is known"
    return (
        f"{scores['accuracy']:.1f} % of {counted(scores['num_with_true_label'], 'image')} with a true label have the "
        f"right one; chance {scores['chance']:.1f} %"
    )


def clip_score_line(scores: Mapping[str, Any]) -> str:
    """The score under its name, and chance."""
    (name,) = (key for key in scores if key.startswith("clip_score["))
    return (
        f"{name} {scores[name]:.3f}, {scores['shuffled']:.3f} with the images exchanged; "
        f"{counted(scores['num_images'], 'image')} and {counted(scores['num_texts'], 'text')}"
    )
