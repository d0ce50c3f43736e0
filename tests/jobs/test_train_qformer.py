"""The jobs of the Q-Former, alone and before a language model: each trains without a network and captions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file

from jobs import train_qformer, train_qformer_llm
from mmcore.data.prepared import prepared_images
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner

FLAGS = ["--variant", "smoke", "--dataset", "tiny", "--split", "split", "--num-threads", "1", "--max-steps", "4"]


def captions_of(run: Storage, storage: Storage) -> dict[str, str]:
    """A caption of each of the first validation images, the same in a batch and alone."""
    captioner = open_captioner(run.uri).load()
    data = dict(prepared_images(storage, "tiny"))
    names = list(data)[40:44]
    pixels = pixels_from_bytes([data[name] for name in names], captioner.image_size, names)
    together = captioner.caption(pixels, captioner.options)
    assert together == [captioner.caption(pixels[row : row + 1], captioner.options)[0] for row in range(4)]
    return dict(zip(names, together, strict=True))


def test_both_stages_train_and_caption(call_job: Callable[..., Any], tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    tiny.write_dataset(storage)
    first, second = (storage / "runs" / name / "default" for name in ("qformer", "qformer_llm"))

    call_job(train_qformer.main, *FLAGS, "--storage", storage)
    tiny.no_pickles(first)
    names = load_file(Path(first.uri) / "model" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"encoder", "image_norm", "qformer", "heads", "log_scale"}
    captions_of(first, storage)

    begins = ["--bridge-weights", first.uri, "--lora", "2", "--precision", "fp32"]
    call_job(train_qformer_llm.main, *FLAGS, *begins, "--storage", storage)
    tiny.no_pickles(second)
    saved = load_file(Path(second.uri) / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"encoder", "bridge", "language_model"}
    adapters = {name: value for name, value in saved.items() if name.startswith("language_model")}
    assert all("lora_" in name for name in adapters), "a frozen weight was saved"
    assert all(value.any() for value in adapters.values()), "the second matrix of an adapter begins as zeros"
    # The reloaded captioner writes the captions of the trained one.
    rows = [json.loads(line) for line in Path(second.uri, "metrics.jsonl").read_text().splitlines()]
    samples = [row["samples"] for row in rows if "samples" in row][-1]
    captions = captions_of(second, storage)
    assert {name: captions[name] for name in samples} == samples
