"""mmcore/metrics/shapes.py: true captions score near 1, others at chance, and few attributes are visible."""

import pytest

from mmcore.data.shapes import COLOURS, HELD_OUT_PAIRS, ShapesSettings, make_scene
from mmcore.data.shapes_rows import shapes_row
from mmcore.metrics.shapes import score_captions

NUM = 30
SETTINGS = ShapesSettings(num_test=NUM)
ROWS = [shapes_row(SETTINGS, "test", index) for index in range(NUM)]
IMAGES = [row["image"] for row in ROWS]
REFERENCES = [row["captions"] for row in ROWS]
FIRSTS = [captions[0] for captions in REFERENCES]


def test_true_captions_are_right_and_the_groups_add_up() -> None:
    scores = score_captions(IMAGES, FIRSTS, REFERENCES)
    assert scores["all"]["fraction_correct"] > 0.99
    assert scores["all"]["whole_scene"] > 0.95
    assert scores["all"]["num_scenes"] == NUM
    assert scores["seen"]["num_scenes"] + scores["held_out"]["num_scenes"] == NUM
    assert sum(each["num_scenes"] for each in scores["objects"].values()) == NUM
    # Six consecutive images have 1, 2, 3, 1, 2, 3 objects. The first three have a held-out pair.
    assert {number: each["num_scenes"] for number, each in scores["objects"].items()} == dict.fromkeys("123", NUM // 3)
    scenes = [make_scene(SETTINGS.seed, "test", index) for index in range(NUM)]
    truly = sum(any((item.colour, item.shape) in HELD_OUT_PAIRS for item in scene) for scene in scenes)
    assert scores["held_out"]["num_scenes"] == truly == NUM // 2


def test_chance_is_far_below() -> None:
    scores = score_captions(IMAGES, FIRSTS, REFERENCES)
    assert 0.1 < scores["shuffled"]["fraction_correct"] < 0.6
    assert scores["shuffled"]["named"] == scores["all"]["named"]


def test_captions_that_name_little_are_right_but_show() -> None:
    little = [f"a {next(word for word in caption.split() if word in COLOURS)} thing" for caption in FIRSTS]
    scores = score_captions(IMAGES, little, REFERENCES)
    assert scores["all"]["fraction_correct"] > 0.95
    assert scores["named_per_caption"] < 0.25 * scores["named_per_reference"]
    silent = score_captions(IMAGES, [""] * NUM, REFERENCES)
    assert silent["all"]["fraction_correct"] == silent["named_per_caption"] == 0


def test_one_image_has_no_chance_level() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        score_captions(IMAGES[:1], ["a red star"], REFERENCES[:1])
