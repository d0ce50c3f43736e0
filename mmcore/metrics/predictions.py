"""Reading captions to be scored, and the captions to score them against.

Three forms of predictions (CSV, JSON lines, our Parquet) and two of references (captions.txt, a prepared
dataset) meet here in one key: the image_id, which is the image's file name without its ending. A name in
a file of predictions may be either, the file name or the image_id.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.data.flickr8k import split_caption_row
from mmcore.data.prepared import read_prepared
from mmcore.data.tables import decode_lines, read_bytes, split_location
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES
from mmcore.storage import Storage

IMAGE_FILE = re.compile(rf"(?P<stem>.+)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})", re.IGNORECASE)
# The fields that may name the image in a JSON line, the first present one counts.
NAME_FIELDS = ("image", "file_name", "image_id")
HEADERS = tuple((name, "caption") for name in NAME_FIELDS)
NUM_LISTED = 5


@dataclass(frozen=True)
class Predictions:
    """Captions in file order, as (image as the file names it, caption)."""

    location: str
    sha256: str
    captions: list[tuple[str, str]]


@dataclass(frozen=True)
class References:
    """All known images with their reference captions.

    Attributes:
        location: where they were read, for messages and for the protocol.
        captions: image_id to its captions, images and captions in the order of the file.
        image_ids: every name that an image goes by (file name and image_id) to its image_id.
    """

    location: str
    captions: dict[str, list[str]] = field(default_factory=dict)
    image_ids: dict[str, str] = field(default_factory=dict)

    def add_name(self, file_name: str, image_id: str) -> None:
        """Make `file_name` a name of the image; InputError where the image_id has another file already."""
        if file_name in self.image_ids and self.image_ids[file_name] == image_id:
            return
        if image_id in self.image_ids:
            raise InputError(
                f"{self.location}: two images have the name {image_id!r} without its ending (one is "
                f"{file_name!r}); names must differ before the ending"
            )
        self.image_ids[file_name] = image_id
        self.image_ids[image_id] = image_id


def image_stem(file_name: str) -> str:
    """`dog.jpg` -> `dog`; a name without an image's ending stays as it is."""
    match = IMAGE_FILE.fullmatch(file_name)
    return match["stem"] if match else file_name


