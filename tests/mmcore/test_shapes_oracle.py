"""The oracle reads captions exactly, detects drawn objects, and credits an attribute only to its own object."""

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmcore.data import shapes_parser
from mmcore.data.shapes import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    SIZES,
    SceneObject,
    ShapesSettings,
    clear_relation,
    make_scene,
    render_scene,
)
from mmcore.data.shapes_oracle import (
    KINDS,
    AttributeScore,
    NamedObject,
    NamedRelation,
    detect_objects,
    judge_text,
    oracle_report,
    parse_caption,
    score_objects,
)
from mmcore.data.shapes_rows import shapes_row


def item(looks: str, x: float = 0.5, y: float = 0.5) -> SceneObject:
    size, colour, shape = looks.split()
    return SceneObject(size, colour, shape, x, y, sum(SIZES[size]) / 2)


def picture(*scene: SceneObject, size: int = 64) -> Image.Image:
    return render_scene(scene, size)


RED_CIRCLE_AND_BLUE_SQUARE = picture(item("large red circle", 0.25), item("small blue square", 0.75))


def points(image: Image.Image, text: str) -> tuple[int, int]:
    score = judge_text(image, text).score
    return score.num_correct, score.num_named


# Reading the text


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_caption_of_the_dataset_is_read_exactly(split: str) -> None:
    """The parsed caption is compared with the scene itself, so this also shows that captions are true."""
    num_relations = num_positions = num_counts = 0
    for index in range(600):
        scene = make_scene(0, split, index)
        by_look = {(thing.size, thing.colour, thing.shape): thing for thing in scene}
        for caption in shapes_row(ShapesSettings(num_test=600), split, index)["captions"]:
            parsed = parse_caption(caption)
            found = [by_look[named.size, named.colour, named.shape] for named in parsed.objects]  # type: ignore[index]
            assert len(found) == len({id(thing) for thing in found}) == len(scene), caption
            for named, thing in zip(parsed.objects, found, strict=True):
                assert named.positions in ((), (thing.position,)), caption
                num_positions += len(named.positions)
            for relation in parsed.relations:
                assert clear_relation(found[relation.first], found[relation.second]) == relation.relation, caption
            # Each phrase of place was parsed as such.
            words = caption.split()
            assert len(parsed.relations) == words.count("of") - words.count("picture") + sum(
                words.count(word) for word in ("above", "over", "below", "under")
            ), caption
            num_relations += len(parsed.relations)
            assert parsed.count in (None, len(scene)), caption
            assert (parsed.count is None) == ("shape" not in caption), caption
            num_counts += parsed.count is not None
    assert min(num_relations, num_positions, num_counts) > 500


A, B, C = (
    NamedObject("large", "red", "circle"),
    NamedObject("small", "blue", "square"),
    NamedObject(None, "cyan", "star"),
)


@pytest.mark.parametrize(
    ("text", "objects", "relations"),
    [
        ("A BIG Red circle, left of a tiny blue SQUARE!", [A, B], [(0, "left of", 1)]),
        ("to the left of a big red circle is a small blue square", [A, B], [(1, "left of", 0)]),
        ("large red circle on top of the little blue square", [A, B], [(0, "above", 1)]),
        ("a cyan star with a small blue square underneath it", [C, B], [(1, "below", 0)]),
        ("a large red circle left of a small blue square above a cyan star", [A, B, C],
         [(0, "left of", 1), (1, "above", 2)]),
        ("a large red circle left of a small blue square and above a cyan star", [A, B, C],
         [(0, "left of", 1), (0, "above", 2)]),
        ("two red circles", [NamedObject(None, "red", "circle")] * 2, []),
        ("the circle is red and large", [A], []),
        ("a circle on the left side of the picture", [NamedObject(shape="circle", positions=("left",))], []),
        ("a star in the top left corner", [NamedObject(shape="star", positions=("top", "left"))], []),
        ("in the middle there is a star", [NamedObject(shape="star", positions=("centre",))], []),
        ("a red object", [NamedObject(colour="red")], []),
        # Texts of an untrained captioner.
        ("", [], []),
        ("of of the of <unk> ... it it which is", [], []),
        ("a a large large red red circle", [A], []),
        ("a large red circle left of left of", [A], []),
        ("left of above", [], []),
        ("a red blue circle", [NamedObject(colour="red"), NamedObject(colour="blue", shape="circle")], []),
        ("circle circle", [NamedObject(shape="circle")] * 2, []),
        ("a large red", [NamedObject("large", "red")], []),
    ],
)  # fmt: skip
def test_other_wordings_and_broken_ones(
    text: str, objects: list[NamedObject], relations: list[tuple[int, str, int]]
) -> None:
    parsed = parse_caption(text)
    assert list(parsed.objects) == objects
    assert list(parsed.relations) == [NamedRelation(*relation) for relation in relations]
    assert parsed.count is None


