"""mmcore/data/prompts.py: all formats of prompt lists, their seeds, and errors that name file and line."""

import json
import weakref
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmcore.data.prompts
from mmcore.data.prompts import Prompt, read_prompts
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_row
from mmcore.errors import InputError
from mmcore.seeding import MAX_IMAGE_SEED, derive_seed
from mmcore.storage import Storage


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def write_parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_all_forms_give_the_same_prompts(tmp_path: Path) -> None:
    wanted = [
        Prompt("a", "a dog, running", 5),
        Prompt("b", 'a "red" bird\nin two lines', derive_seed(3, "b") & MAX_IMAGE_SEED),
    ]
    rows: list[dict] = [
        {"image_id": "a", "prompt": wanted[0].prompt, "seed": 5},
        {"prompt": wanted[1].prompt, "image_id": "b"},
    ]
    files = [
        write(
            tmp_path / "p.csv", 'image_id,prompt,seed\r\na,"a dog, running",5\r\nb,"a ""red"" bird\nin two lines",\n\n'
        ),
        write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        write_parquet(
            tmp_path / "p.parquet", prompt=[row["prompt"] for row in rows], image_id=["a", "b"], seed=[5, None]
        ),
    ]
    for file in files:
        assert list(read_prompts(file, seed=3)) == wanted, file


def test_numbers_are_read_alike_in_every_form(tmp_path: Path) -> None:
    # As pandas writes integers, and seeds of which some are missing.
    files = [
        write(tmp_path / "p.csv", "prompt,image_id,seed\na,139,5.0\nb,285,\n"),
        write(
            tmp_path / "p.jsonl",
            '{"prompt": "a", "image_id": 139, "seed": 5.0}\n{"prompt": "b", "image_id": 285, "seed": null}\n',
        ),
        write_parquet(tmp_path / "p.parquet", prompt=["a", "b"], image_id=[139, 285], seed=[5.0, float("nan")]),
    ]
    for file in files:
        assert list(read_prompts(file)) == [
            Prompt("139", "a", 5),
            Prompt("285", "b", derive_seed(0, "285") & MAX_IMAGE_SEED),
        ]


def test_ids_that_pandas_has_beside_missing_ones_are_whole_numbers(tmp_path: Path) -> None:
    table = pd.DataFrame({"image_id": [139, None, 632], "prompt": ["a", "b", "c"]})
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "p.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        found = [each.image_id for each in read_prompts(str(tmp_path / f"p.{ending}"))]
        assert found == ["139", "000001", "632"], ending


def test_a_row_may_give_its_size(tmp_path: Path) -> None:
    csv = write(tmp_path / "p.csv", "prompt,height,width\na,64,32\nb,,\n")
    # As pandas writes integers in a column with missing values.
    parquet = write_parquet(tmp_path / "p.parquet", prompt=["a", "b"], height=[64.0, None], width=[32.0, None])
    for file in (csv, parquet):
        assert [prompt.size for prompt in read_prompts(file)] == [(64, 32), None]


def test_lines_of_text_get_numbers_and_seeds_of_their_own(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "\ufeffa dog\r\n\r\na cat, black\n \n\n  a bird \n\n\n")
    prompts = list(read_prompts(file, seed=7))
    assert [(each.image_id, each.prompt) for each in prompts] == [
        ("000000", "a dog"), ("000001", "a cat, black"), ("000002", "a bird"),
    ]  # fmt: skip
    assert [each.seed for each in prompts] == [derive_seed(7, each.image_id) & MAX_IMAGE_SEED for each in prompts]
    assert len({each.seed for each in prompts} | {each.seed for each in read_prompts(file, seed=8)}) == 6
    # A longer list or a smaller count does not change the other prompts.
    assert list(read_prompts(file, seed=7, count=2)) == prompts[:2]


