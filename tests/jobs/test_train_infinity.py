"""The job of Infinity: its stages, refusals, and what a run of the tokenizer leaves."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_diffusion
import tiny_tokenizer
import torch
from job_output import error_line

from jobs.runtime.frozen_autoencoder import TOKENIZER
from jobs.runtime.job import Job, RunOptions
from jobs.runtime.run_folder import check_begun, open_run
from jobs.train_infinity import STAGES, main
from mmcore.catalogue import RECIPES
from mmcore.data.columns import open_column
from mmcore.data.pixels import to_network
from mmcore.errors import InputError
from mmcore.frozen.text import TextInputs
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_tokenizer import VARIANTS
from mmcore.generators.psnr import psnr
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_tokenizer

# 16x16 pixels to grids of 1, 2 and 4 positions a side, with the discriminator from step 10 on.
FLAGS = [
    "--stage", "tokenizer", "--variant", "smoke", "--dataset", "tiny", "--split", "split", "--image-size", "16",
    "--factors", "1", "2", "--num-epochs", "4", "--max-steps", "16", "--validate-every-epochs", "2",
    "--log-every-steps", "1", "--num-samples", "3", "--num-threads", "1",
]  # fmt: skip
# A row with neither is of a step of the generator alone.
JUDGED = ("discriminator_loss", "validation_loss")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


def test_each_stage_has_the_variants_of_its_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, recipe in STAGES.items():
        assert RECIPES[recipe].stage == ("infinity", stage)
        monkeypatch.setattr(sys, "argv", ["jobs/train_infinity.py", "--stage", stage, "--help"])
        with pytest.raises(SystemExit):
            main()
        text = capsys.readouterr().out
        assert all(word in text for word in ("--stage", "What is trained", *RECIPES[recipe].variants))


def test_dry_run_prints_sizes_and_writes_nothing(storage: Storage, call_here: Callable[..., Any]) -> None:
    before = sorted(Path(storage.uri).rglob("*"))
    printed = call_here(main, *FLAGS, "--storage", storage, "--name", "dry", "--dry-run").stdout
    assert "images 16x16x3 -> latents 4x4x8, 21 tokens of 8 bits on grids of sides 1, 2, 4" in printed
    assert "of the tokenizer, " in printed
    assert f"writes: {storage}/runs/infinity_tokenizer/dry" in printed
    assert "steps: 16, each of 8 images; an epoch has 5" in printed
    assert sorted(Path(storage.uri).rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--stage", "vae"], ["--stage 'vae'", *STAGES]),
        (["--image-size", "18"], ["image_size 18", "--image-size", "--grids"]),
        (["--stream"], ["--stream", "an autoencoder"]),
        (["--perceptual", "lpips"], ["--vgg16 FILE", "--lpips-heads FILE"]),
        (["--adversarial-weight", "1", "--discriminator-from-step", "None"], ["--adversarial-weight 1.0"]),
        (["--inverse-temperature", "9", "--entropy-weight", "0"], ["--inverse-temperature 9.0", "--entropy-weight"]),
    ],
)
def test_settings_that_cannot_be_are_refused(
    flags: list[str], named: list[str], storage: Storage, call_here: Callable[..., Any]
) -> None:
    done = call_here(main, *FLAGS, *flags, "--storage", storage, check=False)
    line = error_line(done.stdout + done.stderr)
    assert all(part in line for part in named), line


@dataclasses.dataclass(frozen=True)
class OnTokenizer:
    """What the recipe of a generator has of its tokenizer."""

    image_tokenizer: str | None = None
    dataset: str = "tiny"
    split: str = "split"


def generator(folder: Path, tokenizer: str | None = None) -> Job[Any]:
    return Job("infinity", "smoke", OnTokenizer(tokenizer), RunOptions(storage=str(folder), name="mine"))


def test_the_tokenizer_that_is_trained_first_is_of_the_same_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = generator(tmp_path)
    own = TOKENIZER.own_job(job)
    assert own.run.uri == f"{tmp_path}/runs/infinity_tokenizer/mine"
    assert own.recipe == dataclasses.replace(VARIANTS["smoke"], dataset="tiny", split="split") == TOKENIZER.recipe(job)
    assert TOKENIZER.reads(job) == f"{own.run} (trained first where missing)"
    TOKENIZER.say(job)
    assert f"no --image-tokenizer given: {own.run} is trained first" in capsys.readouterr().out


def test_a_tokenizer_that_is_named_is_taken_and_checked(tmp_path: Path) -> None:
    run, other, vqvae = (Storage(str(tmp_path / name)) for name in ("run", "other", "vqvae"))
    tiny_tokenizer.write_run(run)
    tiny_tokenizer.write_run(other, seed=1)
    tiny_diffusion.write_vqvae_run(vqvae)
    job = generator(tmp_path, run.uri)
    assert TOKENIZER.recipe(job) == tiny_tokenizer.recipe()
    assert TOKENIZER.ensure(job) == run
    fingerprint = open_tokenizer(run.uri).load().fingerprint()
    frozen = TOKENIZER.frozen(run.uri, fingerprint)
    assert frozen.on("cpu").grids == tiny_tokenizer.GRIDS
    assert frozen.assets == {"infinity_tokenizer/model": run / "model"}
    for copied in (run, other):
        shutil.copytree(copied.uri, tmp_path / "model" / "infinity_tokenizer", dirs_exist_ok=True)
        if copied == run:
            frozen.check_copy(Storage(str(tmp_path / "model")))
    with pytest.raises(InputError, match="is not the one that made the latents"):
        frozen.check_copy(Storage(str(tmp_path / "model")))
    with pytest.raises(InputError, match="vqvae: recipe 'vqvae' is not of a tokenizer; name a run of infinity_tokeni"):
        TOKENIZER.recipe(generator(tmp_path, vqvae.uri))
    with pytest.raises(
        InputError, match=r"^--image-tokenizer .*: no such run.*; jobs/train_infinity\.py --stage tokenizer"
    ):
        TOKENIZER.recipe(generator(tmp_path, str(tmp_path / "nothing")))


def test_a_run_goes_on_without_the_name_of_its_tokenizer(tmp_path: Path) -> None:
    recipe: Any = RECIPES["infinity"].variants["smoke"]
    facts = InfinityFacts(TextInputs(vocabulary_size=9), (8, 4, 4), (1, 2, 4))
    options = RunOptions(storage=str(tmp_path))
    named = dataclasses.replace(recipe, image_tokenizer=f"{tmp_path}/runs/infinity_tokenizer/default")
    open_run(Job("infinity", "smoke", named, options), facts)
    check_begun(Job("infinity", "smoke", recipe, options), facts)
    with pytest.raises(InputError, match="flip_strength"):
        check_begun(Job("infinity", "smoke", dataclasses.replace(recipe, flip_strength=0.5), options), facts)


def test_what_a_run_of_the_tokenizer_leaves(storage: Storage, call_job: Callable[..., Any], tmp_path: Path) -> None:
    call_job(main, *FLAGS, "--storage", storage, "--name", "first")
    run = storage / "runs" / "infinity_tokenizer" / "first"
    tiny.no_pickles(run)
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    validated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validated] == [10, 16]
    assert [row["step"] for row in rows if row.keys().isdisjoint(JUDGED)] == list(range(1, 11))
    for row in validated:
        assert 0 <= row["validation_bits_used"] <= 1
        assert row["samples"]["bicubic"].startswith("PSNR ")
    # The saved model, the last one, gives the score of the run.
    trained, facts = open_tokenizer(run.uri).load(), json.loads(run.read("recipe.json"))
    pixels = np.array(open_column(storage / "features" / facts["column"], tmp_path).values[40:])
    found = psnr(to_network(torch.from_numpy(pixels)), trained.reconstruct(pixels)).mean().item()
    # The run computes in bf16 if the machine supports it, where a bit near 0 may have another sign.
    assert found == pytest.approx(validated[-1]["validation_psnr"], abs=0.5)
