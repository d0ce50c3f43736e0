"""The job of the SDXL LoRA: it trains beside a tiny SDXL, is opened as a generator, and its adapter is exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file

from jobs.export import ExportSettings, export
from jobs.train_sdxl_lora import main
from mmcore.errors import InputError
from mmcore.generators.pipeline_options import PipelineOptions
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator
from mmcore.trained.pipeline import LORA_FILE, TrainedPipeline

FLAGS = [
    "--variant",
    "smoke",
    "--dataset",
    "tiny",
    "--split",
    "split",
    "--num-threads",
    "1",
    "--captions-per-image",
    "2",
]


@pytest.mark.usefixtures("one_thread")
def test_it_trains_and_is_a_generator(
    call_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "out"))
    tiny.write_dataset(storage)
    refused = call_job(main, *FLAGS, "--storage", storage, "--stream", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    told = call_job(
        main, *FLAGS, "--storage", storage, "--max-steps", "4", "--lr", "0.01", "--flip", "--alpha", "10"
    ).stdout
    assert "of the adapters" in told
    run = storage / "runs" / "sdxl_lora" / "default"
    tiny.no_pickles(run)
    saved = load_file(Path(run.uri) / "model" / "model.safetensors")
    assert all("lora_" in name for name in saved), "frozen weights are not saved"
    generator: Any = open_generator(run.uri).load()
    how = PipelineOptions(steps=2)
    made = generator.generate(["a red square"], [1], how)
    base = TrainedPipeline(generator.model)
    assert np.abs(made.astype(int) - base.load().generate(["a red square"], [1], how)).max() > 0
    # The run stands for its adapter in another sweep, and so does its exported file.
    (tmp_path / LORA_FILE).write_bytes(generator.loras[0].read())
    loras = [run.uri, str(tmp_path)]
    for layout in ("diffusers", "kohya"):
        out = tmp_path / layout
        assert export(ExportSettings(run.uri, str(out), to=layout)) <= 1e-6  # type: ignore[arg-type]
        loras.append(str(out))
    for lora in loras:
        assert (open_generator(generator.model, loras=[lora]).load().generate(["a red square"], [1], how) == made).all()
    with pytest.raises(InputError, match="--to transformers: a run of sdxl_lora is for diffusers"):
        export(ExportSettings(run.uri, str(tmp_path / "other"), to="transformers"))
    with pytest.raises(InputError, match="--lora x: is for a pipeline of diffusers"):
        open_generator(run.uri, loras=["x"])
