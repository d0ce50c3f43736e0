"""The job of the contrastive pair: it trains beside a frozen text encoder, is opened again, and is scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from jobs.evaluate import RetrievalScoreSettings, evaluate_retrieval
from jobs.train_clip import main
from mmcore.data.prepared import prepared_images, read_captions
from mmcore.errors import InputError
from mmcore.frozen.text import PromptTokenizer
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.metrics.retrieval import RetrievalCounts
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.retriever import open_retriever

FLAGS = ["--variant", "smoke", "--dataset", "tiny", "--split", "split", "--max-length", "16", "--num-threads", "1"]


def write_bert(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    captions = [text for row in range(40) for text in tiny.captions_of(row)]
    for name, data in PromptTokenizer.of_words(captions, 16).files().items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_it_trains_and_is_scored(call_job: Callable[..., Any], tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    tiny.write_dataset(storage)
    bert = write_bert(tmp_path / "bert")
    frozen = ["--text-encoder", bert, "--no-train-text-encoder", "--storage", storage]
    refused = call_job(main, *FLAGS, *frozen, "--stream", check=False)
    assert (refused.returncode, refused.stderr) == (1, "error: --stream: clip looks its rows up; leave the flag out\n")
    call_job(main, *FLAGS, *frozen, "--max-steps", "4")
    run = storage / "runs" / "clip" / "default"
    tiny.no_pickles(run)
    saved = {name.split(".")[0] for name in load_file(Path(run.uri) / "model" / "model.safetensors")}
    assert saved == {"image_encoder", "image_tower", "text_tower", "log_scale"}, "frozen weights are not saved"

    of_split = {"dataset": "tiny", "split": "split:validation"}
    result = evaluate_retrieval(RetrievalScoreSettings(run.uri, storage.uri, **of_split, batch_size=3))
    table = read_captions(storage, "tiny", "split")
    chosen = table.rows("validation")
    assert (result["num_images"], result["num_texts"]) == (len(chosen), 2 * len(chosen))
    written = storage / "scores" / "clip"
    assert json.loads(written.read("default-tiny-split-validation.json")) == result
    # All at once, instead of in batches of 3 that are padded to other lengths.
    retriever = open_retriever(run.uri).load()
    images = dict(prepared_images(storage.uri, "tiny"))
    ids = [table.image_ids[row] for row in chosen]
    pixels = pixels_from_bytes([images[image_id] for image_id in ids], retriever.image_size, ids)
    texts = retriever.text_features([text for row in chosen for text in table.captions[row]])
    similarity = (retriever.image_features(pixels)[:, 0] @ texts.T).numpy()
    owners = np.repeat(np.arange(len(chosen)), 2)
    assert {name: result[name] for name in result if "_to_" in name} == RetrievalCounts.of(similarity, owners).scores()

    # A frozen text encoder of other weights would give other features.
    write_bert(tmp_path / "bert", seed=1)
    with pytest.raises(InputError, match="this run was begun with another text encoder; name that one"):
        open_retriever(run.uri).load()
    with pytest.raises(InputError, match="recipe 'clip' is not of kind captioner"):
        open_captioner(run.uri)
