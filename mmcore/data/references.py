"""The captions that predictions are scored against: of a file of captions, or of a prepared dataset."""

from dataclasses import dataclass, field

from mmcore.data.caption_files import read_caption_file
from mmcore.data.caption_text import IMAGE_FILE
from mmcore.data.prepared import read_prepared
from mmcore.errors import InputError
from mmcore.storage import Storage


@dataclass(frozen=True)
class References:
    """All known images with their reference captions.

    Attributes:
        location: where they were read, for messages and for the protocol.
        captions: image_id to its captions, images and captions in the order of the file.
        image_ids: every name that an image goes by (file name and image_id) to its image_id.
        form: what the location was read as, in words.
    """

    location: str
    captions: dict[str, list[str]] = field(default_factory=dict)
    image_ids: dict[str, str] = field(default_factory=dict)
    form: str = ""

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


def read_references(location: str, *, keep_quotes: bool = False) -> References:
    """A file of captions in any form that jobs/prepare.py reads; both ways to references give the same words.

    `keep_quotes`: see `read_caption_file`. Raises InputError that names the file and the line.
    """
    file = read_caption_file(location, keep_quotes=keep_quotes)
    references = References(location, form=file.form)
    for row in file.rows:
        captions = [caption.strip() for caption in row.captions if caption.strip()]
        if not row.image or not captions:
            raise InputError(f"{row.place}: the row has no {'caption' if row.image else 'image name'}")
        image_id = image_stem(row.image)
        references.add_name(row.image, image_id)
        for alias in row.aliases:
            references.image_ids.setdefault(alias, image_id)
        references.captions.setdefault(image_id, []).extend(captions)
    if not references.captions:
        raise InputError(f"{location}: holds no captions; expected lines `image,caption`")
    return references


def prepared_references(storage_uri: str, dataset: str) -> References:
    """The references that a prepared dataset carries in its column `captions`."""
    table = read_prepared(storage_uri, dataset, ["image_id", "file_name", "captions"])
    references = References(f"{(Storage(storage_uri) / 'data' / dataset).uri}/*.parquet", form="prepared dataset")
    for row in table.to_pylist():
        references.add_name(row["file_name"], row["image_id"])
        references.captions[row["image_id"]] = row["captions"]
    return references
