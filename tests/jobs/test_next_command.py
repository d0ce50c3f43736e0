"""jobs/runtime/next_command.py: what follows a job is parsed by its program, and lies where nothing else does."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_docs import parse

from jobs.runtime.commandline import say_next
from jobs.runtime.job import Job, parse_job, parse_staged_job
from jobs.runtime.next_command import after_captioning, after_generating, after_training
from mmcore.data.prepared import CaptionTable
from mmcore.storage import Storage

PHOTOS = "--variant best --dataset flickr8k"
MINE = "--variant smoke --dataset mine --split split"


def trained(file: str, flags: str, splits: list[str], storage: Path | str = "out") -> list[str]:
    """What follows the training of images of these splits."""
    module = importlib.import_module(f"jobs.{file}")
    argv = [*shlex.split(flags), "--storage", str(storage)]
    job: Job[Any]
    if (stages := getattr(module, "STAGES", None)) is None:
        job = parse_job(f"jobs/{file}.py", module.VARIANTS, "", argv)
    else:
        job = parse_staged_job(f"jobs/{file}.py", stages, "", argv)
    assert job.is_typed
    table = CaptionTable([], [], [], splits, {})
    return after_training(job, table)


@pytest.mark.parametrize(
    ("file", "flags", "splits", "expected"),
    [
        (
            "train_resnet_captioner", f"{PHOTOS} --name mine", ["train", "validation"],
            "caption.py --run out/runs/resnet_captioner/mine --images out/data/flickr8k --split split_report:validation"
            " --num-beams 5 --length-penalty 0.6 --out out/captions/resnet_captioner/mine",
        ),
        (
            "train_clip_captioner", "", ["train", "validation", "test"],
            "caption.py --run out/runs/clip_captioner/default --images out/data/shapes --split split:test"
            " --out out/captions/clip_captioner/default",
        ),
        (
            "train_clip", f"{PHOTOS} --text-encoder scratch", ["train", "validation", "test"],
            "evaluate.py retrieval --run out/runs/clip/default --storage out --dataset flickr8k"
            " --split split_karpathy:test",
        ),
        (
            "train_ldm", "", ["train", "test"],
            "generate.py --run out/runs/ldm/default --prompts shapes-test --storage out --out out/sweeps/ldm/default",
        ),
        (
            "train_autoregressive", "", ["train", "validation"],
            "generate.py --run out/runs/autoregressive/default --prompts shapes-test"
            " --out out/sweeps/autoregressive/default",
        ),
        (
            "train_pixel_diffusion", "--variant best", ["train", "test", "test"],
            "generate.py --run out/runs/pixel_diffusion/default --prompts flickr8k:report-test --storage out --count 2"
            " --out out/sweeps/pixel_diffusion/default",
        ),
        ("train_pixel_diffusion", MINE, ["train", "test"], ""),
        (
            "train_vqvae", "--name mine", ["train"] * 99,
            "train_ldm.py --variant shapes --vqvae out/runs/vqvae/mine --storage out --name mine",
        ),
        (
            "train_vqvae", "--variant shapes-codes", ["train"] * 9,
            "train_autoregressive.py --variant shapes --vqvae out/runs/vqvae/default --storage out --batch-size 9",
        ),
        (
            "train_vqvae", f"{MINE} --encoder patches", ["train"] * 99,
            "train_autoregressive.py --variant smoke --vqvae out/runs/vqvae/default --storage out --dataset mine"
            " --no-fresh-scenes --exhaustive-captions 0",
        ),
        (
            "train_infinity", "--stage tokenizer --name mine", ["train"] * 99,
            "train_infinity.py --variant shapes --image-tokenizer out/runs/infinity_tokenizer/mine --storage out"
            " --name mine",
        ),
        (
            "train_infinity", "--variant smoke", ["train", "test"],
            "generate.py --run out/runs/infinity/default --prompts shapes-test --storage out"
            " --out out/sweeps/infinity/default",
        ),
    ],
)  # fmt: skip
def test_what_follows_a_training(
    file: str, flags: str, splits: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = trained(file, flags, splits)
    assert shlex.join(words) == expected
    if words:
        parse(f"jobs/{words[0]}", words[1:])


def test_results_of_an_earlier_run_are_left_alone(tmp_path: Path) -> None:
    for name in ("default", "default-2"):
        (tmp_path / "captions" / "resnet_captioner" / name).mkdir(parents=True)
        (tmp_path / "captions" / "resnet_captioner" / name / "sweep.json").touch()
        (tmp_path / "runs" / "ldm" / name).mkdir(parents=True)
        (tmp_path / "runs" / "ldm" / name / "recipe.json").touch()
    captions = trained("train_resnet_captioner", "", ["train", "validation"], tmp_path)
    assert captions[-2:] == ["--out", f"{tmp_path}/captions/resnet_captioner/default-3"]
    assert trained("train_vqvae", "", ["train"] * 99, tmp_path)[-2:] == ["--name", "default-3"]


def test_captions_and_images_are_scored_for_a_run_without_scores(tmp_path: Path) -> None:
    tiny.write_dataset(Storage(str(tmp_path)))
    run, out = tmp_path / "runs" / "resnet_captioner" / "a", str(tmp_path / "out")
    images = str(tmp_path / "data" / "tiny")
    scored = ["evaluate.py", "captions", "--predictions", f"{out}/captions.csv", "--storage", str(tmp_path)]
    scored += ["--dataset", "tiny"]
    of_split, of_run = ["--split", "split:test"], ["--run", str(run)]
    drawn = ["evaluate.py", "shapes", "--sweep", out]
    assert after_captioning(str(run), images, "split:test", out, 0) == [*scored, *of_split, *of_run]
    assert after_captioning(str(run), images, "split:test", out, 1) == [*scored, *of_run], "one was left out"
    assert after_captioning(str(run), str(tmp_path), None, out, 0) == [], "images without captions"
    assert after_generating(f"{run}/", "shapes-test", out) == [*drawn, *of_run]
    assert after_generating(str(run), "prompts.txt", out) == []
    scores = tmp_path / "scores" / "resnet_captioner" / "a.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(json.dumps({}))
    assert after_captioning(str(run), images, None, out, 0) == scored
    assert after_generating(str(run), "shapes-test", out) == drawn
    for words in (scored, drawn):
        parse(f"jobs/{words[0]}", words[1:])


@pytest.mark.parametrize(
    ("runtime_env", "submit"),
    [({"working_dir": "gcs://_ray_pkg_01.zip"}, "ray job submit --working-dir . -- "), ({}, "ray job submit -- ")],
)
def test_after_a_submitted_job_it_is_submitted(
    runtime_env: dict[str, str], submit: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env, "metadata": {}}))
    say_next(["generate.py", "--out", "/out"])
    line = capsys.readouterr().out
    assert line.startswith(f"next: {submit}")
    assert line.endswith("python jobs/generate.py --out /out\n")


def test_it_can_be_pasted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    say_next([])
    say_next(["caption.py", "--out", "my out; $HOME"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("python jobs/caption.py --out 'my out; $HOME'")
    monkeypatch.chdir(tmp_path)
    say_next(["caption.py"])
    assert Path(shlex.split(capsys.readouterr().out)[2]).is_file(), "from elsewhere, too"
