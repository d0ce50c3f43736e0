"""Webdataset: tar shards in which the members of one base name are a sample, ``000000.jpg`` and its ``000000.txt``.

The captions are the lines of ``txt``, or the caption columns of ``json`` (img2dataset writes both). A shard is read
once, from its beginning to its end, with one member in memory at a time. Its name or folder says the split.
Source: https://github.com/webdataset/webdataset (the format; the package is not needed).
"""

import itertools
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mmcore.data.archive import MAX_UNPACKED_BYTES, unsafe_name
from mmcore.data.caption_columns import find_columns
from mmcore.data.caption_row import NUL, as_captions, one_line
from mmcore.data.photos import Entry, Found, Problems, Progress, name_to_id
from mmcore.data.splits import are_several, split_in
from mmcore.data.tables import open_bytes
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES

FORM = "webdataset"
ENDINGS = (".tar", ".tar.gz", ".tgz")
_TEXT_KINDS = ("txt", "text", "caption", "captions")
_JSON = "json"
# Far beyond an image or a text; one member is in memory at a time.
_MAX_MEMBER_BYTES = 256 * 2**20
_MAX_NAME_BYTES = 200
_MAX_SHARDS = 100_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_UNREADABLE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


def is_shards(source: str) -> bool:
    """Whether `source` names tar files, one of them or a pattern with braces."""
    return source.lower().endswith(ENDINGS)


def shard_files(folder: Path) -> list[Path]:
    """The tar files of `folder`."""
    return sorted(path for path in folder.iterdir() if is_shards(path.name) and path.name[0] != "." and path.is_file())


def expand_braces(pattern: str) -> list[str]:
    """``train-{000..002}.tar`` -> its three names, ``{train,val}.tar`` -> its two; a name without braces is itself.

    Raises InputError for braces that hold neither a range nor a list.
    """
    parts: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        parts += [[pattern[end : match.start()]], _alternatives(match[1], pattern)]
        end = match.end()
    rest = pattern[end:]
    if "{" in rest or "}" in rest or any("}" in part[0] for part in parts[::2]):
        raise InputError(f"--source {pattern}: a brace without its other half; write {{000000..000009}}")
    names = ["".join(each) for each in itertools.islice(itertools.product(*parts, [rest]), _MAX_SHARDS + 1)]
    if len(names) > _MAX_SHARDS:
        raise InputError(f"--source {pattern}: more than {_MAX_SHARDS:,} shards; give fewer at a time")
    return list(dict.fromkeys(names))


