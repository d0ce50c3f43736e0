"""The jobs of the Q-Former, alone and before a language model: each trains without a network and captions."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file

from jobs import train_qformer, train_qformer_llm
from mmcore.data.prepared import prepared_images
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner

FLAGS = ["--variant", "smoke", "--dataset", "tiny", "--split", "split", "--num-threads", "1", "--max-steps", "4"]


@pytest.mark.parametrize(
    ("job", "saved"),
    [
        (train_qformer, {"encoder", "image_norm", "qformer", "heads", "log_scale"}),
        (train_qformer_llm, {"encoder", "bridge"}),
    ],
)
def test_it_trains_and_captions(call_job: Callable[..., Any], tmp_path: Path, job: ModuleType, saved: set[str]) -> None:
    storage = Storage(str(tmp_path / "out"))
    tiny.write_dataset(storage)
    call_job(job.main, *FLAGS, "--storage", storage)
    run = storage / "runs" / job.__name__.removeprefix("jobs.train_") / "default"
    tiny.no_pickles(run)
    names = {name.split(".")[0] for name in load_file(Path(run.uri) / "model" / "model.safetensors")}
    assert names <= saved
    assert {"encoder"} < names

    captioner = open_captioner(run.uri).load()
    data = dict(prepared_images(storage, "tiny"))
    pixels = pixels_from_bytes(list(data.values())[:3], captioner.image_size, list(data)[:3])
    together = captioner.caption(pixels, captioner.options)
    alone = [captioner.caption(pixels[row : row + 1], captioner.options)[0] for row in range(3)]
    assert together == alone
