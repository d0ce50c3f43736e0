"""Jobs on a full disk: they stop at once with one line, and the same command continues when there is room."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_sweep
from job_output import error_line
from small_disk import SmallDisk, small_disk

from jobs import prepare
from jobs.runtime.commandline import one_line
from jobs.train_pixel_diffusion import main
from mmcore.errors import InputError
from mmcore.storage import DiskError, Storage

pytest_plugins = ("sweep_fixtures",)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=64) as disk:
        yield disk


@pytest.mark.nightly  # test_train_resume.py fills the disk in the middle of a training
def test_a_training(call_job: Callable[..., Any], disk: SmallDisk, capfd: pytest.CaptureFixture[str]) -> None:
    storage = Storage(str(disk.path))
    tiny.write_dataset(storage)
    flags = ["--variant", "smoke", "--max-steps", "4", "--dataset", "tiny", "--split", "split", "--storage", storage]
    disk.fill(leave=300_000)
    full = call_job(main, *flags, check=False)
    assert full.returncode == 1
    assert error_line(full.stderr).startswith(f"error: {disk.path}/")
    assert "No space left on device; make room there and give the same command again" in error_line(full.stderr)
    assert "Traceback" not in full.stderr
    assert not (disk.path / "runs/pixel_diffusion/default/model").exists()
    disk.make_room()
    assert "going on with the unfinished run" in call_job(main, *flags).stdout
    assert json.loads(storage.read("runs/pixel_diffusion/default/_SUCCESS"))["steps"] == 4


def test_preparing(call_job: Callable[..., Any], disk: SmallDisk) -> None:
    flags = ["--storage", disk.path, "--num-train", "400", "--num-validation", "8", "--num-test", "8"]
    disk.fill(leave=100_000)
    full = call_job(prepare.main, *flags, check=False)
    assert full.returncode == 1
    assert error_line(full.stderr).startswith(f"error: {disk.path}/data/")
    assert "No space left on device; make room there" in error_line(full.stderr)
    assert "Traceback" not in full.stderr
    disk.make_room()
    call_job(prepare.main, *flags)
    assert Storage(str(disk.path / "data" / "shapes")).exists("_SUCCESS")


def test_a_sweep(sweep: Callable[..., Any], disk: SmallDisk) -> None:
    out = Storage(str(disk.path / "out"))
    disk.fill()
    with pytest.raises((InputError, OSError)) as full:
        sweep(out=out.uri)
    line = one_line(full.value)
    assert line is not None
    assert line.startswith(f"{out}/")
    assert "make room there" in line
    disk.make_room()
    sweep(out=out.uri)
    tiny_sweep.check_complete(out, tiny_sweep.NUM)


def test_who_names_no_file_is_no_fault_of_ours() -> None:
    assert (one_line(OSError(28, "No space left on device")) or "").startswith("a disk of this job or of Ray's: No spa")
    assert (one_line(OSError(28, "No space", "source", None, "target")) or "").startswith("target: ")
    assert one_line(OSError(5, "Input/output error")) is None
    told = DiskError(28, "/disk/file")
    told.args = (*told.args, "Failed to apply UDF transform")  # like Ray Data
    assert (one_line(pickle.loads(pickle.dumps(told))) or "").startswith("/disk/file: No space left on device; make")