def test_counts_are_read() -> None:
    assert parse_caption("there are two shapes").count == 2
    assert parse_caption("exactly 3 objects: a star and two red circles").count == 3
    assert parse_caption("one large shape").count is None


def test_no_text_breaks_it() -> None:
    rng = random.Random(0)
    known = [*shapes_parser._ATTRIBUTES, *shapes_parser._SHAPE_WORDS, *shapes_parser._NUMBERS]
    known += [*shapes_parser._DIRECTIONS, *shapes_parser._RELATION_WORDS, *shapes_parser._THING_WORDS]
    known += [*shapes_parser._BREAKS, "of", "the", "a", "is", "it", "which", "side", "image", "middle", "zebra"]
    found = detect_objects(RED_CIRCLE_AND_BLUE_SQUARE)
    for _ in range(1000):
        parsed = parse_caption(" ".join(rng.choices(known, k=rng.randrange(40))))
        for relation in parsed.relations:
            assert min(relation.first, relation.second) >= 0
            assert max(relation.first, relation.second) < len(parsed.objects)
        score = score_objects(found, parsed)
        assert all(right <= named for right, named in zip(score.correct, score.named, strict=True))


# Reading the image


def test_objects_are_where_they_were_drawn() -> None:
    errors = []
    for size in (32, 64, 96, 200):
        for index in range(60):
            scene = sorted(make_scene(7, "train", index), key=lambda thing: (thing.x, thing.y))
            found = sorted(detect_objects(picture(*scene, size=size)), key=lambda it: it.centre)
            looks = {(it.size, it.colour, it.shape) for it in found}
            assert looks == {(thing.size, thing.colour, thing.shape) for thing in scene}
            for thing in scene:
                (it,) = (it for it in found if (it.colour, it.shape) == (thing.colour, thing.shape))
                errors.append(max(abs(it.centre[0] - thing.x), abs(it.centre[1] - thing.y)))
                assert it.box[0] < it.centre[0] < it.box[2]
                assert it.box[1] < it.centre[1] < it.box[3]
    assert max(errors) <= 0.02  # measured: 0.0145, half a pixel of 32


def test_arrays_and_other_modes_are_images_too() -> None:
    found = detect_objects(RED_CIRCLE_AND_BLUE_SQUARE)
    assert [(it.size, it.colour, it.shape) for it in found] == [
        ("large", "red", "circle"),
        ("small", "blue", "square"),
    ]
    assert detect_objects(np.asarray(RED_CIRCLE_AND_BLUE_SQUARE)) == found
    assert detect_objects(RED_CIRCLE_AND_BLUE_SQUARE.convert("RGBA")) == found


def test_images_without_objects() -> None:
    assert detect_objects(picture()) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert len(detect_objects(noise)) <= 1  # specks are not objects
    (everything,) = detect_objects(np.full((64, 64, 3), COLOURS["red"], dtype=np.uint8))
    assert (everything.size, everything.colour) == ("large", "red")


