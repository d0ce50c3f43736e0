"""The output of a dry run for each recipe: sizes, paths and bytes cached per image. It writes nothing."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_diffusion
import tiny_runs

from jobs.runtime.job import Job, RunOptions
from jobs.runtime.training_flow import say_sizes
from mmcore.captioners import table_1
from mmcore.generators.facts import VQVAEFacts
from mmcore.generators.vqvae import VARIANTS
from mmcore.run_files import RunFile, write_begun
from mmcore.storage import Storage

ON_CACHED = ["--no-fresh-scenes", "--exhaustive-captions", "0"]
TEXT = ["--text-encoder", "clip", "--max-tokens", "77", "--captions-per-image", "2"]


def dry_run(name: str, *flags: str) -> None:
    """In this process, without Ray."""
    job: Any = importlib.import_module(f"jobs.train_{name}")
    sys.argv = [f"jobs/train_{name}.py", "--variant", "smoke", "--dry-run", *flags]
    job.main()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dataset of 48 images, a frozen image encoder and a frozen text encoder."""
    tiny.write_dataset(Storage(str(tmp_path / "out")))
    tiny_runs.write_resnet(tmp_path / "resnet")
    tiny_runs.write_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "flags", "state"),
    [
        ("resnet_captioner", [], f"{64 * 64 * 3:,} bytes an image (pixels), 0.6 MB for 48 images"),
        # For 64², the second stage gives 8² tokens of 16 channels in fp16.
        ("resnet_captioner", ["--encoder", "resnet"], f"{8 * 8 * 16 * 2:,} bytes an image (tokens)"),
        (
            "resnet_captioner",
            ["--encoder", "resnet", "--flip"],
            f"{2 * 8 * 8 * 16 * 2:,} bytes an image (tokens and mirrored_tokens)",
        ),
        ("clip_captioner", ["--encoder", "resnet", "--tokens", "pooled"], f"{16 * 2:,} bytes an image (tokens)"),
        ("qformer_llm", [], f"{64 * 64 * 3:,} bytes an image (pixels)"),
        ("clip", [], f"{64 * 64 * 3:,} bytes an image (pixels)"),
        ("pixel_diffusion", [], f"{32 * 32 * 3:,} bytes an image (pixels)"),
        ("pixel_diffusion", TEXT, f"{32 * 32 * 3 + 2 * 77 * 32 * 2:,} bytes an image (pixels and text)"),
        ("ldm", [], f"{4 * 8 * 8 * 2:,} bytes an image (latents)"),
        ("ldm", ["--flip"], f"{2 * 4 * 8 * 8 * 2:,} bytes an image (latents and mirrored_latents)"),
        ("autoregressive", ON_CACHED, f"{8 * 8:,} bytes an image (codes)"),
        ("autoregressive", [*ON_CACHED, "--flip"], f"{2 * 8 * 8:,} bytes an image (codes and mirrored_codes)"),
        ("vqvae", [], f"{32 * 32 * 3:,} bytes an image (pixels)"),
    ],
)
def test_the_bytes_of_an_image_are_told(
    name: str, flags: list[str], state: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    dry_run(name, "--dataset", "tiny", "--split", "split", "--storage", str(folder / "out"), *flags)
    out = capsys.readouterr().out
    assert f"state:  {state}" in out
    assert f"writes: {folder}/out/runs/{name}/default" in out
    assert "steps: 5, each of 8 images; an epoch has 5" in out
    assert "Table 1" not in out, "of Flickr8k, and of another size"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "flags", "mend"),
    [
        ("resnet_captioner", ["--max-length", "{}"], "raise --max-length"),
        ("pixel_diffusion", ["--max-tokens", "{}"], "raise --max-tokens"),
        ("pixel_diffusion", ["--text-encoder", "clip", "--max-tokens", "{}"], "raise --max-tokens"),
    ],
)
def test_captions_that_lose_their_tail_are_counted(
    name: str, flags: list[str], mend: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longer of two captions per image has 10 words."""
    own = ["--dataset", "tiny", "--split", "split", "--storage", str(folder / "out"), "--captions-per-image", "2"]
    dry_run(name, *own, *(flag.format(12) for flag in flags))
    assert "lose their tail" not in capsys.readouterr().out
    dry_run(name, *own, *(flag.format(11) for flag in flags))
    assert (
        f"captions: 40 of 80 have more than 11 tokens, with begin and end, and lose their tail; {mend}\n"
        in capsys.readouterr().out
    )


def test_the_variant_of_the_report_says_why_its_sizes_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "tiny", "--split", "split", "--encoder", "resnet", "--image-size", "64"]
    dry_run("resnet_captioner", "--variant", "report", "--num-layers", "1", *flags)
    said = capsys.readouterr().out
    assert "trainable (Table 1: 34.2 M and 21.5 M)" in said
    assert table_1.RESNET in said


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ([], None),
        (["--max-steps", "4"], None),
        (["--max-steps", "60"], "the one epoch has only 5 steps; --max-steps 60 is not reached"),
        (["--variant", "shapes", "--num-epochs", "6"], "the 6 epochs have only 12 steps; a model of this kind takes"),
        (["--variant", "shapes", "--num-epochs", "6", "--max-steps", "4"], None),
        (["--variant", "shapes", "--num-epochs", "150"], None),
    ],
)
def test_few_steps_are_told_unless_they_were_asked_for(
    flags: list[str], note: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A smoke test has few by itself."""
    dry_run("resnet_captioner", *flags, "--dataset", "tiny", "--split", "split", "--storage", str(folder / "out"))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (note is not None)
    if note is not None:
        assert notes[0].startswith(f"note: {note}")
        assert notes[0].endswith("raise --num-epochs")


def test_no_flag_is_named_where_the_frozen_encoder_reads_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny, "captions_of", lambda row: ["a red square", "red " * 76])
    tiny.write_dataset(Storage(str(folder / "long")))
    flags = ["--dataset", "tiny", "--split", "split", "--storage", str(folder / "long"), "--projection-width", "16"]
    dry_run("pixel_diffusion", *flags, *TEXT)
    out = capsys.readouterr().out
    assert f"captions: 40 of 80 have more than 77 tokens, with begin and end, and lose their tail; {folder}/clip" in out
    number = r"[\d.,]+( M)?"
    text = rf"{number} of the projection of the text, {number} of the frozen {folder}/clip"
    assert re.search(rf"parameters of pixel_diffusion: {number} of the U-Net on 3 x 32 x 32, {text}\n", out), out


