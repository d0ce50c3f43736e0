"""Matching of predictions to images, and refusals in one line."""

import csv
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcore.data.caption_text import unquote
from mmcore.data.predictions import read_predictions
from mmcore.data.prepared import split_image_ids
from mmcore.data.references import References, prepared_references, read_references
from mmcore.errors import InputError
from mmcore.metrics.matching import match_predictions

SHARED_CAPTIONS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k" / "captions.txt"
CAPTIONS = """image,caption
1001_ab.jpg,A dog runs .
1001_ab.jpg,"A brown dog , running ."
1002_cd.jpg,"A sign says "" stop "" ."
1003_ef.png,Two men
dog.jpg,A dog
"""


@pytest.fixture
def references(tmp_path: Path) -> References:
    path = tmp_path / "captions.txt"
    path.write_text(CAPTIONS)
    return read_references(str(path))


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    """The error's text, which has to be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def parsed(folder: Path, references: References, content: str | bytes, name: str = "p.csv") -> list[tuple[str, str]]:
    return read_predictions(write(folder, name, content), references.image_ids).captions


# References


def test_references_keep_order_commas_and_quotation_marks(references: References) -> None:
    assert references.captions == {
        "1001_ab": ["A dog runs .", "A brown dog , running ."],
        "1002_cd": ['A sign says " stop " .'],
        "1003_ef": ["Two men"],
        "dog": ["A dog"],
    }
    assert references.image_ids["1003_ef.png"] == references.image_ids["1003_ef"] == "1003_ef"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + CAPTIONS.encode(),
        CAPTIONS.replace("\n", "\r\n").encode(),
        CAPTIONS.removeprefix("image,caption\n").encode(),
        CAPTIONS.replace("\n", "\n\n").encode(),
    ],
    ids=["byte order mark", "CR LF", "no header", "blank lines"],
)
def test_references_in_other_dress_are_the_same(tmp_path: Path, references: References, content: bytes) -> None:
    assert read_references(write(tmp_path, "other.txt", content)).captions == references.captions


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("image,caption\na.jpg,x\nno comma here\n", r":3: .*no comma here"),
        (",caption without image\n", r":1: "),
        ("a.jpg,x\nb.jpg,\n", r":2: "),
        ("", "holds no captions"),
        ("image,caption\n", "holds no captions"),
        (b"a.jpg,x\nb.jpg,caf\xe9\n", r":2: byte 0xe9 is not UTF-8"),
        ("a.jpg,x\na.png,y\n", "two images have the name 'a'"),
    ],
)
def test_bad_references(tmp_path: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as error:
        read_references(write(tmp_path, "bad.txt", content))
    assert message(error).startswith(str(tmp_path / "bad.txt"))


def test_missing_file_and_folder(tmp_path: Path, references: References) -> None:
    with pytest.raises(InputError, match=r"nothing\.txt: no such file"):
        read_references(str(tmp_path / "nothing.txt"))
    with pytest.raises(InputError, match=r"nothing\.csv: no such file"):
        read_predictions(str(tmp_path / "nothing.csv"), references.image_ids)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_references(str(tmp_path))
    with pytest.raises(InputError, match=r"a folder without \*\.parquet"):
        read_predictions(str(tmp_path), references.image_ids)


def test_real_references_are_those_of_the_csv_module() -> None:
    if not SHARED_CAPTIONS.exists():
        pytest.skip("../shared/data/flickr8k is not there")
    references = read_references(str(SHARED_CAPTIONS))
    with open(SHARED_CAPTIONS, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len(references.captions) == 8091
    assert [(name, text.split()) for name, texts in references.captions.items() for text in texts] == [
        (name.removesuffix(".jpg"), caption.split()) for name, caption in rows
    ]


# CSV


def test_csv_first_comma_splits_and_header_is_optional(tmp_path: Path, references: References) -> None:
    rows = "1001_ab.jpg,a dog, a man, a cat\n1002_cd.jpg,\n"
    expected = [("1001_ab.jpg", "a dog, a man, a cat"), ("1002_cd.jpg", "")]
    for header in ("", "image,caption\n", '"Image","Caption"\n', "image_id,caption\r\n", "\ufeffimage,caption\n"):
        assert parsed(tmp_path, references, header + rows) == expected
    assert parsed(tmp_path, references, rows, name="predictions.txt") == expected
    assert parsed(tmp_path, references, rows, name="no_ending") == expected


def test_csv_line_without_image_name_continues_the_caption(tmp_path: Path, references: References) -> None:
    lines = [
        "image,caption",
        "1001_ab.jpg,A dog",
        "and, as far as I see, a man",
        "",
        "dog, running",  # dog.jpg is known, but this file names files
        "1990, the year",
        "2 men",
        "1002_cd.jpg,next",
        "",
    ]
    first = ["A", "dog", "and,", "as", "far", "as", "I", "see,", "a", "man", "dog,", "running", "1990,", "the"]
    first += ["year", "2", "men"]
    for end in ("\n", "\r\n"):
        (name, caption), (other, last) = parsed(tmp_path, references, end.join(lines))
        assert (name, other, last) == ("1001_ab.jpg", "1002_cd.jpg", "next")
        assert caption.split() == first


def test_csv_of_stems(tmp_path: Path, references: References) -> None:
    content = "image,caption\n1001_ab,A dog\nand, then, a man\ndog,A dog\n9999_zz,unknown\n"
    assert [name for name, _ in parsed(tmp_path, references, content)] == ["1001_ab", "dog", "9999_zz"]


def test_csv_of_stems_takes_short_numbers_for_text(tmp_path: Path) -> None:
    path = write(tmp_path, "captions.txt", "1001_ab.jpg,x\n1002_cd.jpg,y\n")
    captions = parsed(tmp_path, read_references(path), "1001_ab,A dog in\n1990, or later\n1009_zz,unknown\n")
    assert captions == [("1001_ab", "A dog in\n1990, or later"), ("1009_zz", "unknown")]


@pytest.mark.parametrize("name", ["unknown.jpg", "UNKNOWN.JPEG", "un known.webp", "a/b.png"])
def test_csv_unknown_file_name_never_continues_a_caption(tmp_path: Path, references: References, name: str) -> None:
    captions = parsed(tmp_path, references, f"1001_ab.jpg,A dog\n{name},A cat\n")
    assert captions == [("1001_ab.jpg", "A dog"), (name, "A cat")]


def test_csv_line_ends_only_at_line_feed(tmp_path: Path, references: References) -> None:
    content = "1001_ab.jpg,one\u2028two\x0bthree\x85four\n1002_cd.jpg,x\n"
    assert parsed(tmp_path, references, content)[0] == ("1001_ab.jpg", "one\u2028two\x0bthree\x85four")


def test_csv_written_by_the_csv_module_comes_back(tmp_path: Path, references: References) -> None:
    captions = ["plain", "with, comma", 'says "stop"', '"all quoted"', "two\nlines, here", 'ends with "', '""', ""]
    many = References("many")
    for i in range(len(captions)):
        many.add_name(f"{i}.jpg", f"{i}")
        many.captions[f"{i}"] = ["x"]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        path = tmp_path / "written.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=quoting)
            writer.writerow(["image", "caption"])
            writer.writerows((f"{i}.jpg", caption) for i, caption in enumerate(captions))
        assert [caption for _, caption in read_predictions(str(path), many.image_ids).captions] == captions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"a, b"', "a, b"),
        ('"a ""b"" c"', 'a "b" c'),
        ('"a" or "b"', '"a" or "b"'),
        ('"', '"'),
        ('""', ""),
        ('" unfinished', '" unfinished'),
        (" plain ", "plain"),
    ],
)
def test_unquote(text: str, expected: str) -> None:
    assert unquote(text) == expected


def test_csv_that_does_not_begin_with_an_image(tmp_path: Path, references: References) -> None:
    with pytest.raises(InputError, match=r"p\.csv:2: expected `image,caption`, got 'Here they are'"):
        parsed(tmp_path, references, "image,caption\nHere they are\n1001_ab.jpg,x\n")


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_predictions(tmp_path: Path, references: References, name: str, content: str) -> None:
    with pytest.raises(InputError, match="holds no predictions"):
        parsed(tmp_path, references, content, name)
    if name == "p.csv":
        with pytest.raises(InputError, match="holds no predictions"):
            parsed(tmp_path, references, "image,caption\n")


def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path, references: References) -> None:
    rows = {"p.csv": b"1001_ab.jpg,x", "p.jsonl": b'{"image": "1001_ab.jpg", "caption": "x"}'}
    for name, row in rows.items():
        with pytest.raises(InputError, match=rf"{name}:3: byte 0xff is not UTF-8"):
            parsed(tmp_path, references, row + b"\n\n" + row + b"\xff\n", name)


# JSON lines


def test_jsonl(tmp_path: Path, references: References) -> None:
    rows = [
        {"image": "1001_ab.jpg", "caption": "a dog, two\nlines"},
        {"image_id": "1002_cd", "caption": "x", "score": 0.5},
        {"file_name": "1003_ef.png", "caption": ""},
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\r\n\r\n"
    assert parsed(tmp_path, references, content, "p.jsonl") == [
        ("1001_ab.jpg", "a dog, two\nlines"),
        ("1002_cd", "x"),
        ("1003_ef.png", ""),
    ]
    assert parsed(tmp_path, references, content, "P.JSONL") == parsed(tmp_path, references, content, "p.jsonl")


def test_jsonl_number_is_an_image_id(tmp_path: Path, references: References) -> None:
    assert parsed(tmp_path, references, '{"image_id": 1001, "caption": "x"}', "p.jsonl") == [("1001", "x")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1001_ab.jpg,a dog", "broken JSON"),
        ('{"image": "1001_ab.jpg", "caption": "cut', "broken JSON"),
        ('["1001_ab.jpg", "a dog"]', "expected an object"),
        ('{"picture": "1001_ab.jpg", "caption": "x"}', "the columns are 'picture', 'caption'; none .* the image"),
        ('{"image": null, "caption": "x"}', "image: expected the name of an image, got None"),
        ('{"image": true, "caption": "x"}', "image: expected the name of an image, got True"),
        ('{"image": "1001_ab.jpg"}', "the columns are 'image'; none .* its captions"),
        ('{"image": "1001_ab.jpg", "caption": 7}', "caption: expected text, got 7"),
        ('{"image": "1001_ab.jpg", "caption": ["x", "y"]}', "2 captions for '1001_ab.jpg'; predict one an image"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, references: References, line: str, expected: str) -> None:
    content = '{"image": "1002_cd.jpg", "caption": "x"}\n' + line + "\n"
    with pytest.raises(InputError, match=rf"p\.jsonl:2: {expected}") as error:
        parsed(tmp_path, references, content, "p.jsonl")
    message(error)


# Parquet


def parquet_bytes(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_parquet_file_and_folder_of_parts(tmp_path: Path, references: References) -> None:
    first = parquet_bytes(image_id=["1001_ab"], file_name=["1001_ab.jpg"], caption=["a dog"])
    second = parquet_bytes(image_id=["1002_cd"], file_name=["1002_cd.jpg"], caption=["x"])
    assert parsed(tmp_path, references, first, "p.parquet") == [("1001_ab.jpg", "a dog")]
    assert parsed(tmp_path, references, parquet_bytes(image_id=["1001_ab"], caption=["y"]), "i.parquet") == [
        ("1001_ab", "y")
    ]
    parts = tmp_path / "out" / "parts"
    parts.mkdir(parents=True)
    write(parts, "b.parquet", second)
    write(parts, "a.parquet", first)
    write(parts, "_SUCCESS", b"{}")
    for location in (str(parts), f"{parts}/"):
        predictions = read_predictions(location, references.image_ids)
        assert predictions.captions == [("1001_ab.jpg", "a dog"), ("1002_cd.jpg", "x")]
        assert predictions.sha256 == hashlib.sha256(first + second).hexdigest()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"image,caption\n", "broken Parquet"),
        (parquet_bytes(image_id=["a"], caption=["b"])[:-9], "broken Parquet"),
        (parquet_bytes(image=[b"bytes"], caption=["b"]), "row 1: image: expected the name of an image, got b'bytes'"),
        (parquet_bytes(image_id=["a"], words=["b"]), "the columns are 'image_id', 'words'; none .* its captions"),
        (parquet_bytes(image_id=["a", "b"], caption=["x", None]), "row 2: caption: expected text, got None"),
        (parquet_bytes(image_id=[7.5], caption=["x"]), "row 1: image_id: expected the name of an image, got 7.5"),
    ],
)
def test_bad_parquet(tmp_path: Path, references: References, content: bytes, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as error:
        parsed(tmp_path, references, content, "p.parquet")
    message(error)


# Matching


def matched(folder: Path, references: References, content: str, expected: list[str] | None = None) -> dict[str, str]:
    return match_predictions(
        read_predictions(write(folder, "p.csv", content), references.image_ids), references, expected
    )


def test_match_goes_by_file_name_or_stem_in_prediction_order(tmp_path: Path, references: References) -> None:
    captions = matched(tmp_path, references, "1003_ef.png,two\n1001_ab,one\n")
    assert list(captions.items()) == [("1003_ef", "two"), ("1001_ab", "one")]


def test_unknown_images_list_the_first_five(tmp_path: Path, references: References) -> None:
    content = "1001_ab.jpg,x\n" + "".join(f"u{i}.jpg,x\n" for i in range(7))
    with pytest.raises(InputError, match="7 predictions are for images that are not in") as error:
        matched(tmp_path, references, content)
    assert message(error).endswith("'u0.jpg', 'u1.jpg', 'u2.jpg', 'u3.jpg', 'u4.jpg' and 2 more")


def test_same_stem_with_another_ending_is_unknown(tmp_path: Path, references: References) -> None:
    with pytest.raises(InputError, match=r"'1001_ab\.png'"):
        matched(tmp_path, references, "1001_ab.png,x\n")


def test_two_predictions_for_one_image(tmp_path: Path, references: References) -> None:
    with pytest.raises(InputError, match=r"2 images have more than one prediction: '1001_ab', '1002_cd\.jpg'"):
        matched(tmp_path, references, "1001_ab.jpg,x\n1002_cd.jpg,x\n1001_ab,y\n1002_cd.jpg,x\n1003_ef.png,x\n")


def test_expected_images_must_all_be_there_and_no_others(tmp_path: Path, references: References) -> None:
    content = "1001_ab.jpg,x\n1002_cd.jpg,y\n"
    assert matched(tmp_path, references, content, ["1002_cd", "1001_ab"]) == {"1001_ab": "x", "1002_cd": "y"}
    with pytest.raises(InputError, match="1 of the split's 3 images have no prediction: 'dog'"):
        matched(tmp_path, references, content, ["1001_ab", "1002_cd", "dog"])
    with pytest.raises(InputError, match="1 predictions are for images outside the split: '1002_cd'"):
        matched(tmp_path, references, content, ["1001_ab"])


# Prepared datasets


@pytest.fixture
def prepared(tmp_path: Path) -> str:
    folder = tmp_path / "store" / "data" / "shapes"
    folder.mkdir(parents=True)
    for part, ids in enumerate((["s1", "s2"], ["s3"])):
        write(
            folder,
            f"part-0000{part}.parquet",
            parquet_bytes(
                image_id=ids,
                file_name=[f"{i}.png" for i in ids],
                image=[b"not decoded" for _ in ids],
                captions=[[f"{i} one", f"{i} two"] for i in ids],
                split=["train" if i == "s1" else "test" for i in ids],
            ),
        )
    write(folder, "_SUCCESS", b"{}")
    return str(tmp_path / "store")


def test_prepared_references_and_split(prepared: str) -> None:
    references = prepared_references(prepared, "shapes")
    assert references.captions == {i: [f"{i} one", f"{i} two"] for i in ("s1", "s2", "s3")}
    assert references.image_ids["s3.png"] == "s3"
    assert split_image_ids(prepared, "shapes", "split", "test") == ["s2", "s3"]


def test_bad_prepared_datasets(prepared: str) -> None:
    with pytest.raises(InputError, match=r"no column 'splt'; columns there: .*captions, split"):
        split_image_ids(prepared, "shapes", "splt", "test")
    with pytest.raises(InputError, match="no image has split 'tst'; values there: 'test', 'train'"):
        split_image_ids(prepared, "shapes", "split", "tst")
    with pytest.raises(InputError, match=r"data/flickr8k: no prepared dataset"):
        prepared_references(prepared, "flickr8k")
    (Path(prepared) / "data" / "shapes" / "_SUCCESS").unlink()
    with pytest.raises(InputError, match=r"data/shapes: no prepared dataset"):
        prepared_references(prepared, "shapes")
