"""mmcore/page.py: pages are readable, text never becomes markup, and nothing is loaded from elsewhere."""

import base64
import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from mmcore.page import (
    Mark,
    Picture,
    Series,
    beside,
    command,
    data_uri,
    gallery,
    line_chart,
    marked,
    number,
    page,
    paragraph,
    section,
    table,
    ticks,
)

HOSTILE = "</td><script>alert('x')</script>\" onload=\"alert(1) & <b>"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
VOID = {"meta", "img", "line", "polyline", "circle", "br"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def everything(text: str) -> str:
    chart = line_chart(text, [Series(text, [(0, 1), (1, 2)])], x_label=text)
    return page(
        text,
        paragraph(text, style="bad"),
        section(
            text,
            table([text, text], [[text, text]]),
            beside(chart),
            command(text),
            gallery(
                [Picture(PNG, text, text, [Mark(0, len(text), False, text)], text, True), Picture(PNG, text, text)]
            ),
        ),
    )


def test_text_stays_text_everywhere() -> None:
    plain, hostile = Reader(everything("harmless")), Reader(everything(HOSTILE))
    assert hostile.tags == plain.tags
    assert set(hostile.attributes) == set(plain.attributes)
    assert hostile.texts.count(HOSTILE) == plain.texts.count("harmless")
    assert hostile.attributes["alt"] == [HOSTILE, HOSTILE]


def test_marks_are_seen_and_heard_without_colours() -> None:
    text = "a red star"
    html = marked(text, [Mark(6, 10, False, "circle"), Mark(2, 5, True)])
    assert html.startswith('a <span class="good">red</span> <span class="bad"><s>star</s>')
    assert "".join(Reader(html).texts) == "a red star (wrong, it is) → circle"
    assert "".join(Reader(marked(text, [Mark(2, 5, False)])).texts) == "a red (wrong) star"


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = everything("x")
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", re.sub(r"base64,[^\"]*", "", text))
    assert all(source.startswith("data:") for source in Reader(text).attributes["src"])


def test_images_are_whole_and_of_their_kind() -> None:
    uri = data_uri(PNG)
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.partition(",")[2]) == PNG
    assert data_uri(b"\xff\xd8\xff\xe0").startswith("data:image/jpeg;")
    with pytest.raises(ValueError, match="not a PNG"):
        data_uri(b"<svg onload=alert(1)>")


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'points="([^"]*)"', chart)
    ]


def test_a_line_rises_where_its_numbers_do() -> None:
    (line,) = points_of(line_chart("t", [Series("s", [(0, 1.0), (1, 3.0), (2, 2.0)])], x_label="x"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 < x1 < x2
    assert y1 < y2 < y0  # in SVG, y increases downwards
    assert (x1 - x0) == pytest.approx(x2 - x1, abs=0.11)  # rounded to a tenth of a pixel
    assert (y0 - y1) == pytest.approx(2 * (y0 - y2), abs=0.21)


@pytest.mark.parametrize(
    "points",
    [[(0, 5.0)], [(0, 0.0), (1, 0.0)], [(3, -1e-9), (4, 1e-9)], [(0, 1e12), (1, -1e12)], [(1, 1.0), (1, 2.0)]],
)
def test_lines_stay_inside_whatever_the_numbers(points: list[tuple[float, float]]) -> None:
    (line,) = points_of(line_chart("t", [Series("s", points)], x_label="x"))
    assert len(line) == len(points)
    assert all(0 <= x <= 480 and 0 <= y <= 260 for x, y in line)


def dots_of(chart: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle [^>]*cx="([^"]*)" cy="([^"]*)"', chart)]


def test_a_line_of_few_points_shows_each_of_them() -> None:
    # A polyline of one point draws nothing: a run of one validation had a legend and no mark.
    many = [(float(x), 1.0) for x in range(100)]
    chart = line_chart("t", [Series("training", many), Series("validation", [(50, 2.0)])], x_label="x")
    ((x, y),) = dots_of(chart)
    line, lone = points_of(chart)
    assert lone == [(x, y)]
    assert x == line[50][0]
    assert y < line[50][1]  # SVG counts downwards
    few = line_chart("t", [Series("s", [(0, 1.0), (1, 3.0)])], x_label="x")
    assert dots_of(few) == points_of(few)[0]


def test_numbers_that_are_none_are_left_out() -> None:
    lines = points_of(line_chart("t", [Series("a", [(0, 1), (1, math.nan), (2, 2)]), Series("b", [])], x_label="x"))
    assert [len(line) for line in lines] == [2, 0]
    assert "no measurements" in line_chart("t", [Series("a", [(0, math.inf)])], x_label="x")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.13, 0.97), (-3, 7), (0, 12), (5, 5), (0, 0), (1e-7, 3e-7), (0, 0.3), (99.9, 100.1)]
)
def test_ticks_are_few_round_and_cover(low: float, high: float) -> None:
    values = ticks(low, high)
    assert 2 <= len(values) <= 8
    assert values[0] <= low + 1e-9 * abs(low)
    assert values[-1] >= high - 1e-9 * abs(high)
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert max(steps) == pytest.approx(min(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5)


def test_numbers_are_short() -> None:
    written = [number(value) for value in (0, 0.30000000000000004, 1234.5, 0.00012, 2e7, -1.5)]
    assert written == ["0", "0.3", "1,234", "1.2e-4", "2e7", "-1.5"]
