"""The job of the pixel diffusion: with cached hidden states of a frozen text encoder, and from scratch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from jobs.train_pixel_diffusion import main
from mmcore.errors import InputError
from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.images import decode_image
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator

# `report` except for its sizes: frozen encoder, projection, no dropped texts.
FLAGS = [
    "--variant", "report", "--dataset", "tiny", "--split", "split", "--image-size", "16", "--channels", "32", "32",
    "--attention-levels", "1", "--num-heads", "2", "--layers-per-block", "1", "--projection-width", "24",
    "--sample-steps", "4", "--num-samples", "3", "--num-epochs", "2", "--batch-size", "8", "--num-threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with random weights and a tokenizer of the captions' words."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    captions = [text for row in range(40) for text in tiny.captions_of(row)]
    for name, data in PromptTokenizer.of_words(captions, 24).files().items():
        (folder / name).write_bytes(data)
    return str(folder)


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "pixel_diffusion" / name


def test_with_a_frozen_text_encoder(call_job: Callable[..., Any], storage: Storage, bert: str, tmp_path: Path) -> None:
    call_job(main, *FLAGS, "--text-encoder", bert, "--storage", storage, "--name", "first")
    run_ = run_folder(storage, "first")
    facts: dict[str, Any] = json.loads(run_.read("recipe.json"))
    assert facts["text_inputs"]["width"] == 16
    column = json.loads((storage / "/".join(facts["text"])).read("_SUCCESS"))
    assert (column["shape"], column["dtype"], column["num_rows"]) == ([1, 24, 16], "float16", 48)
    tiny.no_pickles(run_)
    # Frozen weights do not change and are not saved.
    weights = load_file(Path(run_.uri) / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"text", "unet"}
    assert {name for name in weights if name.startswith("text.")} == {
        f"text.projection.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")
    }
    rows = [json.loads(line) for line in run_.read("metrics.jsonl").splitlines()]
    samples = [row["samples"] for row in rows if "samples" in row]
    assert len(samples) == 2
    grid = np.asarray(decode_image(run_.read(samples[0]["grid"]["image"]), name="grid"))
    assert grid.shape == (2 * 16 + 2, 2 * 16 + 2, 3)

    # The samples of the run, computed by the encoder itself instead of the fp16 cache.
    generator = open_generator(run_.uri).load()
    assert generator.size == (16, 16)
    assert generator.options == DiffusionOptions(guidance=1.0)
    images = generator.generate(["a red square"] * 2, [1, 2], DiffusionOptions(steps=4, guidance=1.0))
    assert images.shape == (2, 16, 16, 3)
    with pytest.raises(InputError, match="guidance is not possible"):
        generator.generate(["a red square"], [1], DiffusionOptions(steps=4, guidance=2.0))
    # Another encoder would silently give other images.
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(bert).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    open_generator(run_.uri, text_encoder=str(other)).load()
    changed = {name: value + 1 for name, value in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="is not the text encoder of the training"):
        open_generator(run_.uri, text_encoder=str(other)).load()


@pytest.mark.nightly  # test_train_ldm.py trains one jointly
def test_with_a_text_encoder_that_is_trained_along(call_job: Callable[..., Any], storage: Storage) -> None:
    """The smoke variant with patches of pixels like `shapes`. It needs only the data."""
    flags = ["--variant", "smoke", "--patch-size", "2", "--num-epochs", "2", "--max-steps", "6"]
    call_job(main, *flags, "--dataset", "tiny", "--split", "split", "--storage", storage, "--name", "along")
    run_ = run_folder(storage, "along")
    tiny.no_pickles(run_)
    weights = load_file(Path(run_.uri) / "model" / "model.safetensors")
    assert any(name.startswith("text.encoder.") for name in weights), sorted(weights)[:5]
    history = [json.loads(line) for line in run_.read("metrics.jsonl").splitlines()]
    assert history[-1]["step"] == 6
    assert np.isfinite(history[-1]["validation_loss"])
    generator = open_generator(run_.uri).load()
    images = generator.generate(["a red square"], [1], DiffusionOptions(steps=4, guidance=2.0))
    assert images.shape == (1, *generator.size, 3)
