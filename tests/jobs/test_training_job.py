"""Edge cases of the training job: refusals and their messages, and two workers in Ray."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import tiny
from job_output import PATIENT_WATCHDOG, error_line
from kills import TRAIN_WORKER

from jobs.runtime import source
from jobs.train_resnet_captioner import main
from mmcore.storage import Storage

JOB = "jobs/train_resnet_captioner.py"
FLAGS = [
    "--variant", "smoke", "--dataset", "tiny", "--split", "split", "--image-size", "32", "--num-epochs", "4",
    "--max-steps", "20", "--batch-size", "8", "--log-every-steps", "1", "--num-threads", "1", "--precision", "fp32",
]  # fmt: skip
THE_JOB = """
from jobs.runtime.commandline import run
from jobs.train_resnet_captioner import main
run(main)
"""
# The training job. Its second worker raises an input error at its first batch.
ONE_SIDED_MISTAKE = """
import ray.train
import jobs.train_resnet_captioner as job
from jobs.runtime.commandline import run
from mmcore.errors import InputError

original = job.setup

def setup(*args):
    made = original(*args)
    if ray.train.get_context().get_world_rank() == 1:
        def train_batch(indices, epoch):
            raise InputError("worker 1 alone cannot read its images")
        made.rows.train_batch = train_batch
    return made

