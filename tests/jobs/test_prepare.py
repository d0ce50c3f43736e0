"""jobs/prepare.py on a local Ray, with kills, and on S3."""

import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from jobs import prepare as prepare_module
from jobs.prepare import PrepareSettings, main, prepare
from jobs.runtime.job import parse_job
from jobs.runtime.next_command import after_preparing
from mmcore.captioners.cross_attention import VARIANTS
from mmcore.data.caption_folder import SPLIT_FILES
from mmcore.data.prepared import read_captions
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_rows
from mmcore.errors import InputError
from mmcore.storage import Storage
from mmcore.training_plan import num_steps

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k"
NUM_IMAGES = 25
SHAPES = ShapesSettings(num_train=9, num_validation=3, num_test=6, image_size=32)


def jpeg(shade: int, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).point(lambda value: (value + shade) % 256).save(buffer, "JPEG")
    return buffer.getvalue()


def make_source(folder: Path, num_images: int = NUM_IMAGES) -> Path:
    """Images in another order in captions.txt than by name, with two captions each, one with a comma."""
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    names = [f"{(7 * index) % num_images:04d}_{index}.jpg" for index in range(num_images)]
    for index, name in enumerate(names):
        (folder / "Images" / name).write_bytes(jpeg(index))
        lines += [f"{name},photo number {index} .", f'{name},"photo {index} , again"']
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    (folder / "splits").mkdir()
    for file, part in zip(SPLIT_FILES.values(), (names[:15], names[15:20], names[20:24]), strict=True):
        (folder / "splits" / file).write_text("\n".join(part) + "\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "flickr")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows per file, so that a tiny dataset has several files."""
    monkeypatch.setattr(prepare_module, "ROWS_PER_FILE", 10)


def settings(source: Path | str, storage: Path | str, **more: Any) -> PrepareSettings:
    return PrepareSettings(dataset="flickr8k", source=str(source), storage=str(storage), **more)


def read(storage: Path, dataset: str = "flickr8k") -> list[dict[str, Any]]:
    rows = []
    for path in sorted((storage / "data" / dataset).glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def visible(storage: Path) -> list[str]:
    """Files under `storage`, including temporary and hidden ones."""
    return sorted(path.relative_to(storage).as_posix() for path in storage.rglob("*") if path.is_file())


# --- what is written ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_local", "small_files")
def test_every_image_once_in_order_with_its_bytes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary = prepare(settings(source, out))
    rows = read(out)
    lines = (source / "captions.txt").read_text().splitlines()[1:]
    names = [line.split(",")[0] for line in lines[::2]]
    assert [row["file_name"] for row in rows] == names
    assert names != sorted(names)
    assert [row["image_id"] for row in rows] == [Path(name).stem for name in names]
    assert [row["image"] for row in rows] == [(source / "Images" / name).read_bytes() for name in names]
    expected = [[f"photo number {index} .", f"photo {index} , again"] for index in range(NUM_IMAGES)]
    assert [row["captions"] for row in rows] == expected
    assert [row["split_report"] for row in rows] == ["train"] * 20 + ["validation"] * 5
    assert [row["split_report_generation"] for row in rows] == ["train"] * 22 + ["test"] * 3
    karpathy = ["train"] * 15 + ["validation"] * 5 + ["test"] * 4 + ["unused"]
    assert [row["split_karpathy"] for row in rows] == karpathy

    folder = out / "data" / "flickr8k"
    files = ["part-00000.parquet", "part-00001.parquet"]
    assert sorted(path.name for path in folder.glob("*.parquet")) == summary["files"] == files
    assert json.loads((folder / "_SUCCESS").read_text()) == summary
    assert (summary["num_images"], summary["num_captions"]) == (NUM_IMAGES, 2 * NUM_IMAGES)
    assert summary["splits"]["split_karpathy"] == {"train": 15, "validation": 5, "test": 4, "unused": 1}
    schema = pq.read_schema(folder / files[0])
    assert schema.field("image").type == pa.binary()
    assert schema.field("captions").type == pa.list_(pa.string())
    assert visible(out) == [f"data/flickr8k/{name}" for name in ["_SUCCESS", *files]]

    printed = capsys.readouterr().out
    assert "found: a file of captions, 25 images, 50 captions, every image decodes" in printed
    assert "flickr8k: 25 images, 50 captions in 2 files" in printed
    assert "train 15, validation 5, test 4, unused 1" in printed
    by = "captioners use split_report: 20 train, 5 validation\ngenerators use split_report_generation: 22 train"
    assert by in printed
    assert f"read: {source}/captions.txt (columns image and caption, comma between columns), images in" in printed


@pytest.mark.usefixtures("ray_local")
def test_fingerprint_is_of_ids_captions_and_bytes_alone(source: Path, tmp_path: Path) -> None:
    first = prepare(settings(source, tmp_path / "one"))
    again = make_source(tmp_path / "moved" / "elsewhere")
    assert prepare(settings(again, tmp_path / "two"))["fingerprint"] == first["fingerprint"]
    digest = hashlib.sha256()
    for row in read(tmp_path / "one"):
        text = json.dumps([row["image_id"], row["captions"]], ensure_ascii=False).encode()
        for data in (text, row["image"]):
            digest.update(len(data).to_bytes(8, "little") + data)
    assert first["fingerprint"] == digest.hexdigest()
    some_image = next((again / "Images").iterdir())
    some_image.write_bytes(jpeg(200))
    assert prepare(settings(again, tmp_path / "three"))["fingerprint"] != first["fingerprint"]


@pytest.mark.usefixtures("ray_local")
def test_large_images_are_spread_over_more_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 5000
    monkeypatch.setattr(prepare_module, "MAX_BYTES_PER_FILE", limit)
    prepare(settings(source, tmp_path / "out"))
    files = sorted((tmp_path / "out/data/flickr8k").glob("*.parquet"))
    assert len(files) > 2
    assert all(sum(map(len, pq.read_table(path)["image"].to_pylist())) <= limit for path in files)
    assert len(read(tmp_path / "out")) == NUM_IMAGES


@pytest.mark.usefixtures("ray_local")
def test_zip_gives_what_the_folder_gives(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "flickr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(source.rglob("*")):
            archive.write(file, Path("Flickr8k") / file.relative_to(source))
    from_folder = prepare(settings(source, tmp_path / "one"))
    from_zip = prepare(settings(path, tmp_path / "two"))
    assert from_zip["fingerprint"] == from_folder["fingerprint"]
    assert from_zip["splits"] == from_folder["splits"]


@pytest.mark.usefixtures("ray_local", "small_files")
def test_shapes_are_those_of_the_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = prepare(PrepareSettings(storage=str(tmp_path), shapes=SHAPES))
    assert read(tmp_path, "shapes") == list(shapes_rows(SHAPES))
    assert summary["splits"] == {"split": {"train": 9, "validation": 3, "test": 6}}
    assert summary["num_captions"] == 5 * summary["num_images"] == 5 * 18
    assert "next: " not in capsys.readouterr().out, "a training prepares too, and goes on by itself"


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("dataset", ["shapes", "mine"])
def test_the_next_command_can_be_pasted_and_finds_the_data(
    source: Path, tmp_path: Path, dataset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "my data; $HOME"
    fields = dataclasses.asdict(SHAPES) if dataset == "shapes" else {"source": source}
    flags = [str(word) for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--dataset", dataset, "--storage", str(storage), *flags])
    main()
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("next: "))
    # Split as in a shell, and parsed by the job.
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line.removeprefix('next: ')}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert words[1] == "jobs/train_resnet_captioner.py"
    if dataset == "mine":
        assert "trainings use the data's own split by --split split_karpathy: 15 train, 5 validation" in printed
    job = parse_job(words[1], VARIANTS, "", words[2:])
    table = read_captions(job.storage, job.recipe.dataset, job.recipe.split)
    assert job.variant == ("shapes" if dataset == "shapes" else "best")
    assert job.options.name == ("default" if dataset == "shapes" else "mine")
    assert job.recipe.split == ("split" if dataset == "shapes" else "split_karpathy"), "the source's own"
    assert job.recipe.encoder == ("scratch" if dataset == "shapes" else "google/mobilenet_v2_1.0_224")
    assert num_steps(job.recipe.train, len(table.rows("train")))[0] == 1, "a batch is no larger than the data"
    assert table.validation_rows()
    assert len(table.image_ids) == (18 if dataset == "shapes" else NUM_IMAGES)


@pytest.mark.parametrize(
    ("dataset", "own", "flags"),
    [
        ("mine", ["unused"], ""),
        ("mine", ["train", "test"], "--split split_karpathy "),
        ("mine", ["train", "unused"], ""),
        ("flickr8k", ["train", "validation"], ""),
    ],
)
def test_the_next_command_names_a_split_only_where_the_variant_takes_another(
    dataset: str, own: list[str], flags: str
) -> None:
    splits = {"split_report": {"train": 400, "validation": 100}, "split_karpathy": dict.fromkeys(own, 200)}
    command = f"python jobs/{shlex.join(after_preparing(dataset, 'out', splits))}"
    assert command.endswith(f" --dataset {dataset} {flags}--storage out --name {dataset}")
    if dataset == "mine" and not flags:
        assert command in re.sub(r" \\\n +", " ", (ROOT / "README.md").read_text()), "what the README shows"


def test_no_training_is_named_where_no_image_trains_or_none_validates() -> None:
    for counts in ({"validation": 1}, {"train": 5}):
        assert after_preparing("mine", "out", {"split_report": counts, "split_karpathy": {"unused": 9}}) == []


# --- a second run ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_local")
def test_finished_is_kept_refused_or_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(PrepareSettings(storage=str(tmp_path), shapes=SHAPES))
    part = tmp_path / "data/shapes/part-00000.parquet"
    written = part.stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(PrepareSettings(storage=str(tmp_path), shapes=SHAPES)) == first
    assert part.stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    assert "kept" in printed
    assert "18 images" in printed

    other = ShapesSettings(num_train=4, num_validation=2, num_test=3, image_size=32)
    with pytest.raises(InputError, match=r"num_train 9, .* not with num_train 4, .*--fresh"):
        prepare(PrepareSettings(storage=str(tmp_path), shapes=other))
    assert read(tmp_path, "shapes") == list(shapes_rows(SHAPES))

    monkeypatch.setattr(prepare_module, "ROWS_PER_FILE", 5)
    prepare(PrepareSettings(storage=str(tmp_path), shapes=SHAPES, fresh=True))
    assert len(list(part.parent.glob("*.parquet"))) == 4
    # Fewer files than before, and no old file is left.
    prepare(PrepareSettings(storage=str(tmp_path), shapes=other, fresh=True))
    assert read(tmp_path, "shapes") == list(shapes_rows(other))


def test_a_setting_that_older_data_does_not_know_is_told_where_it_is_not_what_that_has() -> None:
    assert "max_objects" not in PrepareSettings().identity()
    assert PrepareSettings(shapes=ShapesSettings(max_objects=2)).identity()["max_objects"] == 2


@pytest.mark.usefixtures("ray_local")
def test_without_success_it_is_no_dataset_and_is_redone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = prepare(settings(source, out))
    folder = out / "data" / "flickr8k"
    (folder / "_SUCCESS").unlink()
    (folder / "part-00000.parquet").write_bytes(b"half a file")
    (folder / "part-00007.parquet").write_bytes(b"a file of another attempt")
    # As a killed one leaves it.
    killed = out / "data" / ".flickr8k.unfinished" / "0123abcd"
    killed.mkdir(parents=True)
    (killed / "part-00000.parquet").write_bytes(b"half a file")
    assert prepare(settings(source, out)) == good
    assert not killed.exists()
    assert len(read(out)) == NUM_IMAGES


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dataset": "flickr8k"}, "--dataset flickr8k needs --source"),
        ({"dataset": "jxie/flickr8k", "source": "x"}, "goes into --source"),
        ({"dataset": "../out", "source": "x"}, "use lower-case letters"),
        ({"source": "x"}, "--source x: give the data a name too, such as --dataset mine"),
        ({"skip_bad": True}, "--skip-bad: give the data a name too, such as --dataset mine"),
        ({"dataset": "flickr8k", "source": "x", "shapes": SHAPES}, "--num-train and --num-validation and .*only"),
        ({"dataset": "flickr8k", "source": "no-such.zip"}, "--source no-such.zip: no such folder, file or zip"),
        ({"shapes": ShapesSettings(0, 0, 0)}, "are all 0"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prepare(PrepareSettings(storage=str(tmp_path), **fields))
    assert visible(tmp_path) == []


def damage(source: Path) -> None:
    """A truncated image (first caption on line 4), a row without a comma, an unknown id in a split."""
    name = (source / "captions.txt").read_text().splitlines()[3].split(",")[0]
    path = source / "Images" / name
    path.write_bytes(path.read_bytes()[:-30])
    with open(source / "captions.txt", "a") as file:
        file.write("a row without its comma\n")
    with open(source / "splits" / SPLIT_FILES["test"], "a") as file:
        file.write("zebra.jpg\n")


def test_bad_source_stops_with_one_line_before_anything_is_written(
    source: Path, tmp_path: Path, run_job: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    damage(source)
    out = tmp_path / "out"
    arguments = ("--dataset", "flickr8k", "--source", source, "--storage", out)
    result = run_job("jobs/prepare.py", *arguments, check=False)
    assert result.returncode == 1
    # Line 1 is the header, then two captions per image.
    place = f"{source}/captions.txt:{2 + 2 * NUM_IMAGES}"
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {place}: expected `image,caption`, got")
    assert "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.usefixtures("ray_local")
def test_skip_bad_lists_what_it_left_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(source)
    summary = prepare(settings(source, tmp_path / "out", skip_bad=True))
    assert summary["num_images"] == len(read(tmp_path / "out")) == NUM_IMAGES - 1
    assert summary["num_captions"] == 2 * (NUM_IMAGES - 1)
    printed = capsys.readouterr().out.splitlines()
    skipped = [line for line in printed if line.startswith("skipped: ")]
    assert skipped == [f"skipped: {line}" for line in summary["skipped"]]
    file = tmp_path / "out" / "data" / "flickr8k" / "skipped.txt"
    assert file.read_text().splitlines() == summary["skipped"]
    assert any(f"skipped 3 in all, listed in {file};" in line for line in printed)
    assert [line.split(": ")[1].rsplit("/", 1)[1] for line in skipped] == [
        f"captions.txt:{2 + 2 * NUM_IMAGES}",
        f"{SPLIT_FILES['test']}:5",
        "captions.txt:4",
    ]


def test_evil_zip_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "flickr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("captions.txt", "a.jpg,x\n")
        archive.writestr("../evil.txt", "evil")
    with pytest.raises(InputError, match=r"flickr\.zip: member '\.\./evil\.txt' leads outside the folder"):
        prepare(settings(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.usefixtures("ray_local")
def test_failure_while_writing_leaves_the_old_dataset_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    good = prepare(settings(source, out))
    before = visible(out)
    checked = prepare_module.read_source

    def check_then_lose_an_image(*args: Any, **kwargs: Any) -> Any:
        result = checked(*args, **kwargs)
        Path(result.photos[-1].path).write_bytes(jpeg(3, (40, 40)))
        return result

    monkeypatch.setattr(prepare_module, "read_source", check_then_lose_an_image)
    with pytest.raises(Exception, match="bytes when checked"):
        prepare(settings(source, out, fresh=True))
    assert visible(out) == before
    assert json.loads((out / "data/flickr8k/_SUCCESS").read_text()) == good


# --- killed ------------------------------------------------------------------------------------------------


@pytest.mark.soak  # test_without_success_it_is_no_dataset_and_is_redone covers what a killed job leaves
def test_killed_in_the_middle_it_leaves_no_dataset_and_runs_again(
    tmp_path: Path,
    start_job: Callable[..., "subprocess.Popen[bytes]"],
    run_job: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    few = ("--storage", tmp_path / "out", "--num-validation", 3, "--num-test", 6, "--image-size", 32)
    log = tmp_path / "log"
    process = start_job("jobs/prepare.py", *few, "--num-train", 5000, log=log)
    unfinished = tmp_path / "out" / "data" / ".shapes.unfinished"
    deadline = time.monotonic() + 120
    while not list(unfinished.rglob("*.parquet")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/data/shapes").exists()
    assert Storage(str(tmp_path / "out/data/shapes")).list(".parquet") == []

    # Smaller, to be quick. Files of the larger dataset must not be mixed in.
    run_job("jobs/prepare.py", *few, "--num-train", 40)
    expected = ShapesSettings(num_train=40, num_validation=3, num_test=6, image_size=32)
    assert read(tmp_path / "out", "shapes") == list(shapes_rows(expected))
    assert not unfinished.exists()


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("num_moved", [0, 1])
def test_killed_while_moving_it_leaves_no_dataset_and_runs_again(
    source: Path, tmp_path: Path, num_moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the old dataset and the new one there is never a _SUCCESS."""
    monkeypatch.setattr(prepare_module, "ROWS_PER_FILE", 10)
    out = tmp_path / "out"
    good = prepare(settings(source, out))
    folder = out / "data" / "flickr8k"
    write = Storage.write

    def die(self: Storage, name: str, data: bytes) -> None:
        if name == "_SUCCESS":
            for path in sorted(folder.glob("*.parquet"))[num_moved:]:
                path.unlink()
            raise KeyboardInterrupt
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(source, out, fresh=True))
    assert not (folder / "_SUCCESS").exists()
    assert prepare(settings(source, out)) == good


# --- elsewhere ---------------------------------------------------------------------------------------------


def test_s3(
    s3_server: str,
    source: Path,
    call_job: Callable[..., "subprocess.CompletedProcess[str]"],
    run_job: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    arguments = ("--dataset", "flickr8k", "--source", source, "--storage", s3_server)
    result = call_job(prepare_module.main, *arguments)
    assert "25 images, 50 captions" in result.stdout
    folder = Storage(s3_server) / "data" / "flickr8k"
    assert folder.list() == ["_SUCCESS", "part-00000.parquet"]
    assert not (Storage(s3_server) / "data" / ".flickr8k.unfinished").exists()
    filesystem, path = folder.arrow()
    table = pq.read_table(f"{path}/part-00000.parquet", filesystem=filesystem)
    assert table.num_rows == NUM_IMAGES
    # A second run finds it and needs neither Ray nor the source.
    again = run_job("jobs/prepare.py", *arguments)
    assert "kept" in again.stdout
    assert "Ray:" not in again.stderr


def test_help_names_every_flag(run_job: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    shown = run_job("jobs/prepare.py", "--help").stdout
    flags = "dataset source storage skip-bad fresh stall-timeout num-train num-validation num-test image-size seed"
    for flag in flags.split():
        assert f"--{flag}" in shown
    assert "--shapes" not in shown
    assert "_SUCCESS" in shown


# --- the real thing ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_local")
@pytest.mark.skipif(not REAL.is_dir(), reason="the real Flickr8k is not on this machine")
def test_real_flickr8k(tmp_path: Path) -> None:
    summary = prepare(settings(REAL, tmp_path))
    assert (summary["num_images"], summary["num_captions"]) == (8091, 40455)
    assert len(summary["files"]) == 8
    assert summary["splits"] == {
        "split_report": {"train": 6472, "validation": 1619},
        "split_report_generation": {"train": 7000, "test": 1091},
        "split_karpathy": {"train": 6000, "validation": 1000, "test": 1000, "unused": 91},
    }
    columns = ["file_name", "captions"]
    rows = [
        row
        for name in summary["files"]
        for row in pq.read_table(tmp_path / "data/flickr8k" / name, columns=columns).to_pylist()
    ]
    lines = (REAL / "captions.txt").read_text().splitlines()[1:]
    assert [row["file_name"] for row in rows] == list(dict.fromkeys(line.split(",")[0] for line in lines))
    assert sum(len(row["captions"]) for row in rows) == len(lines)
