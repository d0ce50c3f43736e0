"""jobs/caption.py: every image is captioned exactly once in spite of kills, and a resumed job repeats no work."""

import csv
import dataclasses
import hashlib
import os
import shutil
import signal
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gate import Gate
from kills import MAP_WORKER, TIMEOUT_S, wait_for_blocks, wait_until_gone, workers
from tiny_runs import write_language_model, write_language_run

from jobs.caption import CaptionSettings, caption, main
from mmcore import checkpoint
from mmcore.captioners.cross_attention import VARIANTS
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.search_options import SearchOptions
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_rows
from mmcore.errors import InputError
from mmcore.frozen.vision import SCRATCH, pixels_from_bytes
from mmcore.run_files import TOKENIZER_ASSET, RunFile, write_model
from mmcore.storage import Storage
from mmcore.text import WordVocabulary
from mmcore.trained.captioner import open_captioner

NUM_IMAGES = 48
ROWS_PER_BLOCK = 4


def write_run(folder: Path, seed: int = 0, encoder: str = SCRATCH) -> Path:
    """A finished run of an untrained captioner of Shapes.

    `encoder`: the name of its frozen encoder, which is not loaded.
    """
    recipe = dataclasses.replace(VARIANTS["smoke"], image_size=32, encoder=encoder)
    words = [text for row in shapes_rows(ShapesSettings(20, 2, 3, 32)) for text in row["captions"]]
    vocabulary = WordVocabulary.build(words, min_count=1, lowercase=False)
    torch.manual_seed(seed)
    facts = CaptionerFacts(vocabulary.token_ids, 4, 8)
    model = recipe.build(facts)
    file = RunFile("resnet_captioner", "smoke", recipe, facts, "")
    run = Storage(str(folder))
    for name, data in vocabulary.files().items():
        (run / "model" / TOKENIZER_ASSET).write(name, data)
    write_model(run, checkpoint.trainable_state(model), file)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("captioner") / "runs" / "resnet_captioner" / "tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of image files."""
    folder = tmp_path_factory.mktemp("images")
    for row in shapes_rows(ShapesSettings(NUM_IMAGES, 1, 1, 32)):
        if row["split"] == "train":
            (folder / row["file_name"]).write_bytes(row["image"])
    return folder


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.glob("*.parquet"))
    }


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("num_kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_killed_each_image_is_captioned_once(num_kills, run_folder, images, tmp_path, start_job, call_job, shared_ray):
    out = tmp_path / "out"
    command = ["--run", run_folder, "--images", images, "--out", out]
    command += ["--rows-per-block", str(ROWS_PER_BLOCK), "--num-beams", "8"]
    committed: dict[str, tuple[str, int]] = {}
    gate, parts = Gate(tmp_path), Storage(str(out / "parts"))
    for _ in range(num_kills):
        wanted = len(parts.list(".parquet")) + 1
        # Some of the twelve blocks are left for the next run, even if the kill comes late.
        gate.allow_more(3)
        job = start_job("tests/gated_job.py", "caption", *command, env={**shared_ray, "GATE": str(tmp_path)})
        # One block more than before the start.
        wait_for_blocks(parts, wanted, job)
        actors = workers(job, MAP_WORKER)
        assert actors, "no worker was found"
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        wait_until_gone(actors)
        now = digests(out / "parts")
        assert {name: now[name] for name in committed} == committed, "a committed block was written again"
        assert len(now) < NUM_IMAGES // ROWS_PER_BLOCK
        assert not (out / "captions.csv").exists()
        committed = now
    call_job(main, *command)

    table = pa.concat_tables(pq.read_table(path) for path in sorted((out / "parts").glob("*.parquet")))
    expected = sorted(path.stem for path in images.iterdir())
    assert sorted(table["image_id"].to_pylist()) == expected, "lost or doubled images"
    assert {name: digests(out / "parts")[name] for name in committed} == committed
    rows = read_csv(out / "captions.csv")
    assert rows[0] == ["image", "caption"]
    assert sorted(name for name, _ in rows[1:]) == sorted(path.name for path in images.iterdir())
    # The bulk job gives the same caption as the captioner for a single image.
    captioner, options = open_captioner(str(run_folder)).load(), SearchOptions(num_beams=8)
    for name, text in rows[1:4]:
        pixels = pixels_from_bytes([(images / name).read_bytes()], captioner.image_size, [name])
        assert captioner.caption(pixels, options) == [text]

    before = digests(out / "parts")
    again = call_job(main, *command)
    assert f"all done already: {NUM_IMAGES} images" in again.stdout
    assert digests(out / "parts") == before


@pytest.mark.soak  # test_sweep_kills.py kills actors in the code that both sweeps share
def test_a_killed_actor_is_replaced(run_folder, images, tmp_path, start_job, shared_ray):
    out = tmp_path / "out"
    gate = Gate(tmp_path)
    gate.allow(2)
    command = ["tests/gated_job.py", "caption", "--run", run_folder, "--images", images, "--out", out]
    job = start_job(*command, "--rows-per-block", "2", "--num-beams", "8", env={**shared_ray, "GATE": str(tmp_path)})
    wait_for_blocks(Storage(str(out / "parts")), 1, job)
    (actor,) = workers(job, MAP_WORKER)
    actor.kill()
    wait_until_gone([actor])
    gate.open()
    assert job.wait(TIMEOUT_S) == 0, (tmp_path / "job-0.log").read_text()[-4000:]
    assert len(read_csv(out / "captions.csv")) == NUM_IMAGES + 1


def test_other_settings_for_the_same_place_are_refused(run_folder, images, tmp_path, call_job):
    out = tmp_path / "out"
    command = ["--run", run_folder, "--images", images, "--out", out]
    call_job(main, *command, "--num-beams", "1")
    refused = call_job(main, *command, "--num-beams", "2", check=False)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert "num_beams was 1 and is now 2" in line

    # The run at the same path was trained again. Captions of two models must not be mixed.
    write_run(run_folder, seed=1)
    try:
        with pytest.raises(InputError, match=r"weights_sha256 was '[0-9a-f]{64}' and is now"):
            caption(CaptionSettings(str(run_folder), str(images), str(out)), SearchOptions(num_beams=1))
    finally:
        write_run(run_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--run": "nowhere"}, "no such run"),
        ({"--images": "empty"}, "neither Parquet shards nor image files"),
        ({"--num-beams": "0"}, "--num-beams 0: must be at least 1"),
        ({"--num-beams": "1", "--length-penalty": "0.5"}, "--length-penalty 0.5: has no effect on greedy search"),
        ({"--length-penalty": "nan"}, "--length-penalty nan: must be a finite number"),
        ({"--split": "split_karpathy:test"}, "no Parquet shards with a split column"),
        ({"--language-model": "scratch"}, "has none; leave the flag out"),
        ({"--prompt": "What is it?"}, "reads images alone; leave it out, or name a run that takes one"),
        ({"--run": "generator"}, "recipe 'ldm' is not of kind captioner"),
    ],
)
def test_bad_input_is_one_line(change, message, run_folder, images, tmp_path, call_job):
    (tmp_path / "empty").mkdir()
    shutil.copytree(run_folder, tmp_path / "generator")
    recipe = tmp_path / "generator" / "model" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"resnet_captioner"', '"ldm"'))
    flags = {"--run": run_folder, "--images": images, "--out": tmp_path / "out"}
    flags |= {name: tmp_path / value if name in ("--run", "--images") else value for name, value in change.items()}
    result = call_job(main, *[part for pair in flags.items() for part in pair], check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists(), "something was written"


def test_a_prompt_is_read_and_is_of_the_sweep(images, tmp_path, call_job):
    run = write_language_run(tmp_path / "runs" / "qformer_llm" / "tiny")
    few = tmp_path / "images"
    few.mkdir()
    for path in sorted(images.iterdir())[:3]:
        shutil.copy(path, few)
    out = tmp_path / "out"
    command = ["--run", run, "--images", few, "--out", out, "--max-length", "6"]
    call_job(main, *command, "--prompt", "What is it?")
    captioner = open_captioner(str(run)).load()
    options = dataclasses.replace(captioner.options, max_length=6)
    names = sorted(path.name for path in few.iterdir())
    pixels = pixels_from_bytes([(few / name).read_bytes() for name in names], captioner.image_size, names)
    captions = dict(read_csv(out / "captions.csv")[1:])
    assert [captions[name] for name in names] == captioner.caption(pixels, options, ["What is it?"] * 3)
    assert [captions[name] for name in names] != captioner.caption(pixels, options)
    for other, line in (("--prompt=Who?", "prompt was 'What is it?' and is now 'Who?'"), ("", "and is now None")):
        refused = call_job(main, *command, *filter(None, [other]), check=False)
        assert refused.returncode == 1
        assert line in refused.stderr


def test_a_language_model_that_was_moved_is_named(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    write_language_model(there)
    run = str(write_language_run(tmp_path / "run", str(there)))
    pixels = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8).numpy()
    before = open_captioner(run).load()
    captions = before.caption(pixels, before.options)
    there.rename(here)
    with pytest.raises(
        InputError, match=r"--language-model '.*there': no such folder; name the one where the tokenizer is now"
    ):
        open_captioner(run).load()
    again = open_captioner(run, language_model=str(here)).load()
    assert again.caption(pixels, again.options) == captions
    assert again.identity() == before.identity()


def test_an_encoder_that_is_not_there_is_one_line(images, tmp_path, call_job):
    """A worker finds this when it loads the captioner."""
    run = write_run(tmp_path / "runs" / "resnet_captioner" / "frozen", encoder="some/encoder")
    flags = ["--run", run, "--images", images, "--out", tmp_path / "out", "--encoder", tmp_path / "no" / "such"]
    result = call_job(main, *flags, check=False)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "no such folder; name the one where the vision model is now" in line
    assert "Traceback" not in result.stdout + result.stderr


def test_a_broken_image_names_itself(run_folder, images, tmp_path, call_job):
    folder = tmp_path / "images"
    folder.mkdir()
    good = next(images.iterdir())
    (folder / "good.png").write_bytes(good.read_bytes())
    (folder / "cut.png").write_bytes(good.read_bytes()[:60])
    result = call_job(main, "--run", run_folder, "--images", folder, "--out", tmp_path / "out", check=False)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "cut.png" in line
    assert not (tmp_path / "out" / "captions.csv").exists()


def test_on_s3(run_folder, images, s3_server, call_job):
    storage = Storage(s3_server)
    for path in images.iterdir():
        storage.upload(path, f"images/{path.name}")
    for path in (run_folder / "model").rglob("*"):
        if path.is_file():
            storage.upload(path, f"runs/resnet_captioner/tiny/{path.relative_to(run_folder)}")
    call_job(
        main,
        *("--run", f"{s3_server}/runs/resnet_captioner/tiny", "--images", f"{s3_server}/images"),
        *("--out", f"{s3_server}/captions", "--rows-per-block", "16", "--num-beams", "1"),
    )
    lines = (storage / "captions").read("captions.csv").decode().splitlines()
    assert len(lines) == NUM_IMAGES + 1
    bucket = s3_server.removeprefix("s3://").split("/")[0]
    keys = [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]]
    assert sum(key.startswith("prefix/captions/parts/") for key in keys) == NUM_IMAGES // 16
