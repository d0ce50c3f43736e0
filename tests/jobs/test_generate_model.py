"""jobs/generate.py --model: a sweep of a pipeline of diffusers, plain and with an adapter."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_runs
import torch

from jobs.generate import GenerateSettings, generate
from jobs.runtime.model_flags import with_run
from mmcore.errors import InputError
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.pipeline_options import PipelineOptions
from mmcore.generators.sdxl import write_tiny
from mmcore.trained.generator import open_generator


def test_half_precision_of_a_run_is_refused(tmp_path: Path) -> None:
    run = tiny_runs.write_pixel_run(tmp_path / "runs" / "pixel_diffusion" / "a")
    settings = GenerateSettings(str(run), "shapes-test", str(tmp_path / "out"), count=1, dtype="float16")
    with pytest.raises(InputError, match="--dtype float16: is for pipelines of diffusers"):
        generate(settings, DiffusionOptions(steps=2))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--dtype float16: a run computes in float32 or bfloat16"):
        open_generator(str(run)).load(dtype=torch.float16)


def test_model_and_revision_are_one_source(tmp_path: Path) -> None:
    assert with_run(["--run", "out/runs/ldm/x"]) == ["--run", "out/runs/ldm/x"]
    assert with_run(["--model", "a/b"])[-2:] == ["--run", "hf://a/b"]
    assert with_run(["--model", "a/b", "--revision", "123"])[-2:] == ["--run", "hf://a/b@123"]
    for argv, problem in [
        (["--run", "x", "--model", "y"], "--run x and --model y: give one of them"),
        (["--revision", "1"], "--revision 1: is for --model"),
        (["--model", str(tmp_path)], "no model_index.json in this folder"),
    ]:
        with pytest.raises(InputError, match=problem):
            with_run(argv)


@pytest.mark.usefixtures("ray_local", "one_thread")
def test_a_sweep_of_a_pipeline_is_finished_and_goes_by_its_files(tmp_path: Path) -> None:
    write_tiny(str(tmp_path / "sdxl"))
    (tmp_path / "p.txt").write_text("a dog\na cat\na red house\n")
    out = tmp_path / "out"
    settings = GenerateSettings(str(tmp_path / "sdxl"), str(tmp_path / "p.txt"), str(out), batch_size=2, num_threads=1)
    summary = generate(settings, PipelineOptions(steps=2))
    assert summary["num_images"] == 3
    rows = pq.read_table(out / "manifest").to_pylist()
    assert [row["prompt"] for row in rows] == ["a dog", "a cat", "a red house"]
    plan = json.loads((out / "sweep.json").read_text())["settings"]
    assert plan["steps"] == 2
    assert plan["sampler"] == "dpmsolver++"
    assert len(plan["files_sha256"]) == 64
    write_tiny(str(tmp_path / "sdxl"), seed=1)
    with pytest.raises(InputError, match="files_sha256"):
        generate(settings, PipelineOptions(steps=2))
