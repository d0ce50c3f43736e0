"""One self-contained HTML page: images as data URIs, curves as inline SVG, no script and nothing to load.

Every text is escaped on its way in; `Html` marks what is markup already, so that a caption can never become any.
Light and dark follow the reader's system, and one column fits a phone.
"""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

Html = NewType("Html", str)

# A line of so few points has a dot at each: a single one would not be seen otherwise.
_MOST_DOTS = 12
_DOT_RADIUS = 3.5
# Lines have the style sheet's --line0 to --line3: Okabe and Ito's colours, which colour-blind readers tell apart.
_NUM_COLOURS = 4
_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 12, 46
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #5f6368; --back: #fff; --card: #f5f6f7; --line: #d9dce0;
  --good: #107a3d; --bad: #b3261e; --line0: #0072b2; --line1: #d55e00; --line2: #009e73; --line3: #aa5585; }
@media (prefers-color-scheme: dark) { :root { --text: #e8eaed; --soft: #9aa0a6; --back: #16181b; --card: #202327;
  --line: #3a3f45; --good: #6dd58c; --bad: #f2857d;
  --line0: #56b4e9; --line1: #e69f00; --line2: #2fc79a; --line3: #e79ac6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 68rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; margin: .6rem 0; }
.soft, figcaption small, th { color: var(--soft); font-weight: normal; }
.good { color: var(--good); } .bad { color: var(--bad); }
p.good, p.bad { padding: .5rem .8rem; border-left: .3rem solid; background: var(--card); }
.heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.wide { overflow-x: auto; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; font-size: .85rem; white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.beside { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.beside figure { background: var(--card); border-radius: .5rem; padding: .8rem; }
.gallery { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
.gallery.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.gallery figure { background: var(--card); border-radius: .5rem; overflow: hidden; }
.gallery img { display: block; width: 100%; image-rendering: pixelated; }
.gallery figcaption { padding: .6rem .8rem .8rem; }
figure { margin: 0; } figcaption small { display: block; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 15px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.legend i { display: inline-block; width: 1rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }
"""


@dataclass(frozen=True)
class Series:
    """One line of a chart: a name for the legend and its (x, y) points; those that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """The characters of a text from `start` to before `end`: right, or wrong; `instead` says what would be right."""

    start: int
    end: int
    good: bool
    instead: str = ""


@dataclass(frozen=True)
class Picture:
    """One image of a gallery: encoded bytes, what they show, the text under it, and a smaller line under that."""

    image: bytes
    alt: str
    text: str
    marks: Sequence[Mark] = ()
    """Parts of the text, in any order, that do not overlap."""
    verdict: str = ""
    good: bool | None = None
    """Whether the verdict is good news."""


def escape(text: object) -> Html:
    """Any text as harmless markup."""
    return Html(html.escape(str(text)))


def paragraph(text: str, *, style: str = "") -> Html:
    """`style`: "", "soft", "good" or "bad"."""
    return Html(f'<p class="{escape(style)}">{escape(text)}</p>')


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """The first column is text at the left, the others are numbers at the right."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return Html(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def data_uri(image: bytes) -> str:
    """PNG, JPEG, GIF or WebP bytes as a data URI. ValueError for anything else."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
    kind = next((kind for magic, kind in kinds.items() if image.startswith(magic)), None)
    if kind is None:
        raise ValueError(f"not a PNG, JPEG, GIF or WebP image: it begins with {image[:8]!r}")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def marked(text: str, marks: Sequence[Mark]) -> Html:
    """Right words in green; wrong ones in red and struck out, with an arrow and what would be right behind them."""
    parts: list[str] = []
    at = 0
    for mark in sorted(marks, key=lambda mark: mark.start):
        assert mark.start >= at, "marks that overlap"
        parts.append(escape(text[at : mark.start]))
        words, at = escape(text[mark.start : mark.end]), mark.end
        if mark.good:
            parts.append(f'<span class="good">{words}</span>')
        else:
            # Not by colour alone; and who listens hears neither the line nor the arrow.
            heard = f'<span class="heard"> (wrong{", it is" if mark.instead else ""})</span>'
            instead = f'<span aria-hidden="true"> → </span>{escape(mark.instead)}' if mark.instead else ""
            parts.append(f'<span class="bad"><s>{words}</s>{heard}{instead}</span>')
    return Html("".join(parts) + escape(text[at:]))


def gallery(pictures: Sequence[Picture], *, of_pairs: bool = False) -> Html:
    """A grid of images, or of pairs of them twice as wide, with what is written under them."""
    parts = []
    for picture in pictures:
        style = {True: ' class="good"', False: ' class="bad"', None: ""}[picture.good]
        verdict = f"<small{style}>{escape(picture.verdict)}</small>" if picture.verdict else ""
        parts.append(
            f'<figure><img src="{data_uri(picture.image)}" alt="{escape(picture.alt)}" loading="lazy">'
            f"<figcaption><span>{marked(picture.text, picture.marks)}</span>{verdict}</figcaption></figure>"
        )
    return Html(f'<div class="gallery{" pairs" * of_pairs}">{"".join(parts)}</div>')


def command(text: str) -> Html:
    """Lines for a shell."""
    return Html(f"<pre><code>{escape(text)}</code></pre>")


def beside(*items: Html) -> Html:
    """Charts or tables beside each other where there is room."""
    return Html(f'<div class="beside">{"".join(items)}</div>')


def line_chart(title: str, series: Sequence[Series], *, x_label: str) -> Html:
    """Lines over a common x axis; the y axis spans what is drawn. A line of few points has a dot at each of them.

    Where no line has a point, the chart says "no measurements".
    """
    drawn = [
        Series(each.name, [(x, y) for x, y in each.points if math.isfinite(x) and math.isfinite(y)]) for each in series
    ]
    points = [point for each in drawn for point in each.points]
    if not points:
        return Html(f"<figure><strong>{escape(title)}</strong>{paragraph('no measurements', style='soft')}</figure>")
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + right, _HEIGHT - _BOTTOM - up

    parts = []
    for value in y_ticks:
        _, y = place(x_ticks[0], value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        x, _ = place(value, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{number(value)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    for index, each in enumerate(drawn):
        colour = f"var(--line{index % _NUM_COLOURS})"
        placed = [place(*point) for point in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line" style="stroke:{colour}" points="{path}"/>')
        if len(placed) <= _MOST_DOTS:
            parts += [f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{_DOT_RADIUS}"/>' for x, y in placed]
        last = f" {number(each.points[-1][1])}" if each.points else ""
        legend.append(f'<span><i style="background:{colour}"></i>{escape(each.name)}{last}</span>')
    return Html(
        f'<figure><strong>{escape(title)}</strong><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{"".join(legend)}</div></figure>'
    )


def ticks(low: float, high: float, at_most: int = 7) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / (at_most - 1)))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (step * factor)), math.ceil(high / (step * factor))
        if last - first < at_most:
            break
    # Times the integer, not added up: 0.1 three times is not 0.3.
    return [round(k * step * factor, 12) for k in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """At most three significant digits (all of a whole number), and a short exponent for the very small and large."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def section(title: str, *parts: Html) -> Html:
    return Html(f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>")


def page(title: str, *parts: Html) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{chr(10).join(parts)}\n</body></html>\n"
    )
