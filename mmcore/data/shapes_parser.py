"""Parses a text about a Shapes scene: the objects, positions, relations and number that it names.

The captions of shapes_captions.py are parsed exactly. Any other text is parsed as far as possible. Unknown words are
skipped. Broken or repeated grammar, as from a captioner early in its training, gives checkable attributes or nothing.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmcore.data.shapes import COLOURS, SHAPES

_SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
_PLURALS = {f"{shape}es" if shape == "cross" else f"{shape}s": shape for shape in SHAPES}
_ATTRIBUTES = {
    **{word: ("size", size) for word, size in _SIZE_WORDS.items()},
    **{colour: ("colour", colour) for colour in COLOURS},
}
_SHAPE_WORDS = {**{shape: shape for shape in SHAPES}, **_PLURALS}
_THING_WORDS = {"shape", "shapes", "object", "objects", "thing", "things"}
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "1": 1, "2": 2, "3": 3, "4": 4, "5": 5}
# Direction words are positions ("on the left") unless "of" and an object follow ("to the left of a circle").
_DIRECTIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
_CENTRE_WORDS = {"centre", "center", "middle"}
_RELATION_WORDS = {
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "underneath": "below",
    "beneath": "below",
}
_WHOLE_WORDS = {"image", "picture", "scene", "canvas", "frame", "photo"}
_BREAKS = {",", ".", ";", ":", "and", "with"}
_TOKEN = re.compile(r"[a-z]+|[0-9]+|[,.;:]", re.IGNORECASE | re.ASCII)

Span = tuple[int, int]
"""Where words stand in a text: the place of their first character, and that after their last."""


@dataclass(frozen=True)
class NamedObject:
    """What a text says of one object; None or empty where it says nothing."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    positions: tuple[str, ...] = ()
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False)
    """The word of each attribute, by the attribute."""


@dataclass(frozen=True)
class NamedRelation:
    """``objects[first]`` is ``relation`` (of) ``objects[second]``."""

    first: int
    relation: str
    second: int
    span: Span = field(default=(0, 0), compare=False)
    """The words of the relation."""


@dataclass(frozen=True)
class ParsedCaption:
    """All that a text names; ``count`` is the number in "two shapes", None if no such number is given."""

    objects: tuple[NamedObject, ...] = ()
    relations: tuple[NamedRelation, ...] = ()
    count: int | None = None
    count_span: Span = field(default=(0, 0), compare=False)
    """The word of the number."""


@dataclass(frozen=True)
class _Awaiting:
    """A relation of which one object, or two, are still to come."""

    relation: str
    span: Span
    first: int | None = None
    second: int | None = None