def _alternatives(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers:
        first, last = numbers[1], numbers[2]
        if int(first) > int(last) or int(last) - int(first) >= _MAX_SHARDS:
            raise InputError(f"--source {pattern}: {{{inside}}} is no range of up to {_MAX_SHARDS:,} from low to high")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if "," not in inside:
        raise InputError(
            f"--source {pattern}: {{{inside}}} is no range and no list; write {{000000..000009}} or {{a,b}}"
        )
    return inside.split(",")


@dataclass
class _Sample:
    """What a shard holds under one name."""

    image: Path | None = None
    image_name: str = ""
    texts: dict[str, bytes] = field(default_factory=dict)


def read_shards(shards: list[str], folder: Path, problems: Problems, progress: Progress | None = None) -> Found:
    """Write the images of local or s3:// shards to `folder`; what was read, and an entry an image in their order.

    An image is called by its name in the shard, and by the shard's too where two shards have one name in common. No
    member leaves `folder`, whatever it is called. Raises InputError.
    """
    entries: list[tuple[str, Entry]] = []
    for number, shard in enumerate(shards):
        below = folder / f"{number:05d}"
        below.mkdir(parents=True)
        for key, sample in _read_shard(shard, below, problems, len(entries), progress).items():
            place = f"{shard}: {key}"
            if sample.image is None:
                problems.add(place, f"no image ({', '.join(IMAGE_SUFFIXES)}) beside {', '.join(sample.texts)}")
            elif (captions := _captions(place, sample, problems)) is not None:
                entries.append((shard, Entry(sample.image_name, place, sample.image, captions, split_in(shard))))
    if not entries:
        raise InputError(
            f"{' '.join(shards[:1])}: no sample of an image and a .txt or .json of one name in it; unpack another kind "
            "of tar, and give its folder"
        )
    _name_apart(entries)
    if not are_several(entry.split for _, entry in entries):
        for _, entry in entries:
            entry.split = None
    where = shards[0] if len(shards) == 1 else f"{shards[0]} ... {PurePosixPath(shards[-1]).name}"
    form = f"{FORM} of {len(shards):,} shard{'s' * (len(shards) > 1)}"
    return Found(form, where, [entry for _, entry in entries])


def _read_shard(
    shard: str, folder: Path, problems: Problems, num_before: int, progress: Progress | None
) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    image_ids: dict[str, str] = {}
    for name, data in _members(shard, problems):
        pure = PurePosixPath(name)
        stem, _, kind = pure.name.partition(".")
        key, kind = (pure.parent / stem).as_posix(), kind.lower()
        is_image = f".{kind}" in IMAGE_SUFFIXES
        if not is_image and kind not in (*_TEXT_KINDS, _JSON):
            continue
        sample = samples.setdefault(key, _Sample())
        image_id = name_to_id(f"{key}.{kind}") if is_image else ""
        if not is_image:
            if kind in sample.texts:
                problems.add(shard, f"member {name!r} occurs twice")
            else:
                sample.texts[kind] = data
        elif sample.image is not None:
            problems.add(shard, f"member {name!r} is a second image of {key!r}, beside {sample.image_name!r}")
        elif image_id in image_ids:
            problems.add(shard, f"duplicate id: members {name!r} and {image_ids[image_id]!r}")
        elif len(image_id.encode()) > _MAX_NAME_BYTES:
            problems.add(shard, f"member {name[:40] + '...'!r} has a name of more than {_MAX_NAME_BYTES} bytes")
        else:
            image_ids[image_id] = name
            sample.image, sample.image_name = folder / f"{image_id}.{kind}", f"{key}.{kind}"
            sample.image.write_bytes(data)
            if progress is not None:
                progress(num_before + len(image_ids), 0)
    # What was left out leaves nothing of its sample.
    return {key: sample for key, sample in samples.items() if sample.image is not None or sample.texts}


def _members(shard: str, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Name and content of each plain file, in order; what is unsafe or too large goes to `problems`."""
    total = 0
    try:
        opened_shard = open_bytes(shard)
    except InputError as error:
        problems.add(shard, str(error).removeprefix(f"{shard}: "))
        return
    with opened_shard as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for info in archive:
                    reason = unsafe_name(info.name)
                    # A hidden file, such as macOS puts beside each, is no member of a sample.
                    if reason is None and (info.isdir() or PurePosixPath(info.name).name.startswith(".")):
                        continue
                    if reason is None and not info.isreg():
                        reason = "is a link" if info.issym() or info.islnk() else "is no plain file"
                    if reason is None and info.size > _MAX_MEMBER_BYTES:
                        reason = f"has {info.size:,} bytes, more than the {_MAX_MEMBER_BYTES:,} allowed"
                    if reason is not None:
                        problems.add(shard, f"member {info.name!r} {reason}")
                        continue
                    total += info.size
                    if total > MAX_UNPACKED_BYTES:
                        raise InputError(f"{shard}: unpacks to more than the {MAX_UNPACKED_BYTES:,} bytes allowed")
                    opened = archive.extractfile(info)
                    assert opened is not None, "a plain file"
                    yield PurePosixPath(info.name).as_posix(), opened.read()
        except _UNREADABLE as error:
            problems.add(shard, f"not a whole tar ({error}); download it again")


def _captions(place: str, sample: _Sample, problems: Problems) -> list[str] | None:
    """The captions of a sample; None where `problems` was told why there are none."""
    kind = next((each for each in (*_TEXT_KINDS, _JSON) if each in sample.texts), None)
    if kind is None:
        problems.add(place, f"no caption beside {sample.image_name!r}: a .txt or .json of its name")
        return None
    try:
        text = sample.texts[kind].decode("utf-8-sig")
        captions = _of_json(json.loads(text), place) if kind == _JSON else tuple(text.split("\n"))
    except UnicodeDecodeError as error:
        problems.add(place, f".{kind}: byte {error.start} is not UTF-8")
        return None
    except json.JSONDecodeError as error:
        problems.add(place, f".{kind}: broken JSON: {error.msg}")
        return None
    except RecursionError:
        problems.add(place, f".{kind}: broken JSON: nested too deeply")
        return None
    except InputError as error:
        problems.add(place, str(error).removeprefix(f"{place}: "))
        return None
    filled = [one_line(caption) for caption in captions or () if caption.strip()]
    if not filled:
        problems.add(place, f".{kind} holds no text")
    elif any("\0" in caption for caption in filled):
        problems.add(place, NUL)
    else:
        return filled
    return None


def _of_json(value: object, place: str) -> tuple[str, ...] | None:
    """The captions of an object with known columns, of a list of texts, or of one text; None where they are none."""
    if isinstance(value, dict):
        columns = find_columns(list(value), place, images_in_table=True)
        return as_captions([value[name] for name in columns.captions])
    return as_captions([value])


def _name_apart(entries: list[tuple[str, Entry]]) -> None:
    """Put the shard's name before those of images where two have one id."""
    ids = [entry.image_id for _, entry in entries]
    if len(set(ids)) == len(ids):
        return
    shards = [shard.rpartition("/") for shard, _ in entries]
    parents = [parent.split("/") for parent, _, _ in shards]
    common = next(
        (depth for depth, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1),
        min(map(len, parents)),
    )
    for (_, entry), parts, (_, _, name) in zip(entries, parents, shards, strict=True):
        stem = re.sub(r"\.(tar|tar\.gz|tgz)$", "", name, flags=re.IGNORECASE)
        entry.file_name = "/".join([*parts[common:], stem, entry.file_name])
    ids = [entry.image_id for _, entry in entries]
    if len(set(ids)) < len(ids):
        twice = next(image_id for image_id, count in Counter(ids).items() if count > 1)
        raise InputError(f"{shards[0][0] or '.'}: two shards have an image {twice!r}; give the shards other names")
