"""mmcore/metrics/images.py: true images score near 1, images of other prompts at chance, colours by their mean."""

import io

import numpy as np
import pytest
from PIL import Image

from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_row
from mmcore.errors import InputError
from mmcore.metrics.images import named_colour, score_colours, score_shapes, to_lab

NUM = 30
ROWS = [shapes_row(ShapesSettings(num_test=NUM), "test", index) for index in range(NUM)]
IMAGES = [np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in ROWS]
PROMPTS = [row["captions"][0] for row in ROWS]


def test_true_images_are_right_and_the_groups_add_up() -> None:
    scores = score_shapes(IMAGES, PROMPTS)
    assert scores["all"]["fraction_correct"] > 0.99
    assert scores["all"]["whole_scene"] > 0.95
    assert scores["seen"]["num_scenes"] + scores["held_out"]["num_scenes"] == NUM
    # Of six consecutive prompts the first three name a pair that is not in training.
    assert scores["held_out"]["num_scenes"] == NUM // 2
    assert sum(each["num_scenes"] for each in scores["objects"].values()) == NUM
    assert 0.1 < scores["shuffled"]["fraction_correct"] < 0.6
    assert scores["named_per_prompt"] == sum(scores["all"]["named"].values()) / NUM


def test_images_of_other_prompts_and_empty_ones_are_wrong() -> None:
    other = score_shapes([*IMAGES[1:], IMAGES[0]], PROMPTS)
    assert other["all"]["fraction_correct"] < 0.6
    grey = score_shapes([np.full((64, 64, 3), 128, np.uint8)] * NUM, PROMPTS)
    assert grey["all"]["fraction_correct"] == 0


def test_prompts_of_other_things_are_refused() -> None:
    with pytest.raises(InputError, match="a dog on a beach"):
        score_shapes(IMAGES[:2], ["a red star", "a dog on a beach"])
    with pytest.raises(InputError, match="at least 2"):
        score_shapes(IMAGES[:1], ["a red star"])


def test_lab_of_known_colours() -> None:
    # Reference values of the standard (D65, 2 degrees), to the digits that are commonly printed.
    known = {
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
    }
    found = to_lab(np.array(list(known), np.uint8))
    np.testing.assert_allclose(found, list(known.values()), atol=0.03)


def photos(tints: list[tuple[float, float, float]], strength: float, seed: int = 0) -> list[np.ndarray]:
    """Noisy pictures of any lightness, each shifted a little towards its tint."""
    random = np.random.default_rng(seed)
    images = []
    for tint in tints:
        base = random.uniform(60, 190) + random.normal(0, 40, (16, 16, 3))
        images.append(np.clip(base + strength * (np.array(tint) - base), 0, 255).astype(np.uint8))
    return images


COLOURS = ("pink", "black", "green")
TINTS = {"pink": (255.0, 100.0, 180.0), "black": (0.0, 0.0, 0.0), "green": (0.0, 128.0, 0.0)}
NAMED = [COLOURS[i % 3] for i in range(90)]
DRESSES = [f"A girl in a {colour} dress." for colour in NAMED]


def test_a_tint_is_found_and_its_absence_is_chance() -> None:
    tinted = score_colours(photos([TINTS[name] for name in NAMED], 0.7), DRESSES, COLOURS)
    assert tinted["fraction_nearest"] > 0.95
    assert tinted["fraction_correct"] > 0.95
    assert all(each["num_images"] == 30 for each in tinted["colours"].values())
    assert tinted["colours"]["black"]["lightness"] < tinted["colours"]["pink"]["lightness"]
    assert 120 < tinted["colours"]["green"]["hue"] < 150
    plain = score_colours(photos([(0, 0, 0)] * 90, 0.0), DRESSES, COLOURS)
    # Medium greys are nearest to dark green.
    assert plain["fraction_nearest"] < 0.5
    # 90 draws at 1/3: a standard deviation of 0.05.
    assert abs(plain["fraction_correct"] - plain["chance"]) < 0.15
    # Images of the wrong colours are worse than chance.
    wrong = [TINTS[COLOURS[(i + 1) % 3]] for i in range(90)]
    assert score_colours(photos(wrong, 0.7), DRESSES, COLOURS)["fraction_correct"] < 0.05


def test_the_counts_are_those_of_the_images() -> None:
    # Two of the green dresses are black.
    tints = [TINTS["black" if i in (2, 5) else name] for i, name in enumerate(NAMED)]
    green = score_colours(photos(tints, 0.8), DRESSES, COLOURS)["colours"]["green"]
    assert green["chosen"] == {"pink": 0, "black": 2, "green": 28}
    assert green["fraction_correct"] == 28 / 30


def test_unequal_numbers_of_prompts_do_not_shift_the_average() -> None:
    names = ["black"] * 60 + ["pink"] * 6 + ["green"] * 6
    images = photos([TINTS[name] for name in names], 0.7)
    scores = score_colours(images, [f"a {name} dress" for name in names], COLOURS)
    assert min(each["fraction_correct"] for each in scores["colours"].values()) > 0.9


@pytest.mark.parametrize(
    ("prompts", "colours", "message"),
    [
        (["a pink dress", "a red dress"], ("pink", "black"), "'a red dress': names none of pink, black"),
        (["a pink and black dress"], ("pink", "black"), "names black and pink of"),
        (["a pink dress"], ("pink", "black"), "no prompt names black"),
        (["a pink dress"], ("pink", "mauve"), "colours pink, mauve: give two or more"),
        (["a pink dress"], ("pink",), "two or more"),
    ],
)
def test_colours_that_do_not_fit_the_prompts(prompts: list[str], colours: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_colours(photos([(0, 0, 0)] * len(prompts), 0), prompts, colours)


def test_a_colour_is_a_word_of_its_own() -> None:
    assert named_colour("A girl in BLACK, by a greenhouse", COLOURS) == "black"
