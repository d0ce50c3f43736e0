"""Local copies of a column are complete or made again, after any kill or removal of files."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcore.data.columns import Column, Ragged, bytes_per_image, column_table, facts_of_parts, open_column
from mmcore.errors import InputError
from mmcore.seeding import permutation
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
    """As if killed after the first of two parts."""
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


# -- several tensors an image --------------------------------------------------------------------------------------

LENGTHS = (3, 0, 5, 1)
RANDOM = np.random.default_rng(0)
SEVERAL = {
    "latents": RANDOM.normal(size=(4, 4, 2, 2)).astype(np.float16),
    "pixels": RANDOM.integers(0, 256, (4, 2, 2, 3)).astype(np.uint8),
    "size": RANDOM.integers(0, 1000, (4, 2)),
    "tokens": [RANDOM.normal(size=(length, 6)).astype(np.float16) for length in LENGTHS],
}


def write_parts(folder: Storage, tensors: dict, changes: dict | None = None) -> Storage:
    """As encoders write them: two parts, then the file that describes them."""
    for part in range(2):
        rows, buffer = slice(2 * part, 2 * part + 2), io.BytesIO()
        pq.write_table(column_table(IDS[rows], {name: values[rows] for name, values in tensors.items()}), buffer)
        folder.write(f"parts/part-{part}.parquet", buffer.getvalue())
    facts = {"fingerprint": "it", "num_rows": 4, **facts_of_parts(folder), **(changes or {})}
    folder.write("_SUCCESS", json.dumps(facts).encode())
    return folder


def check_several(column: Column, rows: np.ndarray) -> None:
    """The rows `rows` of the column equal those of `SEVERAL`, looked up in the order of an epoch."""
    order = permutation(len(rows), 0, 1)
    for name, expected in SEVERAL.items():
        tensor = column.tensors[name]
        assert isinstance(tensor.flat if isinstance(tensor, Ragged) else tensor, np.memmap)
        for place in order:
            assert tensor[place].dtype == expected[rows[place]].dtype
            np.testing.assert_array_equal(tensor[place], expected[rows[place]])


def test_tensors_of_several_names_and_lengths(tmp_path: Path) -> None:
    folder = write_parts(Storage(str(tmp_path / "column")), SEVERAL)
    told: list[str] = []
    for _ in range(2):  # the second time it reads the copy
        column = open_column(folder, tmp_path / "cache", doing=told.append)
        check_several(column, np.arange(4))
    assert len(told) == 2
    tokens = column.tensors["tokens"]
    assert isinstance(tokens, Ragged)
    assert tokens.lengths.tolist() == list(LENGTHS)
    values, mask = tokens.padded([3, 0])
    assert values.shape == (2, 3, 6)
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    np.testing.assert_array_equal(values[mask], np.concatenate([SEVERAL["tokens"][3], SEVERAL["tokens"][0]]))
    assert not values[~mask].any()
    check_several(open_column(folder, tmp_path / "cache", only=["d", "a"]), np.array([0, 3]))
    facts = json.loads(folder.read("_SUCCESS"))
    assert bytes_per_image(facts, {"tokens": np.mean(LENGTHS)}) == 4 * 2 * 2 * 2 + 2 * 2 * 3 + 2 * 8 + 2.25 * 6 * 2
    with pytest.raises(InputError, match="holds latents, pixels, size, tokens where one tensor"):
        _ = column.values


@pytest.mark.parametrize("cleaned", ["tokens.bin", "tokens.offsets.npy", "latents.npy"])
def test_a_copy_of_several_that_lacks_a_file_is_made_again(tmp_path: Path, cleaned: str) -> None:
    folder = write_parts(Storage(str(tmp_path / "column")), SEVERAL)
    open_column(folder, tmp_path / "cache")
    (tmp_path / "cache" / "columns" / "it" / cleaned).unlink()
    open_and_die(folder, tmp_path / "cache")
    check_several(open_column(folder, tmp_path / "cache"), np.arange(4))


def test_a_sole_tensor_is_written_as_before(folder: Storage, tmp_path: Path) -> None:
    """Current and earlier code can read each other's caches, and a ragged column may have empty rows."""
    again = write_parts(Storage(str(tmp_path / "again")), {"value": VALUES})
    assert json.loads(again.read("_SUCCESS")) == json.loads(folder.read("_SUCCESS"))
    schema = pq.read_schema(Path(again.uri) / "parts" / "part-0.parquet")
    assert schema.metadata == {b"dtype": b"float16", b"shape": b"[3]"}
    assert bytes_per_image({"dtype": "float16", "shape": [3]}) == 6
    np.testing.assert_array_equal(open_column(again, tmp_path / "cache").values, VALUES)
    empty = write_parts(Storage(str(tmp_path / "empty")), {"words": [np.zeros((0, 2))] * 4}, {"fingerprint": "none"})
    assert [len(open_column(empty, tmp_path / "cache").tensors["words"][row]) for row in range(4)] == [0] * 4


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"latents": {"dtype": "float16", "shape": [5, 2, 2]}}, "image a: latents holds 32 bytes"),
        ({"tokens": {"dtype": "float16", "shape": [None, 5]}}, "image a: tokens holds 36 bytes"),
        ({"tokens": {"dtype": "float16", "shape": [5, None]}}, "only a first axis can be ragged"),
        ({"../tokens": {"dtype": "float16", "shape": [5]}}, "a name that is not of letters"),
        ({"size": {"dtype": "float17", "shape": [2]}}, "size is of type float17"),
    ],
)
def test_facts_that_the_parts_do_not_bear_out_are_named(tmp_path: Path, facts: dict, named: str) -> None:
    folder = write_parts(Storage(str(tmp_path / "column")), SEVERAL, {"tensors": facts})
    with pytest.raises(InputError, match=named):
        open_column(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.bin"))
