"""The job of the VQ-VAE: refusals, the files of a run, and a killed run."""

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gate import AHEAD, Gate
from kills import (
    committed_step,
    kill_with_all_it_started,
    moments,
    rows_until,
    wait_for_starts,
    wait_for_step,
    wait_until_gone,
    workers,
)
from PIL import Image

from jobs.runtime.autoencoder_training import default_job, with_absolute_paths
from jobs.runtime.job import RunOptions
from jobs.train_vqvae import main
from mmcore.data.columns import open_column
from mmcore.data.pixels import to_network, to_pixels
from mmcore.generators.psnr import psnr
from mmcore.generators.vqvae import VARIANTS
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder

# The smoke variant: moving averages, revival and a discriminator from step 10 on, with 16x16 pixels.
FLAGS = [
    "--variant", "smoke", "--dataset", "tiny", "--split", "split", "--image-size", "16", "--num-epochs", "20",
    "--max-steps", "40", "--validate-every-epochs", "4", "--checkpoint-every-steps", "2", "--log-every-steps", "1",
    "--num-samples", "3", "--num-threads", "1",
]  # fmt: skip
NUM_STEPS = 40


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage for all runs here, so that its pixels are cached once."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "vqvae" / name


def history(run: Storage) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]


# -- refused before any work ---------------------------------------------------------------------------------------


def test_dry_run_prints_sizes_and_writes_nothing(storage: Storage, call_here: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in Path(storage.uri).rglob("*") if path.is_file()}
    printed = call_here(main, *FLAGS, "--storage", storage, "--name", "dry", "--dry-run").stdout
    assert "images 16x16x3 -> latents 4x4x4, 64 codes" in printed
    assert "steps: 40, each of 8 images; an epoch has 5" in printed
    assert {path: path.read_bytes() for path in Path(storage.uri).rglob("*") if path.is_file()} == before


def test_a_job_for_another_job(tmp_path: Path) -> None:
    asked = RunOptions(storage="elsewhere", name="ldm", num_threads=3, num_workers=2, fresh=True, dry_run=True)
    job = default_job("vqvae", Storage(str(tmp_path)), "first", "shapes", asked)
    assert job.run.uri == f"{tmp_path}/runs/vqvae/first"
    assert (job.variant, job.recipe) == ("shapes", VARIANTS["shapes"])
    options = job.options
    assert (options.num_threads, options.num_workers, options.fresh, options.dry_run) == (3, 2, False, False)


def test_paths_hold_on_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network").mkdir()
    smoke = VARIANTS["smoke"]
    assert with_absolute_paths(smoke) == smoke
    named = with_absolute_paths(dataclasses.replace(smoke, perceptual="network"))
    assert named.perceptual == str(tmp_path / "network")
    assert with_absolute_paths(dataclasses.replace(smoke, perceptual="on/the-hub")).perceptual == "on/the-hub"
    lpips = dataclasses.replace(smoke, perceptual="lpips", vgg16="a.pth", lpips_heads="b.pth")
    absolute = with_absolute_paths(lpips)
    assert (absolute.vgg16, absolute.lpips_heads) == (str(tmp_path / "a.pth"), str(tmp_path / "b.pth"))


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    return {}


@pytest.fixture
def reference(finished: dict[str, Any], call_job: Callable[..., Any], storage: Storage) -> dict[str, Any]:
    """The result of a run without interruption."""
    if not finished:
        call_job(main, *FLAGS, "--storage", storage, "--name", "reference")
        finished.update(outcome(run_folder(storage, "reference")))
    return finished


def outcome(run: Storage) -> dict[str, Any]:
    samples = run / "samples"
    return {
        "model": run.read("model/model.safetensors"),
        "metrics": tiny.without_times(history(run)),
        "samples": {name: samples.read(name) for name in samples.list()},
    }


def test_what_a_run_leaves(reference: dict[str, Any], storage: Storage, tmp_path: Path) -> None:
    run = run_folder(storage, "reference")
    rows = reference["metrics"]
    validated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validated] == [20, 40]
    for row in validated:
        assert 0 < row["validation_codes_used"] <= 1
        assert 1 <= row["validation_perplexity"] <= 64
        assert row["samples"]["bicubic"].startswith("PSNR ")
        assert row["samples"]["reconstructions"]["image"] in {f"samples/{name}" for name in reference["samples"]}
    assert validated[1]["validation_psnr"] > validated[0]["validation_psnr"]
    assert [row["step"] for row in rows if "discriminator_loss" not in row] == list(range(1, 11))

    # The saved model, the last one, gives the reconstructions and the score of the run.
    trained = open_autoencoder(run.uri).load()
    facts = json.loads(run.read("recipe.json"))
    column = open_column(run.parent.parent.parent / "features" / facts["column"], tmp_path)
    pixels = np.array(column.values[40:])
    assert pixels.shape == (8, 16, 16, 3)
    made = trained.decode(trained.encode(pixels))
    last = validated[-1]
    found = psnr(to_network(torch.from_numpy(pixels)), made).mean().item()
    # The run computes in bf16 if the machine supports it.
    assert found == pytest.approx(last["validation_psnr"], abs=0.1)
    grid = np.asarray(Image.open(io.BytesIO(run.read(last["samples"]["reconstructions"]["image"]))))
    assert grid.shape == (2 * 16 + 2, 3 * 16 + 2 * 2, 3)
    np.testing.assert_array_equal(grid[:16, :16], pixels[0])
    # One step of 1/255 if another number of threads rounds differently.
    assert np.abs(grid[18:, 36:].astype(int) - to_pixels(made)[2].numpy()).max() <= 1


@pytest.mark.soak  # test_train_resume.py covers restarts, and mmcore/test_phases.py resumes two phases
def test_a_killed_run_ends_as_if_nothing_had_been(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    storage: Storage,
    reference: dict[str, Any],
    tmp_path: Path,
    shared_ray: dict[str, str],
) -> None:
    """SIGKILL to the worker while only the generator trains, then to the driver once the discriminator trains."""
    run = run_folder(storage, "killed")
    command = [*FLAGS, "--storage", storage, "--name", "killed"]
    gate = Gate(tmp_path)
    gate.allow(4 + AHEAD)
    process = start_job("tests/gated_job.py", "train_vqvae", *command, env={**shared_ray, "GATE": str(tmp_path)})
    wait_for_step(run, 4, process)
    (worker,) = workers(process)
    worker.kill()
    wait_until_gone([worker])
    gate.allow(14 + AHEAD)
    wait_for_starts(gate, 2, process)
    wait_for_step(run, 14, process)
    time.sleep(moments().uniform(0, 0.2))
    kill_with_all_it_started(process)
    stopped = committed_step(run)
    assert 14 <= stopped < NUM_STEPS
    before = rows_until(run, stopped)
    call_job(main, *command)
    assert rows_until(run, stopped)[: len(before)] == before
    assert outcome(run) == reference