def listed(names: Iterable[str]) -> str:
    """The first five names, quoted (a name may hold anything), and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return ", ".join(repr(name) for name in names[:NUM_LISTED]) + more


def unquote(text: str) -> str:
    """A CSV field's content: without the quotes around it where it is quoted as a whole, "" as one quote.

    Writers of CSV quote each caption that holds a comma. A text that merely begins and ends
    with a quoted word (`"a" or "b"`) is not a quoted field and stays.
    """
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', ""):
        return text[1:-1].replace('""', '"')
    return text


def is_header(line: str) -> bool:
    name, _, caption = line.partition(",")
    return (unquote(name).lower(), unquote(caption).lower()) in HEADERS


def read_references(location: str) -> References:
    """captions.txt: lines `image,caption`, the first comma splits, a header line may come first."""
    references = References(location)
    for number, line in enumerate(decode_lines(read_bytes(location), location), start=1):
        if not line.strip() or (number == 1 and is_header(line)):
            continue
        # The reader of jobs/prepare.py, so that both ways to references give the same words.
        file_name, caption = split_caption_row(line) or ("", "")
        if not file_name or not caption:
            raise InputError(f"{location}:{number}: expected `image,caption`, got {line[:60]!r}")
        image_id = image_stem(file_name)
        references.add_name(file_name, image_id)
        references.captions.setdefault(image_id, []).append(caption)
    if not references.captions:
        raise InputError(f"{location}: holds no captions; expected lines `image,caption`")
    return references


def prepared_references(storage_uri: str, dataset: str) -> References:
    """The references that a prepared dataset carries in its column `captions`."""
    table = read_prepared(storage_uri, dataset, ["image_id", "file_name", "captions"])
    references = References(f"{(Storage(storage_uri) / 'data' / dataset).uri}/*.parquet")
    for row in table.to_pylist():
        references.add_name(row["file_name"], row["image_id"])
        references.captions[row["image_id"]] = row["captions"]
    return references


def read_predictions(location: str, references: References) -> Predictions:
    """A file's or a Parquet folder's predictions; the ending says the form, any but two means CSV.

    Args:
        location: local path or URI. A folder holds Parquet parts, which count in the order of their names.
        references: the known images; in CSV they tell a new caption from the next line of the one before.

    Raises:
        InputError: unreadable, empty or malformed; the message names the file, and the line where it can.
    """
    if "://" in location:
        storage, name = split_location(location)
        is_file = not location.endswith("/") and storage.exists(name)
    else:
        is_file = Path(location).is_file()
    names = [] if is_file else Storage(location).list(".parquet")
    if not names and Path(location).is_dir():
        raise InputError(f"{location}: a folder without *.parquet; name a file or the folder of the parts")

    sources = [f"{location.rstrip('/')}/{name}" for name in names] or [location]
    ending = ".parquet" if names else Path(location).suffix.lower()
    digest = hashlib.sha256()
    captions: list[tuple[str, str]] = []
    for source in sources:
        data = read_bytes(source)
        digest.update(data)
        if ending == ".parquet":
            captions.extend(parse_parquet(data, source))
        elif ending == ".jsonl":
            captions.extend(parse_jsonl(decode_lines(data, source), source))
        else:
            captions.extend(parse_csv(decode_lines(data, source), source, references.image_ids))
    if not captions:
        raise InputError(f"{location}: holds no predictions")
    return Predictions(location, digest.hexdigest(), captions)


def parse_csv(lines: list[str], location: str, known_names: Collection[str]) -> list[tuple[str, str]]:
    """`image,caption` lines; the first comma splits; a line that begins with no image name goes on with
    the caption before it (language models like to answer in several lines).

    What an image name is has to be guessed for names that are not known, and the guess leans to the side
    that is noticed: a wrong "image name" ends as the error of an unknown image, a wrong "next line" would
    silently drop one image and spoil the caption of another. So the name of an image file always counts,
    known or not. In a file that names images without their ending (its first line tells), so does any
    known name, and a word with a digit in it that is as long as the known names (`1000268201_693b08cb0e`).
    In a file of file names a known name without its ending counts only with a digit: `dog, running` goes on
    with a caption even where dog.jpg exists.
    """
    shortest = min(map(len, known_names), default=0)
    with_ending = False

    def is_image_name(name: str) -> bool:
        if IMAGE_FILE.fullmatch(name):
            return True
        has_digit = any(character.isdigit() for character in name)
        if name in known_names:
            return has_digit or not with_ending
        return has_digit and not with_ending and len(name) >= shortest and len(name.split()) == 1

    entries: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines, start=1):
        if (number == 1 and is_header(line)) or (not entries and not line.strip()):
            continue
        head, comma, caption = line.partition(",")
        name = unquote(head)
        if not entries:
            # Whatever the first line begins with has to be an image: there is no caption to go on with.
            if not comma:
                raise InputError(f"{location}:{number}: expected `image,caption`, got {line[:60]!r}")
            with_ending = IMAGE_FILE.fullmatch(name) is not None
            entries.append((name, [caption]))
        elif comma and is_image_name(name):
            entries.append((name, [caption]))
        else:
            entries[-1][1].append(line)
    return [(name, unquote("\n".join(parts))) for name, parts in entries]


def parse_jsonl(lines: list[str], location: str) -> list[tuple[str, str]]:
    """One object a line: the image under `image`, `file_name` or `image_id`, the text under `caption`."""
    captions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{location}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise InputError(f"{location}:{number}: expected a JSON object, got {line[:60]!r}")
        name = next((row[key] for key in NAME_FIELDS if key in row), None)
        # Numbers are COCO's way to write an image_id.
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str):
            raise InputError(
                f"{location}:{number}: no image name; expected a string under one of {', '.join(NAME_FIELDS)}"
            )
        if not isinstance(row.get("caption"), str):
            raise InputError(f"{location}:{number}: expected a string under caption")
        captions.append((name, row["caption"]))
    return captions


def parse_parquet(data: bytes, location: str) -> list[tuple[str, str]]:
    """Columns `file_name` or `image_id`, and `caption`, as jobs/caption.py writes them."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except pa.ArrowInvalid:
        raise InputError(f"{location}: not a Parquet file, or cut off") from None
    there = file.schema_arrow.names
    name_column = next((name for name in ("file_name", "image_id") if name in there), None)
    if name_column is None or "caption" not in there:
        raise InputError(
            f"{location}: expected the columns file_name or image_id, and caption; columns there: {', '.join(there)}"
        )
    table = file.read(columns=[name_column, "caption"])
    captions = list(zip(table[name_column].to_pylist(), table["caption"].to_pylist(), strict=True))
    for row, (name, caption) in enumerate(captions, start=1):
        if not isinstance(name, str) or not isinstance(caption, str):
            raise InputError(
                f"{location}: row {row}: expected strings in {name_column} and caption, got {name!r} and {caption!r}"
            )
    return captions


def match_predictions(
    predictions: Predictions, references: References, expected: Collection[str] | None = None
) -> dict[str, str]:
    """image_id to predicted caption, in the order of the predictions.

    Args:
        predictions: what is to be scored.
        references: the known images.
        expected: the image_ids that must be there, all of them and no others; None asks for no set.

    Raises:
        InputError: a prediction for an unknown image, two for one image, or a set that differs from
            `expected`; the first five are listed.
    """
    unknown = [name for name, _ in predictions.captions if name not in references.image_ids]
    if unknown:
        raise InputError(
            f"{predictions.location}: {len(unknown)} predictions are for images that are not in "
            f"{references.location}: {listed(unknown)}"
        )
    captions: dict[str, str] = {}
    twice: dict[str, None] = {}
    for name, caption in predictions.captions:
        image_id = references.image_ids[name]
        if image_id in captions:
            twice[name] = None
        captions[image_id] = caption
    if twice:
        raise InputError(f"{predictions.location}: {len(twice)} images have more than one prediction: {listed(twice)}")
    if expected is not None:
        missing = [image_id for image_id in expected if image_id not in captions]
        if missing:
            raise InputError(
                f"{predictions.location}: {len(missing)} of the split's {len(expected)} images have no "
                f"prediction: {listed(missing)}"
            )
        wanted = set(expected)
        outside = [image_id for image_id in captions if image_id not in wanted]
        if outside:
            raise InputError(
                f"{predictions.location}: {len(outside)} predictions are for images outside the split: "
                f"{listed(outside)}"
            )
    return captions
