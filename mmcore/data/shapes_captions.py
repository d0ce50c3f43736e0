"""The captions of Shapes scenes: true in every word, and read exactly by shapes_parser.py.

The five captions of the dataset name every object in full, and now and then where it is or how it stands to another.
An exhaustive caption leaves nothing out: it names also each position and each clear relation of two objects.
"""

import random
from collections.abc import Callable

from mmcore.data.shapes import CAPTIONS_PER_IMAGE, SceneObject, chain, clear_relation, scene_random

_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_POSITION_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
Template = Callable[[], str]


class _Words:
    """Phrases for objects, whose synonyms `rng` draws anew at each call."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def name(self, item: SceneObject) -> str:
        return f"a {self.rng.choice(_SIZE_WORDS[item.size])} {item.colour} {item.shape}"

    def at(self, item: SceneObject) -> str:
        """The position with a space before it, or nothing where it has none."""
        return f" {_POSITION_PHRASES[item.position]}" if item.position else ""

    def named_at(self, item: SceneObject) -> str:
        return f"{self.name(item)}{self.at(item)}"

    def rel(self, first: SceneObject, second: SceneObject) -> str:
        relation = clear_relation(first, second)
        assert relation is not None
        return self.rng.choice(_RELATION_PHRASES[relation])

    def and_rel(self, first: SceneObject, second: SceneObject) -> str:
        """`first` with its position, and how it stands to what is named next: no "on the left left of"."""
        return f"{self.named_at(first)}{',' if first.position else ''} {self.rel(first, second)}"


# -- the five captions of the dataset ------------------------------------------------------------------------------


def _templates(rng: random.Random, scene: tuple[SceneObject, ...]) -> list[Template]:
    """The ways to word a scene; each call draws its own synonyms. At least six for any scene."""
    words = _Words(rng)
    name, at, rel = words.name, words.at, words.rel
    if len(scene) == 1:
        (a,) = scene
        return [*_templates_of_one(words, a), lambda: f"{name(a)} and nothing else"]
    if len(scene) == 2:
        a, b = scene
        templates = [
            lambda: f"{name(a)} {rel(a, b)} {name(b)}",
            lambda: f"there is {name(a)} {rel(a, b)} {name(b)}",
            lambda: f"{name(b)} is {rel(b, a)} {name(a)}",
            lambda: f"a picture of {name(b)} with {name(a)} {rel(a, b)} it",
            lambda: f"two shapes: {name(a)} and {name(b)}",
            lambda: f"two shapes, {name(b)} {rel(b, a)} {name(a)}",
        ]
        if a.position and b.position:
            templates.append(lambda: f"{name(a)}{at(a)} and {name(b)}{at(b)}")
            templates.append(lambda: f"{at(b).strip()} is {name(b)} and{at(a)} is {name(a)}")
        return templates
    in_chain = chain(scene)
    assert in_chain is not None
    x, m, y = in_chain
    templates = [
        lambda: f"{name(x)} {rel(x, m)} {name(m)}, which is {rel(m, y)} {name(y)}",
        lambda: f"{name(m)} {rel(m, y)} {name(y)} and {rel(m, x)} {name(x)}",
        lambda: f"a picture of {name(y)} {rel(y, m)} {name(m)} with {name(x)} {rel(x, m)} it",
        lambda: f"there is {name(m)} {rel(m, x)} {name(x)}, with {name(y)} as well",
        lambda: f"three shapes: {name(x)}, {name(y)} and {name(m)}",
        lambda: f"three shapes, {name(x)} {rel(x, m)} {name(m)} and {name(y)}",
    ]
    if x.position or m.position or y.position:
        templates.append(lambda: f"there are {name(m)}{at(m)}, {name(x)}{at(x)} and {name(y)}{at(y)}")
    return templates


def _templates_of_one(words: _Words, a: SceneObject) -> list[Template]:
    """Ways to name an object that stands alone, with its position."""
    name, at = words.name, words.at
    return [
        lambda: f"{name(a)}{at(a)}",
        lambda: f"there is {name(a)}{at(a)}",
        lambda: f"{name(a)} is{at(a)}",
        lambda: f"{at(a).strip()} is {name(a)}",
        lambda: f"a picture of {name(a)}{at(a)}",
        lambda: f"one shape: {name(a)}{at(a)}",
    ]


def caption_scene(scene: tuple[SceneObject, ...], rng: random.Random) -> list[str]:
    """Five true captions in five different templates, drawn by ``rng``. Each names every object in full."""
    objects = list(scene)
    rng.shuffle(objects)
    templates = _templates(rng, tuple(objects))
    return [template() for template in rng.sample(templates, CAPTIONS_PER_IMAGE)]


def scene_captions(seed: int, split: str, index: int, scene: tuple[SceneObject, ...]) -> list[str]:
    """The captions of scene `index`. They have their own stream, so a new template leaves the scenes as they are."""
    return caption_scene(scene, scene_random(seed, f"{split}/captions", index))


# -- exhaustive captions -------------------------------------------------------------------------------------------


def exhaustive_caption(seed: int, split: str, index: int, scene: tuple[SceneObject, ...]) -> str:
    """A true caption of scene `index` that names every object, its position where it has one, and every clear relation
    of two objects; of the words of the five captions, and with a stream of its own."""
    rng = scene_random(seed, f"{split}/exhaustive", index)
    objects = list(scene)
    rng.shuffle(objects)
    return rng.choice(_exhaustive_templates(_Words(rng), tuple(objects)))()


def _exhaustive_templates(words: _Words, scene: tuple[SceneObject, ...]) -> list[Template]:
    named_at, rel, and_rel = words.named_at, words.rel, words.and_rel
    if len(scene) == 1:
        return _templates_of_one(words, *scene)
    if len(scene) == 2:
        a, b = scene
        return [
            lambda: f"{and_rel(a, b)} {named_at(b)}",
            lambda: f"there is {and_rel(a, b)} {named_at(b)}",
            lambda: f"{named_at(b)} is {rel(b, a)} {named_at(a)}",
            lambda: f"a picture of {named_at(b)} with {and_rel(a, b)} it",
            lambda: f"two shapes: {and_rel(a, b)} {named_at(b)}",
            lambda: f"two shapes, {and_rel(b, a)} {named_at(a)}",
        ]
    in_chain = chain(scene)
    assert in_chain is not None
    x, m, y = in_chain
    if clear_relation(x, y) is None:
        return [
            lambda: f"{and_rel(x, m)} {named_at(m)}, which is {rel(m, y)} {named_at(y)}",
            lambda: f"{and_rel(m, y)} {named_at(y)} and {rel(m, x)} {named_at(x)}",
            lambda: f"a picture of {and_rel(y, m)} {named_at(m)} with {and_rel(x, m)} it",
            lambda: f"there is {and_rel(m, x)} {named_at(x)} and {rel(m, y)} {named_at(y)}",
            lambda: f"three shapes: {and_rel(x, m)} {named_at(m)}, which is {rel(m, y)} {named_at(y)}",
            lambda: f"three shapes, {and_rel(m, y)} {named_at(y)} and {rel(m, x)} {named_at(x)}",
        ]
    # The parser reads "it" as the object before the last, a person perhaps as the first. Of three objects one always
    # stands to both others alike (two of three relations are on one axis), so that both are right.
    last = next(
        item for item in scene if len({clear_relation(item, other) for other in scene if other is not item}) == 1
    )
    first, second = (item for item in scene if item is not last)

    def all_three() -> str:
        relations = f"{and_rel(first, second)} {named_at(second)} and {rel(first, last)} {named_at(last)}"
        return f"{relations}, which is {rel(last, second)} it"

    openings = ("", "there is ", "a picture of ", "three shapes: ", "three shapes, ")
    return [lambda opening=opening: f"{opening}{all_three()}" for opening in openings]  # type: ignore[misc]
