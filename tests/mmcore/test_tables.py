"""mmcore/data/tables.py: the format from the content, places of rows, index columns of pandas, errors by line."""

import io
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcore.data import tables
from mmcore.data.tables import Row, read_rows, table_format
from mmcore.errors import InputError


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


ROWS = b'{"a": "x", "n": 1}\n'


@pytest.mark.parametrize(
    ("name", "data", "form"),
    [
        ("t.txt", b"a dog", "txt"),
        ("t.txt", b"", "txt"),
        ("t.txt", b"{a dog}\n", "txt"),
        ("t.txt", b"\xef\xbb\xbf" + ROWS, "jsonl"),
        ("t.txt", parquet(pa.table({"a": ["x"]})), "parquet"),
        ("t.csv", parquet(pa.table({"a": ["x"]})), "parquet"),
        ("t.JSONL", b'{"broken": \n', "jsonl"),
        ("t.CSV", b"a,b\n", "csv"),
        ("t.parquet", b"no parquet", "parquet"),
        ("t", json.dumps({"a": "x" * 2**17}).encode(), "jsonl"),
        ("t", b"a,b\n", None),
    ],
)
def test_the_content_tells_the_format_first(name: str, data: bytes, form: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert table_format(str(tmp_path / name)) == form


def test_rows_have_places_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROWS_PER_BATCH", 1)
    files = {
        "t.txt": b"\xef\xbb\xbfone\r\n\n two\xe2\x80\xa8 lines\n\n",
        "t.csv": b'\xef\xbb\xbfa, b\r\n"x, ""y""\nz",\r\n\r\nw,1\r\n',
        "t.jsonl": b'{"a": "x"}\n\n{"b": 1, "a": null}\n',
        "t.parquet": parquet(pa.table({"a": ["x", None], "b": [1, 2]})),
    }
    wanted = {
        "t.txt": [(":1", {"text": "one"}), (":3", {"text": "two\u2028 lines"})],
        "t.csv": [(":2", {"a": 'x, "y"\nz', "b": None}), (":5", {"a": "w", "b": "1"})],
        "t.jsonl": [(":1", {"a": "x"}), (":3", {"b": 1, "a": None})],
        "t.parquet": [(": row 1", {"a": "x", "b": 1}), (": row 2", {"a": None, "b": 2})],
    }
    for name, data in files.items():
        path = str(tmp_path / name)
        Path(path).write_bytes(data)
        assert list(read_rows(path)) == [Row(path + place, values) for place, values in wanted[name]]


def test_an_index_that_pandas_wrote_is_no_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x", "y", "z"], "id": [7, 8, 9]})
    filtered = frame[frame.index != 1]
    filtered.to_csv(tmp_path / "i.csv")
    filtered.to_parquet(tmp_path / "i.parquet")
    # As datasets of Hugging Face writes it: with the column and without pandas' metadata.
    bare = pa.Table.from_pandas(filtered).replace_schema_metadata(None)
    pq.write_table(bare, tmp_path / "b.parquet")
    for name in ("i.csv", "i.parquet", "b.parquet"):
        rows = [row.values for row in read_rows(str(tmp_path / name))]
        assert [(row["a"], str(row["id"])) for row in rows] == [("x", "7"), ("z", "9")], name
        assert set(rows[0]) == {"a", "id"}, name
    # A named index may be wanted. A range index is stored in pandas' metadata only.
    for ids in ([7, 8, 9], [7, 8, 12]):
        frame.assign(id=ids).set_index("id").to_parquet(tmp_path / "n.parquet")
        for known in (None, ("a", "id")):
            assert [row.values["id"] for row in read_rows(str(tmp_path / "n.parquet"), known=known)] == ids
        assert set(next(read_rows(str(tmp_path / "n.parquet"), known=("a",))).values) == {"a"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", b"a\n\xff\n", r"t.txt:2: byte 0xff is not UTF-8"),
        ("t.txt", b"a\rb\r", r"t.txt:1: its lines end in CR alone"),
        ("t.csv", b"a,b\nx,y\nx,y,z\n", r"t.csv:3: 3 fields where the header has 2 \(a,b\)"),
        ("t.csv", b'a\n"x" y\n', r"t.csv:2: broken CSV"),
        ("t.csv", b"a,a\n", r"t.csv:1: two columns have the name 'a'"),
        ("t.csv", b",a\ndog,x\n", r"t.csv:2: 'dog' stands in a column without a name"),
        ("t.jsonl", b'{"a": 1}\n[1]\n', r"t.jsonl:2: expected an object"),
        ("t.jsonl", b'{"a": 1}\n' + b"[" * 100_000, r"t.jsonl:2: broken JSON"),
        ("t.parquet", b"PAR1 and no more", r"t.parquet: broken Parquet"),
        ("t", b"a,b\n", r"expected a file ending in \.txt"),
    ],
)
def test_errors_name_file_and_line(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as raised:
        list(read_rows(str(tmp_path / name)))
    assert "\n" not in str(raised.value)


def test_names_are_checked_once_a_header_and_where_they_change(tmp_path: Path) -> None:
    checked: list[tuple[list[str], str]] = []
    for name, data in {"t.csv": b"a,b\nx,y\n", "t.jsonl": b'{"a": 1}\n{"a": 2}\n{"b": 1}\n'}.items():
        (tmp_path / name).write_bytes(data)
        list(read_rows(str(tmp_path / name), check_names=lambda names, place: checked.append((names, place[-1]))))
    assert checked == [(["a", "b"], "1"), (["a"], "1"), (["b"], "3")]
