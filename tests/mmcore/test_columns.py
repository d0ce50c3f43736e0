"""Copies of a column on the local disk: whole or made again, whatever was killed or cleaned away."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcore.data.columns import open_column
from mmcore.storage import Storage

VALUES = np.arange(1, 13, dtype=np.float16).reshape(4, 3)
IDS = ("a", "b", "c", "d")


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """A finished column of two parts."""
    made = Storage(str(tmp_path / "column"))
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image_id": IDS[rows], "value": [row.tobytes() for row in VALUES[rows]]}), buffer)
        made.write(f"parts/part-{part}.parquet", buffer.getvalue())
    facts = {"dtype": "float16", "shape": [3], "num_rows": 4, "fingerprint": "it"}
    made.write("_SUCCESS", json.dumps(facts).encode())
    return made


def open_and_die(folder: Storage, cache: Path) -> None:
    """As if killed after the first of the two parts."""
    told: list[str] = []

    def doing(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_column(folder, cache, doing=doing)


def test_a_copy_is_made_once(folder: Storage, tmp_path: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        column = open_column(folder, tmp_path / "cache", doing=told.append)
        assert column.image_ids == IDS
        np.testing.assert_array_equal(column.values, VALUES)
    assert len(told) == 2
    assert {path.name for path in (tmp_path / "cache" / "columns" / "it").iterdir()} == {"ids.json", "values.npy"}


@pytest.mark.parametrize("cleaned", ["values.npy", "ids.json"])
def test_a_copy_that_is_killed_where_a_cleaner_took_one_file_is_made_again(
    folder: Storage, tmp_path: Path, cleaned: str
) -> None:
    open_column(folder, tmp_path / "cache")
    (tmp_path / "cache" / "columns" / "it" / cleaned).unlink()
    open_and_die(folder, tmp_path / "cache")
    np.testing.assert_array_equal(open_column(folder, tmp_path / "cache").values, VALUES)


def test_a_file_that_somebody_has_mapped_is_not_emptied(folder: Storage, tmp_path: Path) -> None:
    mapped = open_column(folder, tmp_path / "cache").values
    (tmp_path / "cache" / "columns" / "it" / "ids.json").unlink()
    open_and_die(folder, tmp_path / "cache")
    np.testing.assert_array_equal(mapped, VALUES)
