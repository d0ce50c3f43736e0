"""The job of the latent diffusion: refusals, its first steps, the files of a run, and an interrupted run."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_diffusion
import tiny_runs
from gate import AHEAD, Gate
from job_output import error_line, own_lines
from kills import TIMEOUT_S, committed_step, moments, rows_until, wait_for_step
from safetensors.torch import load_file

from jobs.runtime.job import Job, RunOptions
from jobs.runtime.latent_training import setup
from jobs.train_ldm import main
from mmcore.errors import InputError
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe
from mmcore.images import decode_image
from mmcore.run_files import read_begun
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator

FLAGS = [
    "--variant", "smoke", "--dataset", "tiny", "--split", "split", "--flip", "--num-epochs", "8", "--max-steps", "40",
    "--validate-every-epochs", "4", "--checkpoint-every-steps", "2", "--log-every-steps", "1", "--num-threads", "1",
    "--precision", "fp32",
]  # fmt: skip
NUM_STEPS = 40


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage for all runs here, so that the VQ-VAE is trained once."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "ldm" / name


def outcome(run: Storage) -> dict[str, Any]:
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    samples = run / "samples"
    return {
        "model": run.read("model/model.safetensors"),
        "metrics": tiny.without_times(rows),
        "samples": {name: samples.read(name) for name in samples.list()},
    }


_finished: dict[str, str] = {}


@pytest.fixture
def reference(call_job: Callable[..., Any], storage: Storage) -> Storage:
    """A run without interruption. It trains its VQ-VAE first."""
    if storage.uri not in _finished:
        result = call_job(main, *FLAGS, "--storage", storage, "--name", "first")
        _finished[storage.uri] = result.stdout
    return run_folder(storage, "first")


# -- refused before any work ---------------------------------------------------------------------------------------


def test_dry_run_prints_sizes_and_writes_nothing(storage: Storage, call_here: Callable[..., Any]) -> None:
    before = sorted(Path(storage.uri).rglob("*"))
    printed = call_here(main, *FLAGS, "--storage", storage, "--name", "dry", "--dry-run").stdout
    assert "of the U-Net on 4 x 8 x 8" in printed
    assert "steps: 40, each of 8 images; an epoch has 5" in printed
    assert f"{storage}/runs/vqvae/dry (trained first where missing)" in printed
    assert sorted(Path(storage.uri).rglob("*")) == before


@pytest.mark.parametrize("num_heads", [0, 1, 2])
def test_what_cannot_be_exported_is_said_at_the_start(
    num_heads: int, storage: Storage, tmp_path: Path, call_here: Callable[..., Any]
) -> None:
    tiny_diffusion.write_vqvae_run(Storage(str(tmp_path)), num_heads=num_heads)
    told = call_here(main, *FLAGS, "--storage", storage, "--name", "dry", "--vqvae", tmp_path, "--dry-run").stdout
    assert ("2 heads in its attention: what is trained on it cannot be exported" in told) == (num_heads == 2)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_what_a_run_makes_first_and_leaves(reference: Storage, storage: Storage) -> None:
    assert f"{storage}/runs/vqvae/first is trained first" in _finished[storage.uri]
    assert "next: " not in _finished[storage.uri], "no prompts of a dataset of others, and the VQ-VAE is not typed"
    facts = json.loads(reference.read("recipe.json"))
    assert facts["settings"]["vqvae"] == f"{storage}/runs/vqvae/first"
    assert len(set(facts["columns"])) == 2, "a view and its mirror"
    tiny.no_pickles(reference)
    tiny.no_pickles(storage / "runs" / "vqvae" / "first")
    left = outcome(reference)
    validated = [row for row in left["metrics"] if "validation_loss" in row]
    assert [row["step"] for row in validated] == [20, 40]
    for row in validated:
        assert row["samples"]["prompts"].startswith("a red square | ")
        grid = reference.read(row["samples"]["grid"]["image"])
        assert np.asarray(decode_image(grid, name="grid")).shape == (2 * 32 + 2, 2 * 32 + 2, 3)
    assert len(left["samples"]) == 2
    # The events contain the images, not only their names.
    assert len(reference.read("tensorboard/events.out.tfevents.0.run")) > sum(map(len, left["samples"].values()))
    generator: Any = open_generator(reference.uri).load()
    images = generator.generate(["a red square", "a blue square"], [1, 2], DiffusionOptions(steps=4, guidance=2.0))
    assert images.shape == (2, 32, 32, 3)
    assert generator.scaling_factor == facts["scaling_factor"]


@pytest.mark.nightly  # test_train_pixel_diffusion.py trains on one
def test_on_a_frozen_text_encoder(
    call_job: Callable[..., Any],
    reference: Storage,
    storage: Storage,
    tmp_path: Path,
) -> None:
    """Like `report`: hidden states are computed once, including the empty text's, and both encoders stay unchanged."""
    clip = tiny_runs.write_clip(tmp_path / "clip")
    flags = ["--text-encoder", clip, "--max-tokens", "77", "--drop-text", "0.5", "--max-steps", "6"]
    vqvae = storage / "runs" / "vqvae" / "first"
    call_job(main, *FLAGS, *flags, "--storage", storage, "--name", "frozen", "--vqvae", vqvae)
    run_ = run_folder(storage, "frozen")
    tiny.no_pickles(run_)
    facts = json.loads(run_.read("recipe.json"))
    column = json.loads((storage / "/".join(facts["text"])).read("_SUCCESS"))
    assert column["shape"][1:] == [77, 32]
    weights = load_file(Path(run_.uri) / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"unet"}
    generator = open_generator(run_.uri).load()
    with_guidance = generator.generate(["a red square"], [1], DiffusionOptions(steps=4))
    without = generator.generate(["a red square"], [1], DiffusionOptions(steps=4, guidance=1.0))
    assert (with_guidance != without).any()