def test_many_prompts_are_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are read, checked and planned, no more prompts are in memory at once than are used."""
    monkeypatch.setattr(mmcore.data.prompts, "_BATCH_ROWS", 16)
    alive: weakref.WeakSet[Prompt] = weakref.WeakSet()
    most = 0

    def count(self: Prompt, /, *values: Any, **named: Any) -> None:
        nonlocal most
        init(self, *values, **named)
        alive.add(self)
        most = max(most, len(alive))

    init = Prompt.__init__
    monkeypatch.setattr(Prompt, "__init__", count)
    prompts = read_prompts(write(tmp_path / "p.txt", "".join(f"a dog {row}\n" for row in range(1000))))
    assert [prompts.sizes[None].prompt, prompts[-1].prompt] == ["a dog 0", "a dog 999"]
    assert prompts.column("prompt")[998:] == ["a dog 998", "a dog 999"]
    assert sum(1 for _ in prompts[10:900]) == 890
    assert most <= 3 * 16, most


def test_shapes_need_no_storage() -> None:
    prompts = list(read_prompts("shapes-test", count=500))
    assert len(prompts) == 500
    row = shapes_row(ShapesSettings(num_test=500), "test", 499)
    assert (prompts[499].image_id, prompts[499].prompt) == (row["image_id"], row["captions"][0])
    assert len(read_prompts("shapes-test")) == ShapesSettings().num_test


def test_prepared_data_give_the_test_split(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for dataset, column in (("flickr8k", "split_report_generation"), ("shapes", "split")):
        folder = tmp_path / "data" / dataset
        folder.mkdir(parents=True)
        captions = [[f"{dataset} first {i}", f"second {i}"] for i in range(4)]
        splits = ["train", "test", "train", "test"]
        table = pa.table({"image_id": list("wxyz"), "captions": captions, column: splits})
        pq.write_table(table, folder / "part-00000.parquet")
        (folder / "_SUCCESS").write_text("{}")
    for source, dataset in (("flickr8k:report-test", "flickr8k"), ("shapes-test", "shapes")):
        prompts = list(read_prompts(source, storage=storage.uri))
        assert [(each.image_id, each.prompt) for each in prompts] == [
            ("x", f"{dataset} first 1"), ("z", f"{dataset} first 3"),
        ]  # fmt: skip
        with pytest.raises(InputError, match=r"--count 3: .* holds 2 prompts"):
            read_prompts(source, storage=storage.uri, count=3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a dog\n\na \0 cat\n", r"p.txt:3: prompt is 'a \\x00 cat'"),
        ("p.txt", "\n\n", "holds no prompts"),
        ("p.csv", "prompt,seed\na dog,1\na cat,minus\n", r"p.csv:3: seed is 'minus'"),
        ("p.csv", "prompt,seed\na dog,-1\n", r"p.csv:2: seed is '-1'"),
        ("p.csv", "prompt,imageid\na dog,1\n", r"p.csv:1: columns 'prompt', 'imageid'; expected prompt"),
        ("p.csv", "prompt,seed\na dog, black,1\n", r"p.csv:2: 3 fields where the header has 2"),
        ("p.csv", 'prompt,image_id\n"two\nlines",a\nb,a\n', r"p.csv:4: image_id 'a' is that of .*p.csv:2 too"),
        ("p.csv", "prompt,image_id\na,\nb,000000\n", r"p.csv:3: image_id '000000' is that of .*p.csv:2 too"),
        ("p.csv", 'prompt\n"a "dog"\n', r"p.csv:2: broken CSV"),
        ("p.csv", "prompt,image_id\na dog,../up\n", r"p.csv:2: image_id is '../up'"),
        ("p.csv", "prompt,image_id\na dog,.hidden\n", r"p.csv:2: image_id is '.hidden'"),
        ("p.jsonl", '{"prompt": "a dog"}\n{"prompt": 3}\n', r"p.jsonl:2: prompt is 3"),
        ("p.jsonl", '{"prompt": "half a \\ud83d"}\n', r"p.jsonl:1: prompt is 'half a \\ud83d'"),
        ("p.jsonl", '{"prompt": "a dog", "seed": true}\n', r"p.jsonl:1: seed is True"),
        ("p.jsonl", '{"prompt": "a dog", "seed": 4294967296}\n', r"p.jsonl:1: seed is 4294967296"),
        ("p.jsonl", '{"prompt": "a dog"\n', r"p.jsonl:1: broken JSON"),
        ("p.jsonl", '{"prompt": "a dog", "seed": 1.5}\n', r"p.jsonl:1: seed is 1.5"),
        ("p.jsonl", '{"prompt": "a dog", "image_id": 1.5}\n', r"p.jsonl:1: image_id is 1.5"),
        ("p.jsonl", '{"prompt": "a dog", "image_id": true}\n', r"p.jsonl:1: image_id is True"),
        ("p.csv", "prompt,height,width\na dog,64,\n", r"p.csv:2: width is None; give height and width"),
        ("p.csv", "prompt,height\na dog,64\n", r"p.csv:2: width is None; give height and width"),
        ("p.jsonl", '{"prompt": "a dog", "height": 64, "width": 0}\n', r"p.jsonl:1: width is 0; give height and width"),
        ("p.jsonl", '{"prompt": "a", "height": "64px", "width": 64}\n', r"p.jsonl:1: height is '64px'; give height"),
        ("p.jsonl", '["a dog"]\n', r"p.jsonl:1: expected an object"),
        ("p.jsonl", '{"text": "a dog"}\n', r"p.jsonl:1: columns 'text'; expected prompt"),
        ("p.parquet", "no parquet", r"p.parquet: broken Parquet"),
        ("p.tsv", "a dog\n", r"expected a file ending in \.txt, \.csv"),
    ],
)
def test_errors_name_file_and_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read_prompts(write(tmp_path / name, text))
    assert "\n" not in str(raised.value)


def test_blank_lines_between_prompts_are_none(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.txt", "\na dog\r\n \n\na cat\n\n"))
    assert [(each.image_id, each.prompt) for each in prompts] == [("000000", "a dog"), ("000001", "a cat")]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_what_spreadsheets_write_in_place_of_commas(tmp_path: Path, delimiter: str) -> None:
    text = 'image_id;prompt;seed\na;"a dog, a cat; red";5\n'.replace("a cat; red", f"a cat{delimiter} red")
    path = write(tmp_path / "p.csv", text.replace(";", delimiter))
    assert list(read_prompts(path)) == [Prompt("a", f"a dog, a cat{delimiter} red", 5)]
    path = write(tmp_path / "p.csv", f"prompt{delimiter}seed\na dog\n")
    with pytest.raises(InputError, match=r"p\.csv:2: 1 fields where the header has 2 .*; put a text with a (semi|tab)"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "text", "places", "ids"),
    [
        ("p.csv", "prompt,image_id\n,a\nb,b\nc,b\nd,../d\ne,f,g\nh,\n", [2, 4, 5, 6], ["b", "000004"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n{\n7\n{"prompt": "b", "seed": -1}\n', [2, 3, 4, 5], ["000000"]),
    ],
)
def test_bad_rows_are_left_out_and_listed_on_request(
    tmp_path: Path, name: str, text: str, places: list[int], ids: list[str]
) -> None:
    path = write(tmp_path / name, text)
    skipped: list[str] = []
    assert [each.image_id for each in read_prompts(path, skipped=skipped)] == ids
    assert sorted(line.split(": ")[0] for line in skipped) == [f"{path}:{place}" for place in places]
    with pytest.raises(InputError, match=rf"--count 3: .* holds {len(ids)} good prompts"):
        read_prompts(path, count=3, skipped=[])
    with pytest.raises(InputError, match="not one good prompt is left"):
        read_prompts(write(tmp_path / "p.csv", "prompt,seed\na,x\n"), skipped=[])


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere.txt", {}, "nowhere.txt: no such file"),
        ("flickr8k:report-test", {}, "give --storage"),
        ("nowhere.txt", {"storage": "out"}, "--storage out: is read for"),
        ("shapes-test", {"count": 0}, "--count 0"),
        ("shapes-test", {"seed": -1}, "--seed -1"),
    ],
)
def test_flags_that_do_not_fit(source: str, more: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(source, **more)