def test_on_an_empty_storage_it_says_what_is_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It generates the captions of 8,500 scenes. test_training_job.py does the same for a captioner."""
    monkeypatch.setattr(sys, "argv", [])
    dry_run("ldm", "--storage", str(tmp_path / "empty"))
    out = capsys.readouterr().out
    assert f"{tmp_path}/empty/runs/vqvae/default (trained first where missing)" in out
    assert "lose their tail" not in out, "the length of a smoke test is ours"
    assert "first:  makes the Shapes data, num_train 8000, num_validation 200, num_test 300, " in out
    assert "steps: 20, each of 8 images; an epoch has 1,000" in out
    assert not (tmp_path / "empty").exists()


def test_the_vqvae_that_is_trained_first_is_named_beside_finished_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, of_tiny = folder / "out" / "runs" / "vqvae", {"dataset": "tiny", "split": "split"}
    flags = ["--dataset", "tiny", "--split", "split", "--storage", str(folder / "out"), "--name", "mine"]
    for name, settings in (("like", of_tiny), ("other", of_tiny | {"num_codes": 32}), ("unfinished", of_tiny)):
        tiny_diffusion.write_vqvae_run(Storage(str(runs / name)), **settings)
        write_begun(
            Storage(str(runs / name)),
            RunFile("vqvae", "smoke", replace(VARIANTS["smoke"], **settings), VQVAEFacts(), ""),
        )
        if name != "unfinished":
            (runs / name / "_SUCCESS").touch()
    dry_run("ldm", *flags)
    told = f"no --vqvae given: {runs}/mine is trained first, under the name of --name"
    assert f"{told}; finished with the same settings: {runs}/like (give it as --vqvae)\n" in capsys.readouterr().out
    (runs / "like").rename(runs / "mine")
    dry_run("ldm", *flags)
    assert f"no --vqvae given: taking the finished {runs}/mine, which goes by --name\n" in capsys.readouterr().out


def test_the_sizes_name_the_model_and_no_part_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    job: Any = Job("vqvae", "smoke", VARIANTS["smoke"], RunOptions())
    say_sizes(job, {"the VQ-VAE": 2_714_000, "the discriminator": 3412, "the loss": 0})
    assert capsys.readouterr().out == "parameters of vqvae: 2.71 M of the VQ-VAE, 3,412 of the discriminator\n"