def test_a_vqvae_that_is_trained_anew_meanwhile_is_noticed(
    reference: Storage,
    storage: Storage,
    tmp_path: Path,
) -> None:
    """When samples are decoded and when the run has its copy: the decoder always belongs to the latents."""
    begun = read_begun(reference, LatentDiffusionRecipe, DiffusionFacts)
    facts, moved = begun.facts, str(tmp_path / "vqvae")
    shutil.copytree(storage.uri + "/runs/vqvae/first", moved)
    recipe = dataclasses.replace(begun.recipe, vqvae=moved)
    job = Job("ldm", "smoke", recipe, RunOptions(storage=storage.uri, name="unwritten"))

    def one_run() -> None:
        made = setup(job, facts, lambda text: None)
        made.samples(made.model, 0)

    one_run()
    setup(job, facts, lambda text: None).check_assets(reference / "model")
    tiny_diffusion.write_vqvae_run(Storage(moved))
    with pytest.raises(InputError, match=r"vqvae/model: this VQ-VAE .* is not the one"):
        one_run()
    copied = Storage(str(tmp_path / "copied"))
    tiny_diffusion.write_vqvae_run(copied / "vqvae")
    with pytest.raises(InputError, match=r"vqvae/model: this VQ-VAE .* is not the one"):
        setup(job, facts, lambda text: None).check_assets(copied)


@pytest.mark.soak  # restarts: test_train_resume.py; of latents in one process: mmcore/test_pixel_diffusion.py
def test_an_interrupted_run_ends_as_if_nothing_had_been(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    storage: Storage,
    reference: Storage,
    tmp_path: Path,
    shared_ray: dict[str, str],
) -> None:
    command = [*FLAGS, "--storage", storage, "--name", "interrupted", "--vqvae", storage / "runs" / "vqvae" / "first"]
    log = tmp_path / "job.log"
    Gate(tmp_path).allow(12 + AHEAD)
    process = start_job("tests/gated_job.py", "train_ldm", *command, env={**shared_ray, "GATE": str(tmp_path)}, log=log)
    wait_for_step(run_folder(storage, "interrupted"), 12, process)
    time.sleep(moments().uniform(0, 0.2))
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    assert "interrupted; to go on from what was saved, if anything was: " in log.read_text()
    assert not any("Traceback" in line for line in own_lines(log.read_text())), log.read_text()
    assert "encode " not in log.read_text(), "latents of both views were made by the run before"
    run = run_folder(storage, "interrupted")
    stopped = committed_step(run)
    assert 12 <= stopped < NUM_STEPS
    before = rows_until(run, stopped)
    call_job(main, *command)
    assert rows_until(run, stopped)[: len(before)] == before
    assert outcome(run) == outcome(reference)


@pytest.mark.soak
def test_two_workers_through_ray_agree_with_one(
    call_job: Callable[..., Any], storage: Storage, reference: Storage
) -> None:
    vqvae = storage / "runs" / "vqvae" / "first"
    flags = ["--storage", storage, "--name", "two", "--vqvae", vqvae, "--num-workers", 2]
    call_job(main, *FLAGS, *flags)
    two = run_folder(storage, "two")
    alone, both = ([row["loss"] for row in outcome(run)["metrics"]][:20] for run in (reference, two))
    assert 0 < np.abs(np.subtract(alone, both)).max() <= 1e-5


def test_a_vqvae_of_other_settings_is_not_taken_silently(
    reference: Storage, storage: Storage, call_here: Callable[..., Any]
) -> None:
    vqvae = storage / "runs" / "vqvae"
    facts = json.loads((vqvae / "first").read("recipe.json"))
    facts["settings"]["num_codes"] = 7
    (vqvae / "other").write("recipe.json", json.dumps(facts).encode())
    (vqvae / "other").write("_SUCCESS", b"{}")
    line = error_line(call_here(main, *FLAGS, "--storage", storage, "--name", "other", check=False).stderr)
    assert "is finished with other settings: num_codes: 64 (there: 7)" in line
    assert "--vqvae" in line
