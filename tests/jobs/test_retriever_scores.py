"""The scores of evaluate.py that a trained retriever gives, on untrained models."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_matcher
import torch

from jobs.evaluate import RetrievalScoreSettings, evaluate_retrieval
from mmcore.data.prepared import prepared_images, read_captions
from mmcore.errors import InputError
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.metrics.retrieval import RetrievalCounts
from mmcore.recipe import Retriever
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.retriever import open_retriever

SPLIT = "validation"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """15 images to rank, and no two captions alike: rounding would decide which of two equal ones is the better."""
    longer = {row: tiny.captions_of(row)[1] for row in range(17)}
    monkeypatch.setattr(tiny, "captions_of", lambda row: [longer[row], longer[row].removeprefix("there is ")])
    tiny.write_dataset(Storage(str(tmp_path)), num_train=2, num_validation=15)
    return Storage(str(tmp_path))


def rows_of(storage: Storage, retriever: Retriever) -> tuple[np.ndarray, list[list[str]]]:
    """The pixels and the captions of the images of `SPLIT`."""
    table, images = read_captions(storage, "tiny", "split"), dict(prepared_images(storage.uri, "tiny"))
    rows = table.rows(SPLIT)
    ids = [table.image_ids[row] for row in rows]
    pixels = pixels_from_bytes([images[image_id] for image_id in ids], retriever.image_size, ids)
    return pixels, [table.captions[row] for row in rows]


def itm_of_all(retriever: Any, pixels: np.ndarray, texts: list[str]) -> np.ndarray:
    """Log-odds of all pairs, one after the other and by another way than `Retriever.match`."""
    model, scores = retriever.model, np.zeros((len(pixels), len(texts)))
    with torch.inference_mode():
        for column, text in enumerate(texts):
            ids = torch.tensor([retriever.tokenizer.encode(text, retriever.max_length)])
            for row in range(len(pixels)):
                memory = model.memory(torch.from_numpy(pixels[row : row + 1]))
                scores[row, column] = model.match(memory, ids, torch.ones_like(ids))[0]
    return scores


def test_a_qformer_is_ranked_by_itc_and_then_by_itm(storage: Storage) -> None:
    run = tiny_matcher.write_qformer(Path(storage.uri))
    settings = RetrievalScoreSettings(run, storage.uri, "tiny", f"split:{SPLIT}", batch_size=4)
    retriever: Any = open_retriever(run).load()
    pixels, captions = rows_of(storage, retriever)
    texts, owners = [text for each in captions for text in each], np.repeat(np.arange(15), 2)
    cosines = torch.einsum("nqf,mf->nqm", retriever.image_features(pixels), retriever.text_features(texts))
    itc, itm = cosines.amax(dim=1).numpy(), itm_of_all(retriever, pixels, texts)
    assert itm.std() > 0.1, "pairs that are alike would have no order"
    # Texts of other lengths are padded, and the keys of the image are shared. Measured difference at most 2e-6.
    for row, scores in enumerate(retriever.match(pixels, [texts] * 15)):
        np.testing.assert_allclose(scores.numpy(), itm[row], rtol=0, atol=1e-4)

    alone = evaluate_retrieval(dataclasses.replace(settings, rerank=0))
    of_itc = RetrievalCounts.of(itc, owners).scores()
    assert {name: alone[name] for name in of_itc} == of_itc
    assert alone["ranked_by"] == "ITC"
    few, every = RetrievalCounts.reranked(itc, itm, 8, owners), RetrievalCounts.of(itm, owners)
    assert len({str(scores) for scores in (of_itc, few.scores(), every.scores())}) == 3, "what is ranked by matters"
    for num_best, ranked in ((8, few), (None, every)):
        result = evaluate_retrieval(dataclasses.replace(settings, rerank=num_best))
        expected = ranked.scores()
        assert {name: result[name] for name in expected} == expected
        assert (result["itc"], result["ranked_by"]) == (of_itc, f"ITC, then the best {num_best or 128} by ITM")
        assert (result["run"], result["settings"]["rerank"]) == (run, num_best)
        written = (storage / "scores" / "qformer").read(f"tiny-tiny-split-validation-rerank{num_best or 128}.json")
        assert json.loads(written) == result
    assert open_captioner(run).image_size == 32, "the same run captions"


def test_a_pair_has_nothing_to_rank_again_by(storage: Storage) -> None:
    run = tiny_matcher.write_pair(Path(storage.uri))
    settings = RetrievalScoreSettings(run, storage.uri, "tiny", f"split:{SPLIT}")
    assert evaluate_retrieval(settings)["ranked_by"] == "cosine"
    for change, message in (
        ({"rerank": 4}, "--rerank 4: .* compares features alone and has no ITM; leave the flag out"),
        ({"rerank": -1}, "--rerank -1: must be at least 0"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"captions_per_image": 0}, "--captions-per-image 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_retrieval(dataclasses.replace(settings, **change))
