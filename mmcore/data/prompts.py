"""Prompts for a sweep of images: files of prompts, and the test prompts of the report's generators.

A ``.txt`` file holds one prompt per line. A ``.csv`` (with a header), ``.jsonl`` or ``.parquet`` file has a column
``prompt``, and optionally ``image_id`` and ``seed``. Two names stand for prepared data. ``flickr8k:report-test`` is the
first captions of the 1,091 images that the report's generators were not trained on. The other is ``shapes-test``.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from mmcore.data.prepared import read_prepared
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_row
from mmcore.data.tables import ENDINGS, Bad, read_rows, refuse
from mmcore.errors import InputError
from mmcore.seeding import MAX_IMAGE_SEED, derive_seed
from mmcore.storage import Storage

FLICKR8K_TEST, SHAPES_TEST = "flickr8k:report-test", "shapes-test"
COLUMNS = ("prompt", "image_id", "seed", "height", "width")
# Far beyond what any generator makes: a larger number is a slip of the hand.
_MAX_SIDE = 65_536
_SCHEMA = pa.schema(
    {"image_id": pa.string(), "prompt": pa.string(), "seed": pa.int64(), "height": pa.int64(), "width": pa.int64()}
)
# Prompts that are objects at once.
_BATCH_ROWS = 4096
# An image_id is the name of a file and of an object; with ".png" and a temporary ending it stays below 255 bytes.
IMAGE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,199}")


@dataclass(frozen=True)
class Prompt:
    """What decides one image, whatever else is made beside it."""

    image_id: str
    prompt: str
    seed: int
    height: int | None = None
    width: int | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; None where they are the sweep's."""
        return None if self.height is None or self.width is None else (self.height, self.width)


class Prompts(Sequence[Prompt]):
    """Any number of prompts, as columns of Arrow: about as many bytes as their text, and no object for each of them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> "Prompts":
        batches = []
        left = iter(prompts)
        while some := list(itertools.islice(left, _BATCH_ROWS)):
            columns = [[getattr(each, name) for each in some] for name in _SCHEMA.names]
            arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
            batches.append(pa.record_batch(arrays, schema=_SCHEMA))
        return cls(pa.Table.from_batches(batches, _SCHEMA))

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Prompts":
        if isinstance(index, int):
            index = range(len(self))[index]
            (row,) = self.table.slice(index, 1).to_pylist()
            return Prompt(**row)
        start, stop, step = index.indices(len(self))
        assert step == 1, "rows that follow each other"
        return Prompts(self.table.slice(start, max(0, stop - start)))

    def __iter__(self) -> Iterator[Prompt]:
        for batch in self.table.to_batches():
            yield from map(Prompt, *(batch[name].to_pylist() for name in _SCHEMA.names))

    def column(self, name: str) -> "PromptColumn":
        return PromptColumn(self.table[name])

    @cached_property
    def sizes(self) -> dict[tuple[int, int] | None, Prompt]:
        """The sizes that they ask for, each with the first prompt that does."""
        if self.table["height"].null_count == len(self):
            return {None: self[0]}
        found: dict[tuple[int, int] | None, Prompt] = {}
        for prompt in self:
            found.setdefault(prompt.size, prompt)
        return found


class PromptColumn(Sequence[Any]):
    """One value of each prompt; those of a slice are made when it is asked for."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, rows: int) -> Any: ...
    @overload
    def __getitem__(self, rows: slice) -> list[Any]: ...
    def __getitem__(self, rows: int | slice) -> Any:
        return self.values[rows].to_pylist() if isinstance(rows, slice) else self.values[rows].as_py()


@dataclass(frozen=True)
class _Row:
    """A prompt as it was found; `place` is its file and line."""

    place: str
    prompt: Any
    image_id: Any = None
    seed: Any = None
    height: Any = None
    width: Any = None


