"""The common formats of caption files: each is read correctly, or refused by its columns."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest

from mmcore.data.caption_files import read_caption_file
from mmcore.data.predictions import read_predictions
from mmcore.data.references import read_references
from mmcore.errors import InputError

DOG, TWO = "A dog , running .", 'A sign says " stop " .'
CSV = 'a.jpg,0,"A dog , running ."\na.jpg,1,"A sign says "" stop "" ."\n'
RAW = 'a.jpg{0}A dog , running .\na.jpg{1}A sign says " stop " .\n'
JSON = '{{"{0}": "a.jpg", "{1}": "A dog , running ."}}\n{{"{0}": "a.jpg", "{1}": "A sign says \\" stop \\" ."}}\n'
FORMS = {
    "Kaggle's Flickr30k": ("image_name,comment_number,comment\n" + CSV, "; not read: comment_number"),
    "without its header": (CSV, "no header, .*; not read: comment_number"),
    "unquoted": ("image,caption\n" + RAW.format(",", ","), "columns image and caption, comma"),
    "results.csv": ("image_name| comment_number| comment\n" + RAW.format("| 0| ", "| 1| "), r"`\|` between"),
    "results.csv with its broken row": (
        'image_name| comment_number| comment\na.jpg| 0   A dog , running .\na.jpg| 1| A sign says " stop " .\n',
        r"`\|` between",
    ),
    "results.csv without its header": (RAW.format("| 0| ", "| 1| "), r"no header, .*`\|` between"),
    "Flickr8k.token.txt": (RAW.format("#0\t", "#1\t"), "tab between"),
    "a name of Flickr8k": (RAW.format(".1#0\t", ".1#1\t"), "tab between"),
    "tab and header": ("FileName\tComment\n" + RAW.format("\t", "\t"), "columns FileName and Comment, tab"),
    "semicolon": ("image;text\n" + RAW.format(";", ";"), "columns image and text, `;`"),
    "another order": (
        'caption,id,image\n"A dog , running .",0,a.jpg\n"A sign says "" stop "" .",1,a.jpg\n',
        "columns image and caption, comma between columns; not read: id",
    ),
    "an index of pandas": (
        ",image,caption\n0," + RAW.format(",", ",").replace("\na", "\n1,a"),
        "columns image and caption",
    ),
    "JSON lines": (JSON.format("file_name", "text"), "JSON lines, columns file_name and text"),
    "JSON lines, lists": (
        '{"image": "a.jpg", "captions": ["A dog , running .", "A sign says \\" stop \\" ."]}\n',
        "columns image and captions",
    ),
    "wide": (
        'image,caption_1,caption_0\na.jpg,"A sign says "" stop "" .","A dog , running ."\n',
        "columns image, caption_0 and caption_1",
    ),
}


def write(folder: Path, content: str | bytes, name: str = "file.txt") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions(tmp_path: Path, form: str) -> None:
    content, described = FORMS[form]
    references = read_references(write(tmp_path, content))
    assert references.captions == {"a": [DOG, TWO]}
    assert re.search(described, references.form)


@pytest.mark.parametrize("columns", [{"image_id": [7, 8]}, {"image_id": [7.0, 8.0]}, {"image_id": ["7", "8"]}])
def test_whole_numbers_are_names_in_every_format(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    table = pd.DataFrame({**columns, "caption": ["x", "y"]})
    binary = io.BytesIO()
    table.to_parquet(binary)
    contents = [binary.getvalue(), table.to_json(orient="records", lines=True)]
    for content in contents:
        names = [name for name, _ in read_predictions(write(tmp_path, content), ["7", "8"]).captions]
        assert names == ["7", "8"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("photo,number,words\na.jpg,0,x\nb.jpg,1,y\n", ":1: the columns are 'photo', 'number', 'words'; none .* image"),
        ("image,words\na.jpg,x\n", r":1: the columns are 'image', 'words'; none is known to hold its captions"),
        ("image,caption\ra.jpg,x\r", ":1: its lines end in CR alone"),
        ("id,caption\na.jpg,x\n", ":1: the columns are 'id', 'caption'; none is known to hold the image"),
        ("image_name| comment_number| comment\na.jpg| 0| x\na.jpg| 4 y\n", r":3: expected `image_name\|comment_number"),
        ("caption,image\nA dog, running,a.jpg\n", ":2: expected `caption,image`, got 'A dog, running,a.jpg'"),
        ('{"image": "a.jpg", "text": "x"}\n{"image": "a.jpg", "text": null}\n', ":2: text: expected text, got None"),
        ("image,caption\na.jpg,A dog\0.\n", ":2: the caption holds a NUL character"),
        ('{"image": "a.jpg", "captions": ["x", "A dog\\u0000."]}\n', ":1: the caption holds a NUL character"),
        ('{"picture": "a.jpg", "caption": "x"}\n', ":1: the columns are 'picture', 'caption'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line_alike(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    for read in (read_references, lambda location: read_predictions(location, [])):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert str(error.value).startswith(path)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ('[{"image_id": 7, "caption": "x"}]', ["7"]),
        (
            '[{"file_name": "a.jpg", "caption": "x"},\n {"caption": "y", "file_name": "b.jpg", "id": 3}]',
            ["a.jpg", "b.jpg"],
        ),
        ('{"a.jpg": "x", "b.jpg": ["y"]}', ["a.jpg", "b.jpg"]),
        ('{"image": "a.jpg", "caption": "x"}', ["a.jpg"]),
        ('{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "y"}', ["a.jpg", "b.jpg"]),
    ],
)
def test_json_is_read_as_json_lines_are(tmp_path: Path, document: str, names: list[str]) -> None:
    path = write(tmp_path, document, "results.json")
    assert [name for name, _ in read_predictions(path, []).captions] == names
    assert list(read_references(path).captions.values()) == [["x"], ["y"]][: len(names)]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            '{\n "annotations": []\n}',
            r": an object of 'annotations', not a known form of captions; known are Karpathy's",
        ),
        ("3", ": no object, not a known form"),
        ('{"a.jpg": {"caption": "x"}}', "an object of 'a.jpg', not a known form"),
        ('[{"image": "a.jpg", "caption": "x"}, 4]', r": \[1\]: expected an object such as .*, got 4"),
        ('[{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": 4}]', r": \[1\]: caption: expected text"),
        ('[{"image": "a.jpg"}]', r": \[0\]: the columns are 'image'; none is known to hold its captions"),
        ('[{"image": "a.jpg",\n "caption": x}]', r":2: broken JSON: Expecting value; write the file anew"),
        ("[" * 100_000, ": broken JSON: nested too deeply"),
        ("[]", "holds no"),
    ],
)
def test_json_of_another_form_is_refused_by_place(tmp_path: Path, document: str, message: str) -> None:
    path = write(tmp_path, document, "results.json")
    for read in (read_references, lambda location: read_predictions(location, [])):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert str(error.value).startswith(path)


def test_a_caption_on_several_lines_is_no_half_caption(tmp_path: Path) -> None:
    path, bad = write(tmp_path, 'image,caption\na.jpg,"A dog\nand a cat, red"\na.jpg,x\n'), []
    rows = read_caption_file(path, lambda place, reason: bad.append((place, reason))).rows
    assert [row.captions for row in rows if row.image == "a.jpg"] == [("x",)]
    assert bad == [
        (f"{path}:2", "the quotation mark before the caption is not closed; put the whole caption on one line")
    ]


@pytest.mark.parametrize(
    ("content", "split"),
    [
        ("image,split,caption\na.jpg,val,x\n", "val"),
        ("image,split,caption\na.jpg,,x\n", None),
        ('{"image": "a.jpg", "split": 1, "caption": "x"}\n', "1"),
        ('{"image": "a.jpg", "split": null, "caption": "x"}\n', None),
    ],
)
def test_a_column_of_splits_comes_with_the_rows(tmp_path: Path, content: str, split: str | None) -> None:
    (row,) = read_caption_file(write(tmp_path, content)).rows
    assert (row.image, row.captions, row.split) == ("a.jpg", ("x",), split)


def test_quotation_marks_are_kept_for_the_reports_protocol(tmp_path: Path) -> None:
    path = write(tmp_path, 'image,caption\na.jpg,"A dog , running ."\na.jpg,plain , too\n')
    assert read_references(path, keep_quotes=True).captions == {"a": ['"A dog , running ."', "plain , too"]}
    for content in (FORMS["Kaggle's Flickr30k"][0], FORMS["JSON lines"][0], FORMS["Flickr8k.token.txt"][0]):
        with pytest.raises(InputError, match="not `image,caption` lines"):
            read_references(write(tmp_path, content, "other.txt"), keep_quotes=True)
