"""The oracle of the Shapes dataset: which attributes of a text are present in an image.

It uses the text and the pixels only. It parses the text with a small grammar, detects the objects, and compares. So it
scores the captions of a captioner and the images of a generator in the same way.

1. ``parse_caption`` (shapes_parser.py): the objects, positions, relations and number that a text names.
2. ``detect_objects``: connected patches of one colour; the shape by correlation with rendered templates.
3. ``judge_objects``: named objects are assigned one to one to detected objects, so that as many sizes, colours and
   shapes as possible agree. An attribute counts only on its own object. For the text "a blue circle and a red square",
   a red circle and a blue square have two of four attributes.

``oracle_report`` gives the oracle's error on rendered scenes and its score on shuffled prompts (chance).
tests/mmcore/test_shapes_oracle.py limits both.
"""

import functools
import io
import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from mmcore.data.shapes import BACKGROUND, COLOURS, POSITIONS, RELATIONS, SHAPES, ShapesSettings, shape_outline
from mmcore.data.shapes_parser import NamedObject, NamedRelation, ParsedCaption, Span, parse_caption
from mmcore.data.shapes_rows import shapes_row

__all__ = [
    "KINDS",
    "AttributeScore",
    "DetectedObject",
    "JudgedAttribute",
    "JudgedText",
    "NamedObject",
    "NamedRelation",
    "ParsedCaption",
    "detect_objects",
    "judge_objects",
    "judge_text",
    "oracle_report",
    "parse_caption",
    "score_objects",
]

FloatArray = npt.NDArray[np.float32]

KINDS = ("colour", "shape", "size", "position", "relation", "count")
_MAX_ASSIGNED = 5  # a scene has at most 3; more than this many take part in no assignment, and so score nothing

# Halfway between what the scenes of shapes.py may hold, as a fraction of the image side.
LARGE_FROM = 0.315  # side of the bounding box: small is up to 0.26, large from 0.37
SIDE_FROM = 0.11  # distance from the centre: "in the centre" is up to 0.08, "on the left" from 0.14

_SIDE = 64  # detection works at this many pixels a side, whatever the image had
_MIN_AREA = 24  # pixels at that scale; a small star, the least of the shapes, covers about 70
_COVERED = 0.5  # where a pixel belongs to an object: at the edge of a shape in the middle of a blurred edge
_PATCH = 16  # templates are so many pixels a side ...
_CONTEXT = 1.6  # ... and show so many times the side of the bounding box: tips that a blur took lie outside
_NAMES = tuple(COLOURS)
_OFFSETS = np.array([np.subtract(rgb, BACKGROUND) for rgb in COLOURS.values()], dtype=np.float32)
_LENGTHS = np.linalg.norm(_OFFSETS, axis=1)
_DIRECTION_MATRIX = np.ascontiguousarray((_OFFSETS / _LENGTHS[:, None]).T)


@dataclass(frozen=True)
class DetectedObject:
    """An object in the pixels; ``box`` is (left, top, right, bottom). All as fractions of the image side."""

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]
    box: tuple[float, float, float, float]


@functools.cache
def _templates() -> tuple[FloatArray, list[str]]:
    """Normalised patches (templates, pixels) and the shape of each.

    Every shape is included slightly moved, scaled and blurred. The bounding box of an object is known only to about a
    pixel. Edges are softer in small, compressed or generated images: a small star loses its tips there, and its box
    becomes much too small.
    """
    side = _PATCH * 8
    patches, names = [], []
    for shape in SHAPES:
        for dx, dy in itertools.product((-0.04, 0.0, 0.04), repeat=2):
            for scale in (0.82, 0.91, 1.0, 1.1, 1.25, 1.4):
                canvas = Image.new("L", (side, side))
                outline = [
                    ((0.5 + ((x - 0.5) * scale + dx) / _CONTEXT) * side,
                     (0.5 + ((y - 0.5) * scale + dy) / _CONTEXT) * side)
                    for x, y in shape_outline(shape)
                ]  # fmt: skip
                ImageDraw.Draw(canvas).polygon(outline, fill=255)
                for blur in (0.01, 0.04, 0.08, 0.12):
                    soft = canvas.filter(ImageFilter.GaussianBlur(blur * side)).reduce(8)
                    patches.append(np.asarray(soft, dtype=np.float32).ravel())
                    names.append(shape)
    bank = np.stack(patches)
    bank -= bank.mean(axis=1, keepdims=True)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    return bank, names


