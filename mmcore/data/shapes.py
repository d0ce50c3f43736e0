"""The scenes of the built-in Shapes dataset: one to three coloured shapes, drawn and rendered.

They need no download. The oracle (shapes_oracle.py) can check every word of a caption (shapes_captions.py) against the
pixels. So the dataset can train and score both captioners and generators.

* 8 colours x 6 shapes x 2 sizes. The colours are near the corners of the RGB cube, and the background is the mid grey
  in its centre. Nine colours cannot be further apart. A pixel half covered by a shape still points from grey towards
  the shape's colour. Noise and blur therefore do not turn one colour into another.
* Lengths are fractions of the image side, and the origin is the top left corner. A scene does not depend on the
  resolution: the same (seed, split, index) is the same scene at every image size.
* A scene depends on (seed, split, index) only, not on other scenes or their number.
* Six pairs of colour and shape, ``HELD_OUT_PAIRS``, occur in the test split only. Every colour and every shape is still
  in the training split.
* Six consecutive images hold 1, 2, 3, 1, 2, 3 objects. With at most two objects, four images hold 1, 2, 1, 2. In the
  test split, one object in each image of the first half of these has a held-out pair. That is half of all scenes,
  equally for each number of objects.
"""

import functools
import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mmcore.errors import InputError

BACKGROUND = (128, 128, 128)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "green": (25, 175, 45),
    "blue": (35, 60, 235),
    "yellow": (245, 225, 30),
    "pink": (245, 45, 205),
    "cyan": (20, 215, 230),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
# The side of a shape's bounding box. The gap between the ranges is two pixels at an image size of 32.
SIZES: dict[str, tuple[float, float]] = {"small": (0.23, 0.26), "large": (0.37, 0.41)}
POSITIONS = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "validation", "test")
CAPTIONS_PER_IMAGE = 5

# Each shape once and no colour twice, so that each still has at least five partners in training.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "square"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("cyan", "circle"),
        ("white", "diamond"),
    }
)
SEEN_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_PAIRS)

MIN_IMAGE_SIZE = 32
MAX_OBJECTS = 3
MARGIN = 0.03  # between a shape and the edge of the image
GAP = 0.06  # between the bounding boxes of two shapes, two pixels at an image size of 32
# What may be named is clear by these margins; the oracle draws its lines halfway (shapes_oracle.py).
CENTRE_WITHIN = 0.08  # "in the centre": at most this far from it on both axes
SIDE_BEYOND = 0.14  # "on the left": at least this far from the centre, ...
CLEARLY = 1.25  # ... and this many times further than on the other axis; relations likewise
OUTLINE_POINTS = 64


