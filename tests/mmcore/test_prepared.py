"""What is read of a prepared dataset, and what training refuses of it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcore.data.prepared import read_captions
from mmcore.errors import InputError
from mmcore.storage import Storage


@pytest.mark.parametrize(
    ("splits", "there"),
    [
        (["unused"] * 3, "unused 3"),
        (["train"] * 3, "train 3"),
        (["test", "validation", "test"], "test 2, validation 1"),
    ],
)
def test_a_split_that_cannot_train_is_named_with_the_others(tmp_path: Path, splits: list[str], there: str) -> None:
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    columns = {"image_id": ["a", "b", "c"], "file_name": ["a.jpg", "b.jpg", "c.jpg"], "captions": [["x"]] * 3}
    whole = {"split_report": ["train", "train", "validation"], "split_karpathy": splits}
    pq.write_table(pa.table({**columns, **whole}), folder / "part-00000.parquet")
    (folder / "_SUCCESS").write_text("{}")
    assert read_captions(Storage(str(tmp_path)), "mine", "split_report").validation_rows() == [2]
    with pytest.raises(InputError, match=f"--split split_karpathy: .*/mine has {there}; .* try --split split_report"):
        read_captions(Storage(str(tmp_path)), "mine", "split_karpathy")
