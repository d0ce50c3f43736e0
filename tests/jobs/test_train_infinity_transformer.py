"""The stage `transformer` of Infinity's job: refusals, the files of a run, and a run whose workers are killed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_tokenizer
import torch
from gate import AHEAD, Gate
from job_output import error_line
from kills import TIMEOUT_S, moments, wait_for_step, wait_until_gone, workers
from safetensors.torch import load_file

from jobs.prepare import PrepareSettings, prepare
from jobs.train_infinity import main
from mmcore.data.shapes import ShapesSettings
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_recipe import VARIANTS, InfinityRecipe
from mmcore.images import decode_image, image_grid
from mmcore.run_files import TOKENIZER_OF_BITS_ASSET, read_begun
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_tokenizer
from mmcore.trained.generator import open_generator

# Fresh scenes: every epoch of 5 steps has new ones.
FLAGS = [
    "--variant", "smoke", "--num-epochs", "4", "--max-steps", "18", "--validate-every-epochs", "2",
    "--checkpoint-every-steps", "2", "--log-every-steps", "1", "--num-threads", "1", "--precision", "fp32",
]  # fmt: skip
ON_TINY = ["--dataset", "tiny", "--no-fresh-scenes", "--exhaustive-captions", "0"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage for all runs here, with 40 training scenes and a tokenizer with random weights."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    tiny_tokenizer.write_run(storage / "tokenizer")
    return storage


@pytest.fixture(scope="module")
def with_scenes(ray_local: None, storage: Storage) -> Storage:
    scenes = ShapesSettings(num_train=40, num_validation=8, num_test=0, image_size=32)
    prepare(PrepareSettings(storage=storage.uri, shapes=scenes))
    return storage


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "infinity" / name


def outcome(run: Storage) -> dict[str, Any]:
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    samples = run / "samples"
    return {
        "model": run.read("model/model.safetensors"),
        "metrics": tiny.without_times(rows),
        "samples": {name: samples.read(name) for name in samples.list()},
    }


_finished: set[str] = set()


def reference(call_job: Callable[..., Any], storage: Storage) -> Storage:
    """A run without interruption."""
    if storage.uri not in _finished:
        flags = ["--storage", storage, "--image-tokenizer", storage / "tokenizer"]
        call_job(main, *FLAGS, *flags, "--name", "whole")
        _finished.add(storage.uri)
    return run_folder(storage, "whole")


# -- refused before any work ---------------------------------------------------------------------------------------


def test_dry_run_prints_sizes_and_writes_nothing(storage: Storage, call_here: Callable[..., Any]) -> None:
    before = sorted(Path(storage.uri).rglob("*"))
    flags = ["--split", "split", "--storage", storage, "--image-tokenizer", storage / "tokenizer", "--dry-run"]
    printed = call_here(main, *FLAGS, *ON_TINY, *flags, "--flip").stdout
    assert "tokens: 21 an image on grids of sides 1, 2, 4, each of 6 bits" in printed
    assert f"state:  {2 * 6 * 4 * 4 * 2} bytes an image (latents and mirrored_latents)" in printed
    assert "steps: 18, each of 8 images; an epoch has 5" in printed
    own = call_here(main, *FLAGS, *ON_TINY, *flags[:4], "--name", "dry", "--dry-run").stdout
    assert f"no --image-tokenizer given: {storage}/runs/infinity_tokenizer/dry is trained first" in own
    assert sorted(Path(storage.uri).rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--fresh-scenes"], ["fresh_scenes", "--dataset tiny is not rendered", "--no-fresh-scenes"]),
        (
            ["--image-tokenizer", "nowhere"],
            ["--image-tokenizer", "nowhere", "jobs/train_infinity.py --stage tokenizer"],
        ),
        (["--flip-strength", "1.5"], ["flip_strength 1.5", "--flip-strength"]),
        (["--top-p", "0.2"], ["--top-p 0.2", "above 0.5"]),
        (["--drop-text", "0"], ["--guidance 2", "drop_text 0"]),
        (["--stream"], ["--stream"]),
    ],
)
def test_settings_that_cannot_be_are_refused(
    flags: list[str], named: list[str], storage: Storage, call_here: Callable[..., Any]
) -> None:
    done = call_here(main, *FLAGS, *ON_TINY, *flags, "--split", "split", "--storage", storage, check=False)
    line = error_line(done.stdout + done.stderr)
    assert all(part in line for part in named), line


# -- runs ----------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(call_job: Callable[..., Any], with_scenes: Storage) -> None:
    storage = with_scenes
    fingerprint = open_tokenizer((storage / "tokenizer").uri).load().fingerprint()
    run = reference(call_job, storage)
    tiny.no_pickles(run)
    facts = json.loads(run.read("recipe.json"))
    assert (facts["latent_shape"], facts["grid_sides"], facts["resolution"]) == ([6, 4, 4], [1, 2, 4], 16)
    (column,) = facts["columns"]
    assert json.loads((storage / "features" / column).read("_SUCCESS"))["num_rows"] == 8, "those that validate"
    # The tokenizer and the run's copy of it stay frozen, next to the weights.
    for tokenizer in (storage / "tokenizer", run / "model" / TOKENIZER_OF_BITS_ASSET):
        assert open_tokenizer(tokenizer.uri).load().fingerprint() == fingerprint
    weights = load_file(Path(run.uri) / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"text", "transformer"}
    # All trainable weights have changed.
    begun = read_begun(run, InfinityRecipe, InfinityFacts)
    torch.manual_seed(derive_seed(begun.recipe.train.seed, "weights"))
    first = dict(begun.recipe.build(begun.facts).named_parameters())
    assert [name for name, weight in first.items() if torch.equal(weight, weights[name])] == []
    left = outcome(run)
    validated = [row for row in left["metrics"] if "validation_loss" in row]
    assert [row["step"] for row in validated] == [10, 18]
    assert all(0 < row[f"validation_bit_accuracy{grid}"] <= 1 for row in validated for grid in ("", "_1x1", "_4x4"))
    # The last grid equals the images of the finished run for its prompts and seeds.
    generator, recipe = open_generator(run.uri).load(), VARIANTS["smoke"]
    prompts = validated[-1]["samples"]["prompts"].split(" | ")
    seeds = [derive_seed(recipe.train.seed, "sample", number) for number in range(4)]
    made = image_grid(generator.generate(prompts, seeds, recipe.sample), 2)
    grid = run.read(validated[-1]["samples"]["grid"]["image"])
    np.testing.assert_array_equal(made, np.asarray(decode_image(grid, name="grid")))


@pytest.mark.nightly  # the gate resumes one in its process: mmcore/test_infinity_training.py
def test_killed_workers_change_nothing(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    with_scenes: Storage,
    tmp_path: Path,
    shared_ray: dict[str, str],
) -> None:
    """In the second epoch, whose scenes and flips were not in the first one."""
    storage, gate = with_scenes, Gate(tmp_path)
    undisturbed = reference(call_job, storage)
    run, log = run_folder(storage, "killed"), tmp_path / "job.log"
    flags = ["--storage", storage, "--image-tokenizer", storage / "tokenizer", "--name", run.name]
    gate.allow(6 + AHEAD)
    env = {**shared_ray, "GATE": str(tmp_path)}
    process = start_job("tests/gated_job.py", "train_infinity", *FLAGS, *flags, env=env, log=log)
    wait_for_step(run, 6, process)
    time.sleep(moments().uniform(0, 0.2))
    (worker,) = group = workers(process)
    worker.kill()
    wait_until_gone(group)
    gate.open()
    assert process.wait(TIMEOUT_S) == 0, log.read_text()[-4000:]
    assert gate.arrived() == 2, "a second worker has gone on"
    assert outcome(run) == outcome(undisturbed)