@pytest.mark.parametrize("size", [32, 64, 128])
def test_own_error_rate_and_chance(size: int) -> None:
    report = oracle_report(num_scenes=2000, image_size=size, seed=1)
    assert report["num_attributes"] > 70_000
    # Measured: 0 of 73,258 attributes at each of the three sizes.
    assert report["error_rate"] < 0.005, report
    assert report["whole_scene"] > 0.99
    # Measured: 30.8 % at each size, and 0.1 % of whole scenes. This is the score by chance.
    assert 0.29 <= report["shuffled"] <= 0.33, report
    assert report["shuffled_whole_scene"] < 0.005


def noise(sigma: float) -> Callable[[Image.Image], Image.Image]:
    rng = np.random.default_rng(0)

    def add(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image) + rng.normal(0, sigma, (image.height, image.width, 3))
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    return add


def blur(radius: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def encode(image: Image.Image) -> Image.Image:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=quality)
        return Image.open(encoded).convert("RGB")

    return encode


def fade(contrast: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.point(lambda value: round(128 + contrast * (value - 128)))


# The allowed share of wrong attributes, and the measured one on the same scenes. At 32 pixels a JPEG halves the
# resolution of colour, to 4 pixels for a small shape: see detect_objects.
@pytest.mark.parametrize(
    ("size", "damage", "bound"),
    [
        pytest.param(32, [noise(30)], 0.005, id="32 noise 30"),  # 0.03 %
        pytest.param(32, [blur(0.5)], 0.005, id="32 blur 0.5"),  # 0 %
        pytest.param(32, [blur(1)], 0.04, id="32 blur 1"),  # 2.2 %
        pytest.param(32, [fade(0.7)], 0.005, id="32 fade 0.7"),  # 0 %
        pytest.param(32, [jpeg(75)], 0.08, id="32 jpeg 75"),  # 5.4 %
        pytest.param(64, [noise(45)], 0.005, id="64 noise 45"),  # 0.10 %
        pytest.param(64, [blur(1.5)], 0.005, id="64 blur 1.5"),  # 0 %
        pytest.param(64, [fade(0.7)], 0.005, id="64 fade 0.7"),  # 0 %
        pytest.param(64, [jpeg(75)], 0.005, id="64 jpeg 75"),  # 0.10 %
        pytest.param(64, [jpeg(50)], 0.02, id="64 jpeg 50"),  # 1.0 %
        pytest.param(64, [blur(0.7), noise(15), jpeg(75)], 0.01, id="64 all three"),  # 0.4 %
        pytest.param(128, [blur(1.5), noise(30), jpeg(50)], 0.005, id="128 all three"),  # 0 %
    ],
)
def test_damaged_images(size: int, damage: list[Callable[[Image.Image], Image.Image]], bound: float) -> None:
    settings = ShapesSettings(num_test=400, image_size=size, seed=5)
    score = AttributeScore()
    for index in range(settings.num_test):
        row = shapes_row(settings, "test", index)
        image: Image.Image = Image.open(io.BytesIO(row["image"]))
        for change in damage:
            image = change(image)
        found = detect_objects(image)
        score = sum((score_objects(found, parse_caption(text)) for text in row["captions"]), start=score)
    assert 1 - score.fraction_correct < bound, score.as_dict()


# Comparing


@pytest.mark.parametrize(
    ("text", "right", "named"),
    [
        ("a large red circle left of a small blue square", 7, 7),
        ("a small blue square to the right of a large red circle", 7, 7),
        ("a large red circle on the left and a small blue square on the right", 8, 8),
        ("two shapes: a large red circle and a small blue square", 7, 7),
        # Swapped attributes: each is in the picture but on the other object.
        ("a blue circle and a red square", 2, 4),
        ("a small circle and a large square", 2, 4),
        ("a small red circle and a large blue square", 4, 6),
        ("a small blue circle and a large red square", 4, 6),  # sizes and colours agree, shapes do not
        ("a large red circle right of a small blue square", 6, 7),
        ("a large red circle above a small blue square", 6, 7),
        ("a large red circle on the right and a small blue square on the left", 6, 8),
        # Objects that are missing, and an object that is there once but named twice.
        ("three shapes: a large red circle, a small blue square and a green star", 6, 9),
        ("a red circle and a red circle", 2, 4),
        ("a red blue green circle", 2, 4),
        ("a circle left of a star", 2, 3),
        ("nothing that it knows", 0, 0),
    ],
)
def test_an_attribute_counts_on_its_own_object_only(text: str, right: int, named: int) -> None:
    assert points(RED_CIRCLE_AND_BLUE_SQUARE, text) == (right, named)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a large red circle left of a small blue square", {}),
        (
            "a BIG green circle with a little blue star above it",
            {"green": "red", "star": "square", "above": "right of"},
        ),
        ("on the right is a red circle", {"right": "left"}),
        ("to the left of a red circle is a blue square", {"left of": "right of"}),
        ("three shapes: a circle, a square and a cyan star", {"three": "2", "cyan": "", "star": ""}),
        ("İ a green circle", {"green": "red"}),  # one character, two in lower case
    ],
)
def test_what_is_wrong_is_named_by_its_words(text: str, wrong: dict[str, str]) -> None:
    judged = judge_text(RED_CIRCLE_AND_BLUE_SQUARE, text).attributes
    assert {text[slice(*each.span)]: each.found for each in judged if not each.right} == wrong


