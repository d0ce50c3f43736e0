"""A sweep of generated images in the storage: the images, and the manifest that lists them.

``manifest/*.parquet`` has one row per image. An image counts if and only if it has a row. The columns are:

* image_id, key (path of the image in the sweep), sha256 (of its bytes), prompt, seed, height, width
* steps, guidance, sampler (null if the generator has no such option), options (all options of the generator, as JSON)
* dtype, device, seconds
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
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


def manifest_table(
    *,
    image_id: Sequence[str],
    key: Sequence[str],
    sha256: Sequence[str],
    prompt: Sequence[str],
    seed: Sequence[int],
    sizes: Sequence[tuple[int, ...]],
    options: Any,
    dtype: str,
    device: str,
    seconds: Sequence[float],
) -> pa.Table:
    """The rows of one block. `sizes`: height and width of each image; `options`: the generator's, of all of them."""
    number, said = len(image_id), dataclasses.asdict(options)
    columns = {
        "image_id": pa.array(image_id, pa.string()),
        "key": pa.array(key, pa.string()),
        "sha256": pa.array(sha256, pa.string()),
        "prompt": pa.array(prompt, pa.string()),
        "seed": pa.array(seed, pa.int64()),
        "height": pa.array([size[0] for size in sizes], pa.int64()),
        "width": pa.array([size[1] for size in sizes], pa.int64()),
        "steps": pa.array([said.get("steps")] * number, pa.int64()),
        "guidance": pa.array([said.get("guidance")] * number, pa.float64()),
        "sampler": pa.array([said.get("sampler")] * number, pa.string()),
        "options": pa.array([json.dumps(said)] * number, pa.string()),
        "dtype": pa.array([dtype] * number, pa.string()),
        "device": pa.array([device] * number, pa.string()),
        "seconds": pa.array(seconds, pa.float64()),
    }
    return pa.table(columns)


def read_manifest(sweep: Storage) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows of all blocks in the order of the prompts, and what each block says of itself.

    Blocks of earlier versions have neither height, width nor options: their values are null beside those of others.
    Raises InputError where there is no manifest.
    """
    tables = read_tables(sweep / MANIFEST)
    if not tables:
        raise InputError(f"{sweep}: no sweep of images there (no {MANIFEST}/*.parquet)")
    return pa.concat_tables(tables, promote_options="default"), [
        json.loads(table.schema.metadata[BLOCK.encode()]) for table in tables
    ]


def read_finished(sweep: Storage) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of a finished sweep, and what its sweep.json says. Raises InputError where images are missing."""
    manifest, _ = read_manifest(sweep)
    plan = json.loads(sweep.read("sweep.json"))
    if len(manifest) != plan["num_rows"]:
        raise InputError(
            f"--sweep {sweep}: {len(manifest)} of {plan['num_rows']} images are there; run jobs/generate.py to its end"
        )
    return manifest, plan


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
