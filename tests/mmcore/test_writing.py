"""A full disk: the error names the file that did not fit, no partial file is left, and later writes work."""

import errno
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from small_disk import SmallDisk, small_disk

from mmcore import checkpoint
from mmcore.data.columns import open_column
from mmcore.generators.facts import VQVAEFacts
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.run_files import RunFile, write_model
from mmcore.storage import Storage

DATA = bytes(1_000_000)
TENSORS = {"weight": torch.zeros(250_000)}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
        yield disk


def column(parent: Path) -> Storage:
    folder = Storage(str(parent / "column"))
    table = pa.table({"image_id": ["a"], "value": [DATA]})
    filesystem, path = (folder / "parts").arrow_whole_files()
    Path(path).mkdir(parents=True)
    pq.write_table(table, f"{path}/part.parquet", filesystem=filesystem)
    folder.write("_SUCCESS", b'{"dtype": "uint8", "shape": [1000000], "num_rows": 1, "fingerprint": "f"}')
    return folder


def write_parquet(storage: Storage) -> None:
    filesystem, path = storage.arrow_whole_files()
    table = pa.table({"x": np.random.default_rng(0).random(125_000)})
    pq.write_table(table, f"{path}/name", filesystem=filesystem)


def copy_by_arrow(storage: Storage, source: Path) -> None:
    filesystem, path = storage.arrow_whole_files()
    pyarrow.fs.copy_files(
        str(source), f"{path}/name", source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=filesystem
    )


Door = Callable[[Storage, Path], object]
DOORS: dict[str, Door] = {
    "write": lambda storage, source: storage.write("name", DATA),
    "create": lambda storage, source: storage.create("name", DATA),
    "upload": lambda storage, source: storage.upload(source, "name"),
    "download": lambda storage, source: Storage(str(source.parent)).download(source.name, storage.uri + "/name"),
    "write_table": lambda storage, source: write_parquet(storage),
    "copy_files": lambda storage, source: copy_by_arrow(storage, source),
    "save_tensors": lambda storage, source: checkpoint.save(Path(storage.uri), {"weights": TENSORS}, {}),
    "state.json": lambda storage, source: checkpoint.save(Path(storage.uri), {}, {"history": "x" * 1_000_000}),
    "write_model": lambda storage, source: write_model(
        storage, TENSORS, RunFile("tiny", "smoke", VQVAERecipe(), VQVAEFacts(), "")
    ),
    "open_column": lambda storage, source: open_column(Storage(str(source.parent / "column")), Path(storage.uri)),
}


@pytest.mark.parametrize("name", DOORS)
def test_what_does_not_fit_is_named_and_fits_when_there_is_room(name: str, disk: SmallDisk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    column(tmp_path)
    storage = Storage(str(disk.path / "out"))
    Path(storage.uri).mkdir()
    disk.fill(leave=500_000)
    with pytest.raises(OSError, match="No space left on device") as full:
        DOORS[name](storage, source)
    assert full.value.errno == errno.ENOSPC
    assert str(full.value.filename).startswith(str(disk.path))
    large = [file for file in disk.files() if (disk.path / file).stat().st_size > 100_000]
    assert name in ("download", "state.json") or large == ["filler"]
    disk.make_room()
    DOORS[name](storage, source)
