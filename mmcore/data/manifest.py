"""A sweep of generated images as it lies in the storage: the manifest that says which there are, and the images.

``manifest/*.parquet`` has one row an image: image_id, key (of the image, relative to the sweep), sha256 (of its bytes),
prompt, seed, steps, guidance, sampler, dtype, device, seconds. An image counts if and only if it stands there.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from mmcore.data.parquet import NUM_IO_THREADS, read_tables
from mmcore.errors import InputError
from mmcore.images import decode_image
from mmcore.storage import Storage

MANIFEST, IMAGES = "manifest", "images"
# Where the schema of a manifest's file keeps what is said of its whole block, as JSON.
BLOCK = "block"


def read_manifest(sweep: Storage) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows of all blocks in the order of the prompts, and what each block says of itself.

    Raises InputError where there is no manifest.
    """
    tables = read_tables(sweep / MANIFEST)
    if not tables:
        raise InputError(f"{sweep}: no sweep of images there (no {MANIFEST}/*.parquet)")
    return pa.concat_tables(tables), [json.loads(table.schema.metadata[BLOCK.encode()]) for table in tables]


def read_images(sweep: Storage, manifest: pa.Table) -> Iterator[np.ndarray]:
    """The image of each row: uint8 (H, W, 3). Raises InputError for one that is not the one that was committed."""

    def read(key: str, sha256: str) -> np.ndarray:
        place = f"{sweep}/{key}"
        try:
            data = sweep.read(key)
        except FileNotFoundError:
            raise InputError(f"{place}: is in the manifest and not there") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(f"{place}: is not the image that the manifest names (another SHA-256)")
        return np.asarray(decode_image(data, name=place))

    with ThreadPoolExecutor(NUM_IO_THREADS) as threads:
        yield from threads.map(read, manifest["key"].to_pylist(), manifest["sha256"].to_pylist())