def test_place_decides_where_looks_leave_a_choice() -> None:
    image = picture(item("small red circle", 0.2), item("small red circle", 0.8))
    assert points(image, "a red circle on the right and a red circle on the left") == (6, 6)
    assert points(image, "a circle right of a circle") == (3, 3)


def test_whole_scene_wants_everything_and_nothing_more() -> None:
    def whole(text: str) -> bool:
        return judge_text(RED_CIRCLE_AND_BLUE_SQUARE, text).whole_scene

    assert whole("a large red circle left of a small blue square")
    assert whole("a circle and a square")
    assert not whole("a large red circle")  # the square is not named
    assert not whole("a large red circle right of a small blue square")
    assert not whole("one shape: a large red circle and a small blue square")
    assert whole("two shapes")
    assert not whole("")


def test_an_empty_image_has_nothing_right() -> None:
    assert points(picture(), "a large red circle left of a small blue square") == (0, 7)
    assert judge_text(picture(), "").score.fraction_correct == 0


def test_more_objects_than_a_scene_can_hold() -> None:
    text = " and ".join(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
    assert points(RED_CIRCLE_AND_BLUE_SQUARE, text)[1] == 96
    assert points(RED_CIRCLE_AND_BLUE_SQUARE, f"a red circle and a blue square and {text}") == (4, 100)


def test_the_score_of_the_whole_is_the_sum_of_the_parts() -> None:
    texts = ["a large red circle", "a green circle on the right", "two shapes", "", "a star above a blue square"]
    scores = [judge_text(RED_CIRCLE_AND_BLUE_SQUARE, text).score for text in texts]
    whole = sum(scores, start=AttributeScore())
    assert sum(scores[:2], start=AttributeScore()) + sum(scores[2:], start=AttributeScore()) == whole
    assert whole.num_scenes == 5
    assert whole.whole_scene == pytest.approx(1 / 5)  # "two shapes"
    expected: dict[str, Any] = {"colour": 3, "shape": 4, "size": 1, "position": 1, "relation": 1, "count": 1}
    assert whole.as_dict()["named"] == expected == dict(zip(KINDS, whole.named, strict=True))
    assert whole.num_correct == 3 + 1 + 0 + 1 + 0 + 2
    assert whole.fraction_correct == pytest.approx(7 / 11)


def test_a_bar_along_an_edge_is_an_object() -> None:
    """No scene has such an object, but generators draw them: it is as long as the image and touches its edge."""
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    image[-6:] = COLOURS["red"]
    (found,) = detect_objects(image)
    assert (found.colour, found.box) == ("red", (0, 58 / 64, 1, 1))