def read_prompts(
    source: str,
    *,
    storage: str | None = None,
    seed: int = 0,
    count: int | None = None,
    skipped: list[str] | None = None,
) -> Prompts:
    """The first `count` prompts of `source`, or all.

    Args:
        source: a local path or URI ending in .txt, .csv, .jsonl or .parquet, or one of the two names.
        storage: holds the prepared data of a name. Without it, ``shapes-test`` is any number of prompts of the test
            split of seed 0. Half of its scenes have a pair of colour and shape that no training image has.
        seed: an image without a seed of its own gets one derived from this number and its image_id.
        skipped: rows that are bad are left out and listed here, each with its place and the reason; without it the
            first one is an error. The rows that are left keep the numbers that they have among all.

    Raises InputError that names file and line.
    """
    if not 0 <= seed <= MAX_IMAGE_SEED:
        raise InputError(f"--seed {seed}: must lie between 0 and {MAX_IMAGE_SEED}")
    if count is not None and count < 1:
        raise InputError(f"--count {count}: must be at least 1")
    rows: Iterable[_Row] = _Rows(source, storage, count, refuse if skipped is None else _ignore)
    if source in (FLICKR8K_TEST, SHAPES_TEST):
        rows = list(rows)  # some thousands at most, which take longer to make than to hold
    # Read twice, as the width of an image's number is that of the last: many rows would fill the memory.
    num_rows = sum(1 for _ in rows)
    if not num_rows:
        raise InputError(f"{source}: holds no prompts")
    width = max(6, len(str(num_rows - 1)))
    if skipped is not None and isinstance(rows, _Rows):
        # The second reading tells of the lines that are no rows at all.
        rows = replace(rows, bad=partial(_tell, skipped))
    numbered = ((f"{index:0{width}d}", row) for index, row in enumerate(rows))
    if skipped is None:
        prompts = Prompts.of(_checked(row, default_id, seed) for default_id, row in numbered)
    else:
        prompts = Prompts.of(_good(numbered, seed, skipped))
    if not len(prompts):
        raise InputError(f"{source}: not one good prompt is left")
    if count is not None and count > len(prompts):
        raise InputError(
            f"--count {count}: {source} holds {len(prompts)} {'good ' if skipped else ''}prompts; ask for no more, or "
            "give more prompts"
        )
    ids = prompts.table["image_id"]
    if pc.count_distinct(ids).as_py() < len(ids):
        _refuse_twins(prompts, rows)
    return prompts[:count]


def _ignore(place: str, reason: str) -> None:
    """The `Bad` of a reading whose faults are told by another."""


def _tell(skipped: list[str], place: str, reason: str) -> None:
    skipped.append(f"{place}: {reason}")


def _good(numbered: Iterable[tuple[str, _Row]], seed: int, skipped: list[str]) -> Iterator[Prompt]:
    """The prompts that are right, of several with one image_id the first; the others go to `skipped`."""
    places: dict[str, str] = {}
    for default_id, row in numbered:
        try:
            prompt = _checked(row, default_id, seed)
        except InputError as error:
            skipped.append(str(error))
            continue
        if prompt.image_id in places:
            skipped.append(f"{row.place}: image_id {prompt.image_id!r} is that of {places[prompt.image_id]} too")
            continue
        places[prompt.image_id] = row.place
        yield prompt


def _refuse_twins(prompts: Prompts, rows: Iterable[_Row]) -> None:
    places: dict[str, str] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        if prompt.image_id in places:
            raise InputError(
                f"{row.place}: image_id {prompt.image_id!r} is that of {places[prompt.image_id]} too; give each image "
                "its own"
            )
        places[prompt.image_id] = row.place


