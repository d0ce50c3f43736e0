"""jobs/runtime/blocks.py: a plan of many rows holds only one copy of them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest

from jobs.runtime.blocks import DIGEST_ROWS, blocks_of_rows

NUM_ROWS = 3 * DIGEST_ROWS + 5


class Rows(Sequence[Any]):
    """Rows that are created on access. Counts how many exist at once."""

    def __init__(self, make: Any) -> None:
        self.make, self.most = make, 0

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, rows: Any) -> Any:
        assert isinstance(rows, slice), "a row by itself"
        chosen = range(NUM_ROWS)[rows]
        self.most = max(self.most, len(chosen))
        return [self.make(row) for row in chosen]


def test_no_more_rows_at_once_than_are_worked_on() -> None:
    columns = {
        "image_id": Rows(str),
        "prompt": Rows(lambda row: f'é \U0001f436 "{row}"'),
        "seed": Rows(lambda row: row),
    }
    blocks = blocks_of_rows(columns, rows_per_block=100)
    assert blocks.num_rows == NUM_ROWS
    assert [blocks.num_rows_of(block) for block in (0, len(blocks.items) - 1)] == [100, NUM_ROWS % 100]
    seeds = [seed for item in blocks.items for seed in item["columns"]["seed"]]
    assert seeds == list(range(NUM_ROWS))
    assert blocks.items[-1]["columns"]["image_id"][-1] == str(NUM_ROWS - 1)
    assert blocks.items[-1]["block"] == len(blocks.items) - 1
    assert {rows.most for rows in columns.values()} == {DIGEST_ROWS}


@pytest.mark.parametrize("num_rows", [0, 1, 2, DIGEST_ROWS, DIGEST_ROWS + 1])
def test_the_digest_is_that_of_earlier_plans(num_rows: int) -> None:
    columns = {"image_id": [f"{row}" for row in range(num_rows)], "captions": [["ü", '"'], []] * num_rows}
    columns = {name: values[:num_rows] for name, values in columns.items()}
    assert blocks_of_rows(columns, 64).ids_sha256 == hashlib.sha256(json.dumps(columns).encode()).hexdigest()