def _components(colour_HW: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number the 4-connected patches of equal colour; -1 (no object) stays -1.

    Runs of equal colour in a row are joined with those that they touch in the row above (union-find).
    """
    height, width = colour_HW.shape
    starts = np.ones((height, width), dtype=bool)
    starts[:, 1:] = colour_HW[:, 1:] != colour_HW[:, :-1]
    run_HW = np.cumsum(starts.ravel()).reshape(height, width) - 1
    parent = list(range(int(run_HW[-1, -1]) + 1))

    def find(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    touching = (colour_HW[1:] == colour_HW[:-1]) & (colour_HW[1:] >= 0)
    pairs = np.unique(np.stack([run_HW[:-1][touching], run_HW[1:][touching]], axis=1), axis=0)
    for above, below in pairs.tolist():
        parent[find(below)] = find(above)
    roots = np.array([find(run) for run in range(len(parent))])
    return np.where(colour_HW >= 0, roots[run_HW], -1)


def detect_objects(image: Image.Image | npt.NDArray[np.uint8]) -> list[DetectedObject]:
    """Find the coloured shapes of an image (PIL, or uint8 of shape (H, W, 3)), largest first.

    Uses the pixels only, at any resolution from 32 x 32. Patches much smaller than the smallest shape count as noise.
    Mild noise, blur and compression change nothing (measured in the tests). But a JPEG of 32 pixels halves the
    resolution of colour, and small shapes are lost. Store images of that size as PNG.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if picture.size != (_SIDE, _SIDE):
        picture = picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    offset = np.asarray(picture, dtype=np.float32).reshape(-1, 3) - np.array(BACKGROUND, dtype=np.float32)
    # How far each pixel lies in the direction of each colour, seen from the background grey. The nearest
    # direction is its colour; its coverage is 1 inside a shape and falls to 0 across the edge.
    # (einsum rather than @, here and below: BLAS would wake its threads for products far too small for them.)
    along = np.einsum("pc,ck->pk", offset, _DIRECTION_MATRIX)
    colour = along.argmax(axis=1)
    covered = along[np.arange(len(along)), colour] / _LENGTHS[colour] > _COVERED
    label_HW = _components(np.where(covered, colour, -1).reshape(_SIDE, _SIDE))

    labels, areas = np.unique(label_HW[label_HW >= 0], return_counts=True)
    found: list[tuple[int, DetectedObject]] = []
    for label, area in zip(labels.tolist(), areas.tolist(), strict=True):
        if area < _MIN_AREA:
            continue
        mask = label_HW == label
        index = int(colour.reshape(_SIDE, _SIDE)[mask][0])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, right = int(columns[0]), int(columns[-1]) + 1
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        centre = (left + right) / 2, (top + bottom) / 2
        coverage = np.clip(along[:, index].reshape(_SIDE, _SIDE) / _LENGTHS[index], 0, 1)
        coverage[(label_HW >= 0) & ~mask] = 0
        # A paler or darker shade than the palette's is full coverage too.
        coverage = np.minimum(coverage / np.percentile(coverage[mask], 80), 1)
        shape, side = _classify(coverage, centre, max(right - left, bottom - top))
        item = DetectedObject(
            colour=_NAMES[index],
            shape=shape,
            size="large" if side >= LARGE_FROM * _SIDE else "small",
            centre=(centre[0] / _SIDE, centre[1] / _SIDE),
            box=(left / _SIDE, top / _SIDE, right / _SIDE, bottom / _SIDE),
        )
        found.append((area, item))
    found.sort(key=lambda pair: -pair[0])
    return [item for _, item in found]


def _classify(coverage: FloatArray, centre: tuple[float, float], extent: int) -> tuple[str, float]:
    """The shape of the patch around ``centre`` (x, y), and the side in pixels that such a shape has.

    The template that correlates best gives the shape; the area covered then gives the side. Unlike the
    bounding box, whose corners are lost first, the area is the same after a blur.
    """
    reach = extent * _CONTEXT / 2
    # A patch may reach over the edge of the image: 0.3 of the extent for a shape of ours, 0.8 for what a generator
    # draws, such as a bar along an edge.
    pad = _SIDE
    padded = Image.fromarray(np.pad(coverage, pad))
    x, y = centre[0] + pad, centre[1] + pad
    box = (x - reach, y - reach, x + reach, y + reach)
    patch = np.asarray(padded.resize((_PATCH, _PATCH), Image.Resampling.BILINEAR, box=box)).ravel()
    bank, names = _templates()
    shape = names[int(np.einsum("tp,p->t", bank, patch - patch.mean()).argmax())]
    return shape, float(2 * reach * np.sqrt(patch.mean() / _filled(shape)))


@functools.cache
def _filled(shape: str) -> float:
    """The share of its bounding box that a shape covers (shoelace formula)."""
    outline = shape_outline(shape)
    following = (*outline[1:], outline[0])
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(outline, following, strict=True))) / 2