class _Reader:
    """Walks over the words once; see ``parse_caption``."""

    def __init__(self, text: str) -> None:
        tokens = list(_TOKEN.finditer(text))
        self.words = [token[0].lower() for token in tokens]
        self.places = [token.span() for token in tokens]
        self.objects: list[NamedObject] = []
        self.relations: list[NamedRelation] = []
        self.count: int | None = None
        self.count_span = (0, 0)
        self.adjectives: dict[str, str] = {}
        self.spans: dict[str, Span] = {}  # of `adjectives` and `front`
        self.number = 1
        self.subject: int | None = None  # what a relation after "and" or "," is said of
        self.awaiting: _Awaiting | None = None
        self.front: list[str] = []  # positions before their object: "on the left is a ..."
        self.after_break = True
        self.after_is = False

    def close(self, shape: str | None) -> None:
        """End a noun phrase: the adjectives gathered, and the noun if there was one, are an object."""
        if not self.adjectives and shape is None:
            return
        attributes, self.adjectives = self.adjectives, {}
        if shape is None and self.after_is and self.objects:  # "the circle is red"
            last = self.objects[-1]
            if all(getattr(last, kind) is None for kind in attributes):
                spans = {**last.spans, **{value: self.spans.pop(value) for value in attributes.values()}}
                self.objects[-1] = dataclasses.replace(last, spans=spans, **attributes)  # type: ignore[arg-type]
                return
        index = len(self.objects)
        front = tuple(dict.fromkeys(self.front))
        named = NamedObject(attributes.get("size"), attributes.get("colour"), shape, front, self.spans)
        self.objects += [named] * self.number
        self.number, self.front, self.spans, self.after_break, self.after_is = 1, [], {}, False, False
        if self.awaiting is None:
            self.subject = index
        else:
            awaiting, self.awaiting = self.awaiting, None
            if awaiting.first is not None:
                self.relations.append(NamedRelation(awaiting.first, awaiting.relation, index, awaiting.span))
            elif awaiting.second is not None:
                self.relations.append(NamedRelation(index, awaiting.relation, awaiting.second, awaiting.span))
            else:
                # "left of a circle is a square": the circle is the second object of that relation.
                self.awaiting = dataclasses.replace(awaiting, second=index)

    def relate(self, relation: str, span: Span) -> None:
        self.close(None)
        first = self.subject if self.after_break else len(self.objects) - 1
        self.awaiting = _Awaiting(relation, span, first if self.objects else None)

    def locate(self, position: str, span: Span, at: int) -> None:
        """``position`` was read; ``at`` is the place of the word after it."""
        self.close(None)
        ends = at >= len(self.words) or self.words[at] in _BREAKS
        if self.objects and (not self.after_break or ends):
            last = self.objects[-1]
            positions = tuple(dict.fromkeys((*last.positions, position)))
            self.objects[-1] = dataclasses.replace(last, positions=positions, spans={**last.spans, position: span})
        else:
            self.front.append(position)
            self.spans[position] = span

    def direction(self, at: int) -> int:
        """Read "left", "left side", "left of", "left of the image"; the place of the word after it."""
        word, after, (start, end) = self.words[at], at + 1, self.places[at]
        if self.words[after : after + 1] in (["side"], ["hand"]):
            after += 1
        if self.words[after : after + 1] == ["of"]:
            after += 1
            rest = [w for w in self.words[after : after + 2] if w not in ("the", "this")]
            if not rest or rest[0] not in _WHOLE_WORDS:
                self.relate(_DIRECTIONS[word], (start, self.places[after - 1][1]))
                return after
            after += self.words[after : after + 2].index(rest[0]) + 1
        self.locate(word, (start, end), after)
        return after

    def read(self) -> ParsedCaption:
        at = 0
        while at < len(self.words):
            word, place = self.words[at], self.places[at]
            at += 1
            if word in _ATTRIBUTES:
                kind, value = _ATTRIBUTES[word]
                if self.adjectives.get(kind, value) != value:
                    self.close(None)  # "a red blue circle": two objects, the first without a shape
                self.adjectives[kind] = value
                self.spans[value] = place
            elif word in _SHAPE_WORDS:
                self.spans[_SHAPE_WORDS[word]] = place
                self.close(_SHAPE_WORDS[word])
            elif word in _THING_WORDS:
                if self.adjectives:
                    self.close(None)
                elif self.words[at - 2 : at - 1] and self.words[at - 2] in _NUMBERS:
                    self.count, self.number, self.count_span = self.number, 1, self.places[at - 2]
            elif word in _NUMBERS:
                self.close(None)
                self.number = _NUMBERS[word]
            elif word in _DIRECTIONS:
                at = self.direction(at - 1)
            elif word in _CENTRE_WORDS:
                self.locate("centre", place, at)
            elif word in _RELATION_WORDS:
                self.relate(_RELATION_WORDS[word], place)
            elif word == "it":
                # "a circle with a square below it": the object named before the square.
                if self.awaiting is not None and self.awaiting.first:  # neither missing nor the very first object
                    first = self.awaiting.first
                    self.relations.append(NamedRelation(first, self.awaiting.relation, first - 1, self.awaiting.span))
                self.awaiting = None
            elif word in ("a", "an", "the"):
                self.close(None)
                self.number, self.after_is = 1, False
            elif word in ("is", "are"):
                self.after_is = True
            elif word == "which" and self.objects:
                self.close(None)
                self.subject, self.after_break = len(self.objects) - 1, True
            elif word in _BREAKS and not (word == "and" and self.after_is and self.adjectives):
                self.close(None)
                self.after_break = True
                if word in (".", ";", "with"):
                    self.awaiting = None
        self.close(None)
        return ParsedCaption(tuple(self.objects), tuple(self.relations), self.count, self.count_span)


@functools.lru_cache(maxsize=4096)
def parse_caption(text: str) -> ParsedCaption:
    """Read what ``text`` names. It takes any text: words that it does not know are passed over.

    A word said twice of one object counts once. Two values for one attribute ("a red blue circle") are two
    objects, the first without a shape, so naming every colour does not help. An object named twice is two
    objects, whatever the article. "two red circles" is two objects, "two shapes" a count.
    """
    return _Reader(text).read()