job.setup = setup
run(job.main)
"""
CallJob = Callable[..., Any]
RunJob = Callable[..., Any]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage for all runs here, so that its images are encoded once."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "resnet_captioner" / name


def refusal(result: Any) -> str:
    """The error line of a refused job, on stderr and with exit code 1."""
    everything = result.stdout + result.stderr
    assert result.returncode == 1, everything
    line = error_line(everything)
    assert line in result.stderr.splitlines()
    return line


def num_workers_started() -> int:
    """Number of workers that Ray Train has started in this Ray, including ended ones."""
    actors = ray._private.state.actors().values()  # type: ignore[attr-defined]
    return sum(actor["ActorClassName"].endswith(TRAIN_WORKER) for actor in actors)


def losses(run: Storage) -> list[float]:
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    return [row["loss"] for row in rows if "validation_loss" not in row]


def everything_in(storage: Storage) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(storage.uri).rglob("*") if path.is_file()}


# -- refused before any work ---------------------------------------------------------------------------------------


def test_a_refusal_as_a_user_sees_it(run_job: RunJob, storage: Storage) -> None:
    result = run_job(JOB, *FLAGS, "--storage", storage, "--batch-size", "9", "--num-workers", "2", check=False)
    assert result.stdout == ""
    assert result.stderr == refusal(result) + "\n"


def test_a_mistyped_flag_is_named_with_a_suggestion(call_job: CallJob, storage: Storage) -> None:
    result = call_job(main, *FLAGS, "--storage", storage, "--batchsize", "8", check=False)
    assert result.returncode != 0
    assert "Traceback" not in result.stdout + result.stderr
    assert "--batch-size" in result.stderr
    assert "batchsize" in result.stderr


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(call_job: CallJob, storage: Storage) -> Storage:
    """A finished run of one worker. Tests may copy it but must not change it."""
    folder = run_folder(storage, "one")
    if not folder.exists("_SUCCESS"):
        done = call_job(main, *FLAGS, "--storage", storage, "--name", "one")
        assert f"finished: {folder}/model" in done.stdout
    return folder


def test_a_finished_run_is_refused_and_fresh_starts_anew(
    call_job: CallJob, run_job: RunJob, storage: Storage, finished: Storage
) -> None:
    folder = run_folder(storage, "once")
    shutil.copytree(finished.uri, folder.uri)
    command = [*FLAGS, "--storage", storage, "--name", "once"]
    assert set(folder.list()) >= {"_SUCCESS", "recipe.json", "metrics.jsonl"}
    facts = json.loads((folder / "model").read("recipe.json"))
    assert (facts["recipe"], facts["settings"]["train"]["batch_size"]) == ("resnet_captioner", 8)
    model, metrics = folder.read("model/model.safetensors"), losses(folder)
    assert len(metrics) >= 16

    line = refusal(call_job(main, *command, check=False))
    assert re.fullmatch(
        f"error: {re.escape(str(folder))} is finished; give another --name, or --fresh to start anew", line
    )
    assert folder.read("model/model.safetensors") == model

    # With --fresh but without resources: the existing run is kept.
    line = refusal(run_job(JOB, *command, "--fresh", env={"RAY_ADDRESS": "127.0.0.1:1"}, check=False))
    assert "no Ray cluster answers there" in line
    assert folder.read("model/model.safetensors") == model
    assert folder.exists("_SUCCESS")

    # Two workers with data from Ray Data.
    call_job(main, *command, "--fresh", "--stream", "--max-steps", "6", "--num-workers", 2)
    streamed = losses(folder)
    assert len(streamed) == 6, "a run that went on would keep the others"
    assert streamed[-1] < streamed[0]
    facts = json.loads(folder.read("_SUCCESS"))
    assert (facts["num_workers"], facts["rows_seen"]) == (2, 48)
    state = next(Path(folder.uri).glob("checkpoint_2*/state.json"))
    assert json.loads(state.read_text())["content"]["parallelism"] == {"num_workers": 2, "num_threads": 1}


@pytest.mark.nightly  # mmcore/test_training.py compares them without Ray
def test_two_workers_through_ray_agree_with_one(call_job: CallJob, storage: Storage, finished: Storage) -> None:
    call_job(main, *FLAGS, "--storage", storage, "--name", "two", "--num-workers", 2)
    alone, both = losses(finished), losses(run_folder(storage, "two"))
    # Measured 5.1e-7. Bit-identical results would mean that one worker did all the work.
    assert 0 < np.abs(np.subtract(alone, both)).max() <= 1e-5


def test_a_diverging_run_stops_without_retries_and_keeps_the_last_good_checkpoint(
    call_job: CallJob, storage: Storage
) -> None:
    flags = [
        "--lr", "1e30", "--warmup-steps", "0", "--schedule", "constant", "--clip-grad-norm", "None",
        "--checkpoint-every-steps", "1",
    ]  # fmt: skip
    command = [*FLAGS, *flags, "--storage", storage, "--name", "diverges"]
    before = num_workers_started()
    line = refusal(call_job(main, *command, check=False))
    assert num_workers_started() == before + 1
    pattern = r"error: the loss is (nan|inf) at step 2; last good checkpoint: step 1; .*"
    assert re.fullmatch(pattern, line), line
    assert "--lr" in line
    assert "1e+30" in line
    folder = run_folder(storage, "diverges")
    assert not folder.exists("_SUCCESS")
    assert not folder.exists("model/model.safetensors")

    # An unfinished run can only be continued with its own settings.
    line = refusal(call_job(main, *FLAGS, "--storage", storage, "--name", "diverges", check=False))
    assert "unfinished run of other settings" in line
    assert "settings.train.lr: 0.001 (there: 1e+30)" in line
    assert "--fresh" in line


def test_an_unfinished_run_with_another_vocabulary_is_refused(
    call_job: CallJob, storage: Storage, finished: Storage
) -> None:
    folder = run_folder(storage, "words")
    shutil.copytree(finished.uri, folder.uri)
    folder.delete("_SUCCESS")
    command = [*FLAGS, "--storage", storage, "--name", "words"]
    line = refusal(call_job(main, *command, "--min-word-count", "30", check=False))
    assert "unfinished run of other settings" in line
    assert "min_word_count: 30 (there: 1)" in line
    assert "text_fingerprint: " in line
    assert "--fresh" in line

    # The same flags with changed captions.
    facts = json.loads(folder.read("recipe.json"))
    facts["text_fingerprint"] = "of other words"
    folder.write("recipe.json", json.dumps(facts).encode())
    line = refusal(call_job(main, *command, check=False))
    assert "text_fingerprint: " in line


@pytest.mark.nightly  # the diverging run tests retries, and mmcore/test_checkpoint.py damaged files
def test_a_damaged_checkpoint_is_refused_without_retries(
    call_job: CallJob, storage: Storage, finished: Storage
) -> None:
    folder = run_folder(storage, "damaged")
    shutil.copytree(finished.uri, folder.uri)
    folder.delete("_SUCCESS")
    for path in Path(folder.uri).glob("checkpoint_2*/weights.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    before = num_workers_started()
    line = refusal(call_job(main, *FLAGS, "--storage", storage, "--name", "damaged", check=False))
    assert num_workers_started() == before + 1
    assert "weights.safetensors is missing or damaged" in line
    assert "--fresh" in line
    assert str(folder) in line


def test_dry_run_writes_nothing(call_job: CallJob, storage: Storage) -> None:
    before = everything_in(storage)
    result = call_job(main, *FLAGS, "--storage", storage, "--name", "dry", "--dry-run")
    assert everything_in(storage) == before
    assert not run_folder(storage, "dry").exists()
    assert result.stdout.startswith("recipe: resnet_captioner, variant smoke\n")
    assert "batch_size 8, " in result.stdout[result.stdout.index("settings: ") :]
    assert "steps: 20, each of 8 images; an epoch has 5" in result.stdout
    assert re.search(
        r"^parameters of resnet_captioner: [\d,.]+( M)? in all, [\d,.]+( M)? trainable;", result.stdout, re.M
    )
    assert str(run_folder(storage, "dry")) in result.stdout


def test_without_a_variant_it_says_what_it_runs_and_how_to_run_the_reports(call_job: CallJob, tmp_path: Path) -> None:
    result = call_job(main, "--dry-run", "--storage", tmp_path / "empty")
    first = result.stdout.splitlines()[0]
    assert first.startswith("no --variant given: running `shapes`, self-contained")
    assert first.endswith("for the report's settings give `--variant report`")
    assert "steps: 3,000, each of 16 images" in result.stdout
    assert not (tmp_path / "empty").exists()


def test_help_shows_the_variants_own_values(call_job: CallJob) -> None:
    best = call_job(main, "--variant", "best", "--help").stdout
    report = call_job(main, "--variant", "report", "--help").stdout
    for text in (best, report):
        assert all(
            f"--{flag}" in text for flag in ("storage", "name", "num-workers", "fresh", "dry-run", "width", "lr")
        )
    assert "384" in best
    assert "384" not in report


@pytest.mark.nightly  # test_cluster.py names what a cluster lacks
@pytest.mark.usefixtures("finished")  # it has encoded the images
def test_a_job_that_cannot_be_placed_says_what_is_missing(run_job: RunJob, storage: Storage, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"{PATIENT_WATCHDOG}\n{THE_JOB}")
    flags = ["--batch-size", "40", "--num-workers", "40", "--stall-timeout", "4"]
    line = refusal(run_job(script, *FLAGS, *flags, "--storage", storage, "--name", "too-many", check=False))
    assert "train resnet_captioner/too-many" in line
    assert "a placement group of {CPU: 0.5} x 40" in line
    assert "missing: CPU" in line


def test_the_code_of_a_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its commit, or without .git on a cluster by Ray's hash of the shipped code."""
    for folder, name in (("_ray_pkg_0123456789abcdef", "_ray_pkg_0123456789abcdef"), ("elsewhere", "unknown")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(source, "ROOT", tmp_path / folder)
        assert source.source_commit() == name


@pytest.mark.soak
def test_a_mistake_that_one_worker_meets_ends_the_others(run_job: RunJob, storage: Storage, tmp_path: Path) -> None:
    """The other worker waits in a collective. Without a message from the first one it would wait for half an hour."""
    script = tmp_path / "job.py"
    script.write_text(ONE_SIDED_MISTAKE)
    command = [script, *FLAGS, "--num-workers", "2", "--storage", storage, "--name", "one-sided"]
    result = run_job(*command, check=False)
    # Ray's controller also logs that it starts the workers again.
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: worker 1 alone cannot read its images"]
    assert not run_folder(storage, "one-sided").exists("_SUCCESS")