@dataclass(frozen=True)
class ShapesSettings:
    """How many scenes there are, how large they are rendered, and the seed they are drawn with."""

    num_train: int = 8000
    """Number of training images. This flag and those below are for --dataset shapes alone."""
    num_validation: int = 200
    """Number of validation images, with the same colour and shape pairs as training."""
    num_test: int = 300
    """Number of test images: equal parts by their number of objects, half with a pair never seen in training."""
    image_size: int = 64
    """Side of the square images in pixels, at least 32."""
    seed: int = 0
    """Seed of the scenes and of their captions."""
    max_objects: int = MAX_OBJECTS
    """Most objects of a scene, from 1 to 3."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_validation", "num_test"):
            if getattr(self, name) < 0:
                raise InputError(f"shapes: {name} is {getattr(self, name)}; give 0 or more")
        if self.image_size < MIN_IMAGE_SIZE:
            raise InputError(f"shapes: image_size is {self.image_size}; give at least {MIN_IMAGE_SIZE}")
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise InputError(f"shapes: max_objects is {self.max_objects}; give 1 to {MAX_OBJECTS}")

    def num_images(self, split: str) -> int:
        """Number of images of ``split``; ValueError if there is no such split."""
        if split not in SPLITS:
            raise ValueError(f"shapes has the splits {', '.join(SPLITS)}, not {split!r}")
        return int(getattr(self, f"num_{split}"))


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``x`` and ``y`` are the centre of its bounding box, ``side`` its width and its height."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    side: float

    @property
    def position(self) -> str | None:
        """The one of POSITIONS that is clearly true of it, or None in between."""
        right, down = self.x - 0.5, self.y - 0.5
        if max(abs(right), abs(down)) <= CENTRE_WITHIN:
            return "centre"
        if abs(right) >= max(SIDE_BEYOND, CLEARLY * abs(down)):
            return "left" if right < 0 else "right"
        if abs(down) >= max(SIDE_BEYOND, CLEARLY * abs(right)):
            return "top" if down < 0 else "bottom"
        return None


def clear_relation(first: SceneObject, second: SceneObject) -> str | None:
    """The one of RELATIONS in which ``first`` clearly stands to ``second``, or None on a diagonal."""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) >= CLEARLY * abs(down):
        return "left of" if right < 0 else "right of"
    if abs(down) >= CLEARLY * abs(right):
        return "above" if down < 0 else "below"
    return None


def scene_random(seed: int, split: str, index: int) -> random.Random:
    # Python's generator and not NumPy's: its sequence for a given seed is stable between releases.
    return random.Random(hashlib.sha256(f"shapes/{seed}/{split}/{index}".encode()).digest())


def _apart(first: SceneObject, second: SceneObject) -> bool:
    distance = max(abs(first.x - second.x), abs(first.y - second.y))
    return distance >= (first.side + second.side) / 2 + GAP


def chain(scene: tuple[SceneObject, ...]) -> tuple[SceneObject, ...] | None:
    """The objects in an order in which each stands in a clear relation to the next, or None."""
    if len(scene) < 3:
        return scene if len(scene) == 1 or clear_relation(*scene) else None
    first, second, third = scene
    for end, middle, other_end in ((first, second, third), (first, third, second), (second, first, third)):
        if clear_relation(end, middle) and clear_relation(middle, other_end):
            return end, middle, other_end
    return None


def _place(rng: random.Random, looks: list[tuple[str, str, str]]) -> tuple[SceneObject, ...]:
    """Draw places until no two objects come close and relations can be named."""
    while True:
        objects: list[SceneObject] = []
        for size, colour, shape in looks:
            side = rng.uniform(*SIZES[size])
            if len(looks) == 1:
                # Alone, it stands where a position can be named, each position equally often.
                away, across = rng.uniform(0.16, 0.26), rng.uniform(-0.1, 0.1)
                near_x, near_y = (rng.uniform(-CENTRE_WITHIN, CENTRE_WITHIN) for _ in range(2))
                right, down = rng.choice(
                    [(-away, across), (away, across), (across, -away), (across, away), (near_x, near_y)]
                )
                x, y = 0.5 + right, 0.5 + down
            else:
                reach = 0.5 - MARGIN - side / 2
                x, y = 0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach)
            objects.append(SceneObject(size, colour, shape, x, y, side))
        scene = tuple(objects)
        close = any(not _apart(a, b) for i, a in enumerate(scene) for b in scene[:i])
        if not close and chain(scene):
            return scene


def make_scene(seed: int, split: str, index: int, max_objects: int = MAX_OBJECTS) -> tuple[SceneObject, ...]:
    """The 1 to `max_objects` objects of a scene. No two share both colour and shape, so each can be named apart."""
    rng = scene_random(seed, split, index)
    num_objects = 1 + index % max_objects
    if split == "test" and index % (2 * max_objects) < max_objects:
        pairs = [rng.choice(sorted(HELD_OUT_PAIRS)), *rng.sample(SEEN_PAIRS, num_objects - 1)]
        rng.shuffle(pairs)
    else:
        pairs = rng.sample(SEEN_PAIRS, num_objects)
    return _place(rng, [(rng.choice(tuple(SIZES)), colour, shape) for colour, shape in pairs])


@functools.cache
def shape_outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape in the unit square, which it fills from edge to edge; y grows downwards."""
    if shape == "square":
        return ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    if shape == "triangle":
        return ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0))
    if shape == "diamond":
        return ((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5))
    if shape == "cross":
        a, b = 0.33, 0.67
        return ((a, 0.0), (b, 0.0), (b, a), (1.0, a), (1.0, b), (b, b),
                (b, 1.0), (a, 1.0), (a, b), (0.0, b), (0.0, a), (a, a))  # fmt: skip
    num_points = 10 if shape == "star" else OUTLINE_POINTS
    points = []
    for i in range(num_points):
        radius = 0.42 if shape == "star" and i % 2 else 1.0
        angle = 2 * math.pi * i / num_points
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    xs, ys = zip(*points, strict=True)
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return tuple(((x - left) / width, (y - top) / height) for x, y in points)


def render_scene(scene: tuple[SceneObject, ...], image_size: int) -> Image.Image:
    """The scene as an RGB image of ``image_size`` x ``image_size`` pixels, anti-aliased."""
    # Drawn larger and averaged: at least 4 x 4 samples a pixel, and 16 x 16 at 32 pixels, where a small
    # star is only seven pixels wide.
    factor = max(4, 512 // image_size)
    canvas = Image.new("RGB", (image_size * factor, image_size * factor), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for item in scene:
        left, top = item.x - item.side / 2, item.y - item.side / 2
        outline = [
            # Pillow fills the pixels that its integer corners name, both ends included, hence the half.
            ((left + u * item.side) * canvas.width - 0.5, (top + v * item.side) * canvas.height - 0.5)
            for u, v in shape_outline(item.shape)
        ]
        draw.polygon(outline, fill=COLOURS[item.colour])
    return canvas.reduce(factor)