def _checked(row: _Row, default_id: str, sweep_seed: int) -> Prompt:
    prompt, image_id, seed = row.prompt, row.image_id, row.seed
    # Half a surrogate pair, which JSON can spell, is no character and cannot be written down.
    if not isinstance(prompt, str) or not prompt.strip() or "\0" in prompt or not _is_encodable(prompt):
        raise InputError(f"{row.place}: prompt is {prompt!r}; give some text")
    image_id = default_id if _is_absent(image_id) else image_id
    # COCO's ids are whole numbers, of which pandas makes 139.0 beside missing ones; CSV has them as text.
    if not isinstance(image_id, str) or re.fullmatch(r"[0-9]+\.0", image_id):
        whole = _whole_number(image_id)
        image_id = str(whole) if isinstance(whole, int) and not isinstance(whole, bool) else image_id
    if not isinstance(image_id, str) or not IMAGE_ID.fullmatch(image_id):
        raise InputError(
            f"{row.place}: image_id is {image_id!r}, and it names the image's file: give a whole number, or up to 200 "
            "of the letters a-z A-Z 0-9 . _ - = + @ that begin with a letter, a digit or _"
        )
    seed = derive_seed(sweep_seed, image_id) & MAX_IMAGE_SEED if _is_absent(seed) else _whole_number(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_IMAGE_SEED:
        raise InputError(f"{row.place}: seed is {seed!r}; give a whole number from 0 to {MAX_IMAGE_SEED}")
    height, width = (None if _is_absent(side) else _whole_number(side) for side in (row.height, row.width))
    for name, side in (("height", height), ("width", width)):
        if height is width is None:
            break
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= _MAX_SIDE:
            raise InputError(f"{row.place}: {name} is {side!r}; give height and width as whole numbers, or neither")
    return Prompt(image_id, prompt, seed, height, width)


def _is_absent(value: Any) -> bool:
    """None, and NaN, by which pandas writes it."""
    return value is None or value != value


def _whole_number(value: Any) -> Any:
    """`value`, as a whole number where it is one: text of CSV, and 7.0, as pandas has it beside missing values."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}(\.0+)?", value):
        return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_encodable(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


@dataclass(frozen=True)
class _Rows:
    """The rows of `read_prompts`, read anew each time."""

    source: str
    storage: str | None
    count: int | None
    bad: Bad

    def __iter__(self) -> Iterator[_Row]:
        return _rows(self.source, self.storage, self.count, self.bad)


def _rows(source: str, storage: str | None, count: int | None, bad: Bad) -> Iterator[_Row]:
    if source == FLICKR8K_TEST:
        if storage is None:
            raise InputError(f"--prompts {source}: give --storage URI with the prepared flickr8k")
        yield from _prepared_rows(storage, "flickr8k", "split_report_generation")
        return
    if source == SHAPES_TEST:
        if storage is None:
            scenes = ShapesSettings(num_test=ShapesSettings().num_test if count is None else count)
            made = (shapes_row(scenes, "test", index) for index in range(scenes.num_test))
            yield from (_Row(source, row["captions"][0], row["image_id"]) for row in made)
        else:
            yield from _prepared_rows(storage, "shapes", "split")
        return
    if storage is not None:
        raise InputError(f"--storage {storage}: is read for --prompts {FLICKR8K_TEST} and {SHAPES_TEST} only")
    if not source.lower().endswith(tuple(ENDINGS)):
        raise InputError(
            f"--prompts {source}: expected a file ending in {', '.join(ENDINGS)}, or {FLICKR8K_TEST} or {SHAPES_TEST}"
        )
    for row in read_rows(source, known=COLUMNS, text="prompt", check_names=_check_names, bad=bad):
        yield _Row(row.place, **row.values)


def _prepared_rows(storage: str, dataset: str, split: str) -> Iterator[_Row]:
    """The first captions of a prepared dataset's test images, in its order."""
    table = read_prepared(storage, dataset, ["image_id", "captions", split])
    place = f"{Storage(storage)}/data/{dataset}"
    for row in table.to_pylist():
        if row[split] == "test":
            yield _Row(place, row["captions"][0], row["image_id"])


def _check_names(names: list[str], place: str) -> None:
    """InputError for a missing or unknown column: a mistyped `image_id` must not be passed over."""
    if "prompt" not in names or not set(names).issubset(COLUMNS):
        raise InputError(
            f"{place}: columns {', '.join(map(repr, names))}; expected prompt, and if wanted image_id, seed, height, "
            "width"
        )
