"""The grids of Infinity's images, from coarse to fine, for each aspect ratio and pixel budget.

The grids are those of the official code (Han et al. 2024, https://arxiv.org/abs/2412.04431, appendix). An image has
16 times as many pixels a side as its last grid.
"""

import math

import torch
from torch import Tensor

from mmcore.errors import InputError, OptionError

Grid = tuple[int, int]
"""Height and width in positions."""
Size = tuple[int, int]
"""Height and width in pixels."""

# Pixels a side for each position of the last grid.
STRIDE = 16
# Budget in pixels -> the number of grids.
BUDGETS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
_SQUARE = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
# Height over width -> heights and widths of all 13 grids.
_TALL: dict[float, tuple[tuple[int, ...], tuple[int, ...]]] = {
    1.0: (_SQUARE, _SQUARE),
    1.25: ((1, 2, 3, 5, 10, 15, 20, 25, 30, 35, 45, 55, 70), (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 36, 44, 56)),
    1.333: ((1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 48, 60, 72), (1, 2, 3, 6, 9, 12, 15, 18, 21, 27, 36, 45, 54)),
    1.5: ((1, 2, 3, 6, 9, 15, 21, 27, 33, 39, 48, 63, 78), (1, 2, 2, 4, 6, 10, 14, 18, 22, 26, 32, 42, 52)),
    1.75: ((1, 2, 3, 7, 11, 14, 21, 28, 35, 42, 56, 70, 84), (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48)),
    2.0: ((1, 2, 4, 6, 10, 16, 22, 30, 38, 46, 60, 74, 90), (1, 2, 2, 3, 5, 8, 11, 15, 19, 23, 30, 37, 45)),
    2.5: ((1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 65, 80, 100), (1, 2, 2, 4, 6, 8, 10, 12, 16, 20, 26, 32, 40)),
    3.0: ((1, 2, 6, 9, 15, 21, 27, 36, 45, 54, 72, 90, 111), (1, 2, 2, 3, 5, 7, 9, 12, 15, 18, 24, 30, 37)),
}


def _all_grids() -> dict[float, tuple[Grid, ...]]:
    grids: dict[float, tuple[Grid, ...]] = {}
    for ratio, (heights, widths) in _TALL.items():
        grids[ratio] = tuple(zip(heights, widths, strict=True))
        if ratio != 1:
            # The official keys of wide images are cut after three decimals.
            grids[math.floor(1000 / ratio) / 1000] = tuple(zip(widths, heights, strict=True))
    return dict(sorted(grids.items()))


GRIDS = _all_grids()
"""Height over width -> all 13 grids."""


def _all_sizes() -> dict[Size, tuple[float, str]]:
    lasts = {(ratio, budget): grids[num - 1] for budget, num in BUDGETS.items() for ratio, grids in GRIDS.items()}
    return {(height * STRIDE, width * STRIDE): key for key, (height, width) in lasts.items()}


SIZES = _all_sizes()
"""Height and width in pixels -> ratio and budget."""


def grids_of(ratio: float, budget: str) -> tuple[Grid, ...]:
    """The grids of an image with this height over width.

    Raises InputError for a ratio or a budget that Infinity does not have.
    """
    if ratio not in GRIDS:
        known = ", ".join(f"{each:g}" for each in GRIDS)
        raise InputError(f"aspect ratio {ratio:g} (height over width) has no grids; choose one of {known}")
    if budget not in BUDGETS:
        raise InputError(f"pixel budget {budget!r} is not known; choose one of {', '.join(BUDGETS)}")
    return GRIDS[ratio][: BUDGETS[budget]]


def grids_of_size(size: Size) -> tuple[tuple[Grid, ...], Grid]:
    """The grids of an image of this height and width, and the last grid of its ratio's largest budget.

    Raises OptionError, with the most similar size, for a size that Infinity does not have.
    """
    if size not in SIZES:
        near = min(SIZES, key=lambda each: abs(math.log(each[0] / size[0])) + abs(math.log(each[1] / size[1])))
        ratio, budget = SIZES[near]
        raise OptionError(
            "size",
            f"{size[1]}x{size[0]}: no ratio and pixel budget have it; the nearest is {near[1]}x{near[0]} (ratio "
            f"{ratio:g}, {budget})",
        )
    ratio, budget = SIZES[size]
    return grids_of(ratio, budget), GRIDS[ratio][-1]


def num_positions(grids: tuple[Grid, ...]) -> int:
    """Positions of all grids together."""
    return sum(height * width for height, width in grids)


def rope_places(grids: tuple[Grid, ...], finest: Grid) -> Tensor:
    """Row and column of each position, int64 (L, 2), in units of the grid `finest`.

    A coarse grid is spread over `finest`. Halves are rounded to the even number, as torch rounds.
    """
    places = []
    for height, width in grids:
        rows = (torch.arange(height) * (finest[0] / height)).round().long()
        columns = (torch.arange(width) * (finest[1] / width)).round().long()
        places.append(torch.cartesian_prod(rows, columns))
    return torch.cat(places)