@dataclass(frozen=True)
class AttributeScore:
    """Attributes named and those found right, by kind; scores of images add up with ``+``."""

    named: tuple[int, ...] = (0,) * len(KINDS)
    """Attributes named, in the order of KINDS."""
    correct: tuple[int, ...] = (0,) * len(KINDS)
    """Attributes right, in the order of KINDS."""
    num_scenes: int = 0
    """Images scored."""
    num_whole_scenes: int = 0
    """Images in which something was named, all named was right and the number of objects agreed."""

    def __add__(self, other: "AttributeScore") -> "AttributeScore":
        return AttributeScore(
            tuple(a + b for a, b in zip(self.named, other.named, strict=True)),
            tuple(a + b for a, b in zip(self.correct, other.correct, strict=True)),
            self.num_scenes + other.num_scenes,
            self.num_whole_scenes + other.num_whole_scenes,
        )

    @property
    def num_named(self) -> int:
        return sum(self.named)

    @property
    def num_correct(self) -> int:
        return sum(self.correct)

    @property
    def fraction_correct(self) -> float:
        """Share of the named attributes that are right; 0 if none was named, so silence earns nothing."""
        return self.num_correct / self.num_named if self.num_named else 0.0

    @property
    def whole_scene(self) -> float:
        """Share of images that are right as a whole: 0 or 1 for a single image."""
        return self.num_whole_scenes / self.num_scenes if self.num_scenes else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fractions, the counts, and named and correct by kind."""
        return {
            "fraction_correct": self.fraction_correct,
            "whole_scene": self.whole_scene,
            "num_scenes": self.num_scenes,
            "named": dict(zip(KINDS, self.named, strict=True)),
            "correct": dict(zip(KINDS, self.correct, strict=True)),
        }


@dataclass(frozen=True)
class JudgedAttribute:
    """One attribute that a text names, and what its image has in that place."""

    kind: str
    """One of KINDS."""
    span: Span
    """The words that name it."""
    right: bool
    """Whether its own object has it."""
    found: str
    """What that object has, such as "circle" or "left of"; of a count the number; "" where the object is not there."""


@dataclass(frozen=True)
class JudgedText:
    """A text beside an image."""

    attributes: tuple[JudgedAttribute, ...]
    """All that the text names."""
    num_named: int
    """Objects that the text names, or counts where it names none."""
    num_found: int
    """Objects in the image."""

    @property
    def whole_scene(self) -> bool:
        """Something is named, all of it is right, and there is no object more or less."""
        all_right = bool(self.attributes) and all(each.right for each in self.attributes)
        return all_right and self.num_named == self.num_found

    @property
    def score(self) -> AttributeScore:
        kinds = [each.kind for each in self.attributes]
        right = [each.kind for each in self.attributes if each.right]
        named, correct = tuple(map(kinds.count, KINDS)), tuple(map(right.count, KINDS))
        return AttributeScore(named, correct, num_scenes=1, num_whole_scenes=int(self.whole_scene))


def _is_at(found: DetectedObject, position: str) -> bool:
    right, down = found.centre[0] - 0.5, found.centre[1] - 0.5
    if position == "centre":
        return max(abs(right), abs(down)) < SIDE_FROM
    return {"left": -right, "right": right, "top": -down, "bottom": down}[position] >= SIDE_FROM


def _stands(first: DetectedObject, relation: str, second: DetectedObject) -> bool:
    """Each relation is a quarter of the directions: left of means further left than above or below."""
    right, down = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    away, across = {"left of": (-right, down), "right of": (right, down), "above": (-down, right),
                    "below": (down, right)}[relation]  # fmt: skip
    return away > 0 and away >= abs(across)


def judge_objects(found: list[DetectedObject], parsed: ParsedCaption) -> JudgedText:
    """Judge what a text names by the objects of one image; see ``judge_text``."""
    meant = _meant_objects(found, parsed)
    judged = []
    for item, it in zip(parsed.objects, meant, strict=True):
        for kind in ("size", "colour", "shape"):
            named = getattr(item, kind)
            if named is not None:
                has = "" if it is None else getattr(it, kind)
                judged.append(JudgedAttribute(kind, item.spans[named], has == named, has))
        for position in item.positions:
            at = [] if it is None else [each for each in POSITIONS if _is_at(it, each)]
            judged.append(JudgedAttribute("position", item.spans[position], position in at, " and ".join(at)))
    for each in parsed.relations:
        first, second = meant[each.first], meant[each.second]
        stands = [] if first is None or second is None else [r for r in RELATIONS if _stands(first, r, second)]
        judged.append(JudgedAttribute("relation", each.span, each.relation in stands, " and ".join(stands)))
    if parsed.count is not None:
        judged.append(JudgedAttribute("count", parsed.count_span, parsed.count == len(found), str(len(found))))
    # A text that only counts ("two shapes") says nothing about which objects there are.
    return JudgedText(tuple(judged), len(parsed.objects) or parsed.count or 0, len(found))


def _meant_objects(found: list[DetectedObject], parsed: ParsedCaption) -> list[DetectedObject | None]:
    """Of each object that a text names the one in the image that it means, each at most once."""
    objects, candidates = parsed.objects[:_MAX_ASSIGNED], found[:_MAX_ASSIGNED]
    # Each named object on each detected one, and, past the last of those, on none.
    nobody = [0] * (len(objects) - len(candidates))
    looks = [
        [(item.size == it.size) + (item.colour == it.colour) + (item.shape == it.shape) for it in candidates] + nobody
        for item in objects
    ]
    places = [
        [sum(_is_at(it, position) for position in item.positions) for it in candidates] + nobody for item in objects
    ]

    def relations_right(assigned: tuple[int, ...]) -> int:
        known = [candidates[j] if j < len(candidates) else None for j in assigned]
        pairs = (
            (known[relation.first], relation.relation, known[relation.second])
            for relation in parsed.relations
            if max(relation.first, relation.second) < len(known)
        )
        return sum(a is not None and b is not None and _stands(a, relation, b) for a, relation, b in pairs)

    # Looks decide which object is meant; place only where looks leave a choice.
    assignments = list(itertools.permutations(range(max(len(objects), len(candidates))), len(objects)))
    totals = [sum(looks[i][j] for i, j in enumerate(assigned)) for assigned in assignments]
    most = max(totals)
    best = max(
        (assigned for assigned, total in zip(assignments, totals, strict=True) if total == most),
        key=lambda assigned: sum(places[i][j] for i, j in enumerate(assigned)) + relations_right(assigned),
    )
    meant = [candidates[j] if j < len(candidates) else None for j in best]
    return meant + [None] * (len(parsed.objects) - len(meant))


def score_objects(found: list[DetectedObject], parsed: ParsedCaption) -> AttributeScore:
    """Count what a text names against the objects of one image; see ``judge_text``."""
    return judge_objects(found, parsed).score


def judge_text(image: Image.Image | npt.NDArray[np.uint8], text: str) -> JudgedText:
    """Which of the attributes that ``text`` names are present in ``image``, each on its own object."""
    return judge_objects(detect_objects(image), parse_caption(text))


def oracle_report(num_scenes: int = 2000, image_size: int = 64, seed: int = 0) -> dict[str, Any]:
    """How far the oracle can be trusted, on ``num_scenes`` rendered test scenes with all their captions.

    ``error_rate``: share of the attributes of true captions that it calls wrong. ``shuffled``: share that it
    calls right when each image is given the captions of another, the score of chance.
    """
    settings = ShapesSettings(num_test=num_scenes, image_size=image_size, seed=seed)
    rows = [shapes_row(settings, "test", index) for index in range(num_scenes)]
    scenes = [detect_objects(Image.open(io.BytesIO(row["image"]))) for row in rows]
    parsed = [[parse_caption(text) for text in row["captions"]] for row in rows]
    own, shuffled = AttributeScore(), AttributeScore()
    # Each image gets the captions of the next in a random order, so never its own.
    order = random.Random(seed).sample(range(num_scenes), num_scenes)
    for i, other in zip(order, [*order[1:], order[0]], strict=True):
        own = sum((score_objects(scenes[i], caption) for caption in parsed[i]), start=own)
        shuffled = sum((score_objects(scenes[i], caption) for caption in parsed[other]), start=shuffled)
    return {
        "num_scenes": num_scenes,
        "image_size": image_size,
        "num_attributes": own.num_named,
        "error_rate": 1 - own.fraction_correct,
        "wrong": {k: n - c for k, n, c in zip(KINDS, own.named, own.correct, strict=True)},
        "whole_scene": own.whole_scene,
        "shuffled": shuffled.fraction_correct,
        "shuffled_whole_scene": shuffled.whole_scene,
    }
