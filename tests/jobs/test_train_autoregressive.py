"""The job of the autoregressive Transformer: refusals, the files of a run, and a run whose workers are killed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_diffusion
import torch
from gate import AHEAD, Gate
from job_output import error_line
from kills import TIMEOUT_S, moments, wait_for_step, wait_until_gone, workers
from safetensors.torch import load_file

from jobs.prepare import PrepareSettings, prepare
from jobs.runtime.frozen_autoencoder import VQVAE
from jobs.runtime.generator_training import open_text
from jobs.runtime.job import Job, RunOptions
from jobs.train_autoregressive import main
from mmcore.data.shapes import ShapesSettings
from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.autoregressive import VARIANTS, AutoregressiveRecipe
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.images import decode_image, image_grid
from mmcore.run_files import read_begun
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder
from mmcore.trained.generator import open_generator

# Fresh scenes: every epoch of 5 steps has new ones.
FLAGS = [
    "--variant", "smoke", "--num-epochs", "4", "--max-steps", "18", "--validate-every-epochs", "2",
    "--checkpoint-every-steps", "2", "--log-every-steps", "1", "--num-threads", "1", "--precision", "fp32",
]  # fmt: skip
NUM_STEPS = 18
ON_TINY = ["--dataset", "tiny", "--no-fresh-scenes", "--exhaustive-captions", "0"]


@pytest.fixture(scope="module")
def storage(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage for all runs here, with 40 training scenes and a VQ-VAE with random weights."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    scenes = ShapesSettings(num_train=40, num_validation=8, num_test=0, image_size=32)
    prepare(PrepareSettings(storage=storage.uri, shapes=scenes))
    tiny_diffusion.write_vqvae_run(storage / "vqvae")
    return storage


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "autoregressive" / name


def outcome(run: Storage) -> dict[str, Any]:
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    samples = run / "samples"
    return {
        "model": run.read("model/model.safetensors"),
        "metrics": tiny.without_times(rows),
        "samples": {name: samples.read(name) for name in samples.list()},
    }


_finished: set[tuple[str, int]] = set()


def reference(call_job: Callable[..., Any], storage: Storage, num_workers: int) -> Storage:
    """A run without interruption."""
    name = f"workers-{num_workers}"
    if (storage.uri, num_workers) not in _finished:
        flags = ["--storage", storage, "--vqvae", storage / "vqvae", "--num-workers", num_workers]
        call_job(main, *FLAGS, *flags, "--name", name)
        _finished.add((storage.uri, num_workers))
    return run_folder(storage, name)


# -- refused before any work ---------------------------------------------------------------------------------------


def test_dry_run_prints_sizes_and_writes_nothing(storage: Storage, call_here: Callable[..., Any]) -> None:
    before = sorted(Path(storage.uri).rglob("*"))
    flags = ["--storage", storage, "--name", "dry", "--dry-run"]
    printed = call_here(main, *FLAGS, *flags, "--max-tokens", 23).stdout
    assert "tokens: 64 an image (8 x 8), each one of 64 codes" in printed
    assert "steps: 18, each of 8 images; an epoch has 5" in printed
    assert "state:  64 bytes an image (codes), 0.0 MB for 8 images" in printed
    assert "images: 144 scenes are drawn while it trains, each seen once" in printed
    assert f"{storage}/runs/vqvae/dry (trained first where missing)" in printed
    assert "of 600 have more than 23 tokens" in printed, "five of each of 40 scenes, and 400 exhaustive ones"
    assert f"no --vqvae given: {storage}/runs/vqvae/dry is trained first, under the name of --name\n" in printed
    assert sorted(Path(storage.uri).rglob("*")) == before


def test_a_word_of_exhaustive_captions_alone_is_known() -> None:
    captions, more = ["a red square"] * 2, ["a square left of a red one"] * 2
    text = open_text(VARIANTS["smoke"], captions, more)
    assert isinstance(text, PromptTokenizer)
    assert text.tokenizer.unk_token_id not in text(more)[0]
    # None is missing: the ids cover the captions exactly.
    alone = PromptTokenizer.of_words(captions, 24).fingerprint()
    assert open_text(VARIANTS["smoke"], captions, ["square square red"] * 2).fingerprint() == alone


def test_shapes_trains_first_the_vqvae_whose_codes_can_be_guessed() -> None:
    job = Job("autoregressive", "shapes", VARIANTS["shapes"], RunOptions(storage="/out", name="mine"))
    own = VQVAE.own_job(job)
    assert (own.variant, own.options.name) == ("shapes-codes", "mine-shapes-codes")


# -- runs ----------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(call_job: Callable[..., Any], storage: Storage) -> None:
    fingerprint = open_autoencoder((storage / "vqvae").uri).load().fingerprint()
    run = reference(call_job, storage, 1)
    tiny.no_pickles(run)
    facts = json.loads(run.read("recipe.json"))
    assert (facts["code_shape"], facts["num_codes"], facts["resolution"]) == ([8, 8], 64, 32)
    assert facts["autoencoder_fingerprint"] == fingerprint
    (column,) = facts["columns"]
    assert json.loads((storage / "features" / column).read("_SUCCESS"))["num_rows"] == 8, "those that validate"
    # The VQ-VAE and the run's copy of it stay frozen, next to the weights.
    for vqvae in (storage / "vqvae", run / "model" / "vqvae"):
        assert open_autoencoder(vqvae.uri).load().fingerprint() == fingerprint
    weights = load_file(Path(run.uri) / "model" / "model.safetensors")
    assert not [name for name in weights if "vqvae" in name or "quantizer" in name]
    # All trainable weights have changed.
    begun = read_begun(run, AutoregressiveRecipe, AutoregressiveFacts)
    torch.manual_seed(derive_seed(begun.recipe.train.seed, "weights"))
    first = dict(begun.recipe.build(begun.facts).named_parameters())
    assert [name for name, weight in first.items() if torch.equal(weight, weights[name])] == []
    assert (run / "model" / "tokenizer").exists("tokenizer.json")
    left = outcome(run)
    validated = [row for row in left["metrics"] if "validation_loss" in row]
    assert [row["step"] for row in validated] == [10, 18]
    for row in validated:
        grid = run.read(row["samples"]["grid"]["image"])
        assert np.asarray(decode_image(grid, name="grid")).shape == (2 * 32 + 2, 2 * 32 + 2, 3)
    assert len({row["samples"]["prompts"] for row in validated}) == 1
    assert len(left["samples"]) == 2
    # The last grid equals the images of the finished run for its prompts and seeds.
    generator, recipe = open_generator(run.uri).load(), VARIANTS["smoke"]
    prompts = validated[-1]["samples"]["prompts"].split(" | ")
    seeds = [derive_seed(recipe.train.seed, "sample", number) for number in range(4)]
    made = image_grid(generator.generate(prompts, seeds, recipe.sample), 2)
    np.testing.assert_array_equal(made, np.asarray(decode_image(grid, name="grid")))


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_killed_workers_change_nothing(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    storage: Storage,
    tmp_path: Path,
    num_workers: int,
    shared_ray: dict[str, str],
) -> None:
    """In the second epoch, whose scenes were not in the first one."""
    undisturbed, gate, draw = reference(call_job, storage, num_workers), Gate(tmp_path), moments()
    run, log = run_folder(storage, f"killed-{num_workers}"), tmp_path / "job.log"
    flags = ["--storage", storage, "--vqvae", storage / "vqvae", "--num-workers", num_workers, "--name", run.name]
    gate.allow(6 + AHEAD)
    job, env = ["tests/gated_job.py", "train_autoregressive"], {**shared_ray, "GATE": str(tmp_path)}
    process = start_job(*job, *FLAGS, *flags, env=env, log=log)
    wait_for_step(run, 6, process)
    time.sleep(draw.uniform(0, 0.2))
    group = workers(process)
    assert len(group) == num_workers
    draw.choice(group).kill()
    wait_until_gone(group)
    gate.open()
    assert process.wait(TIMEOUT_S) == 0, log.read_text()[-4000:]
    assert gate.arrived() == 2, "a second group of workers has gone on"
    assert outcome(run) == outcome(undisturbed)


@pytest.mark.nightly  # for a latent diffusion the gate trains both
def test_on_cached_codes_of_both_views_and_a_vqvae_of_its_own(call_job: Callable[..., Any], storage: Storage) -> None:
    tiny.write_dataset(storage)
    done = call_job(main, *FLAGS, *ON_TINY, "--flip", "--max-steps", "6", "--storage", storage, "--name", "own")
    assert f"training {storage}/runs/vqvae/own first" in done.stdout
    run = run_folder(storage, "own")
    tiny.no_pickles(run)
    facts = json.loads(run.read("recipe.json"))
    assert facts["settings"]["vqvae"] == f"{storage}/runs/vqvae/own"
    columns = [json.loads((storage / "features" / name).read("_SUCCESS")) for name in facts["columns"]]
    assert [(each["dtype"], each["shape"], each["num_rows"]) for each in columns] == [("uint8", [8, 8], 48)] * 2
    assert open_generator(run.uri).load().generate(["a red square"], [1], VARIANTS["smoke"].sample).std() > 0


def test_another_vqvae_is_refused_before_codes_are_made(call_job: Callable[..., Any], storage: Storage) -> None:
    """For a half-finished run: a VQ-VAE of another size, and one of the same size with other weights."""
    begun = reference(call_job, storage, 1)
    run_folder(storage, "half-done").write("recipe.json", begun.read("recipe.json"))
    tiny_diffusion.write_vqvae_run(storage / "larger", image_size=64)
    tiny_diffusion.write_vqvae_run(storage / "other", seed=2)
    before = sorted(Path(storage.uri).rglob("*"))
    for vqvae, differs in (("larger", "code_shape: [16, 16] (there: [8, 8])"), ("other", "autoencoder_fingerprint: ")):
        flags = ["--storage", storage, "--vqvae", storage / vqvae, "--name", "half-done"]
        done = call_job(main, *FLAGS, *flags, check=False)
        line = error_line(done.stdout + done.stderr)
        assert f"half-done holds an unfinished run of other settings: {differs}" in line
        assert sorted(Path(storage.uri).rglob("*")) == before
