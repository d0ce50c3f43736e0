"""Rows that match an image with one of its captions: what is drawn, and that it depends on the image alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from mmcore.captioners.matching_rows import MatchingRows
from mmcore.data.columns import Column
from mmcore.data.prepared import CaptionTable
from mmcore.errors import InputError
from mmcore.text import PAD_ID

NUM_TRAIN, NUM_VALIDATION = 40, 6


def table(**changes: Any) -> CaptionTable:
    """Rows have two captions. Row 3 has only one, and its first word is rare."""
    facts = tiny.table(NUM_TRAIN, NUM_VALIDATION)
    captions = [["lonely", *tiny.captions_of(row)][: 1 if row == 3 else 3] for row in range(len(facts.image_ids))]
    return dataclasses.replace(facts, **{"captions": captions, **changes})


def rows_of(facts: CaptionTable | None = None, num_views: int = 2, **changes: Any) -> MatchingRows:
    facts = facts or table()
    # Each view holds its own number and that of the image.
    views = [
        Column(tuple(facts.image_ids), np.array([[[view, row]] for row in range(len(facts.image_ids))], np.float16))
        for view in range(num_views)
    ]
    keywords = {"captions_per_image": 3, "max_length": 16, "seed": 7, **changes}
    return MatchingRows(facts, views, tiny.vocabulary(tiny.recipe(), facts), **keywords)


def caption_of(rows: MatchingRows, batch: dict[str, torch.Tensor], place: int) -> int:
    """The number of the caption that the batch holds."""
    row = int(batch["image_index"][place])
    ids = batch["input_ids"][place, 0]
    matches = [number for number in range(3) if torch.equal(rows.input_ids[row, number], ids)]
    assert len(matches) == 1
    assert batch["lengths"][place, 0] == rows.lengths[row, matches[0]] == int((ids != PAD_ID).sum())
    return matches[0]


def test_an_epoch_draws_views_captions_and_numbers_of_all_images() -> None:
    rows = rows_of()
    assert (rows.num_train, rows.num_validation) == (NUM_TRAIN, NUM_VALIDATION)
    batch = rows.train_batch(np.arange(NUM_TRAIN), 0)
    assert batch["input_ids"].shape == (NUM_TRAIN, 1, rows.input_ids.shape[2])
    assert batch["image_index"].tolist() == batch["images"][:, 0, 1].tolist() == list(range(NUM_TRAIN))
    captions = [caption_of(rows, batch, place) for place in range(NUM_TRAIN)]
    assert captions[3] == 0
    assert set(captions) == {0, 1, 2}
    assert set(batch["images"][:, 0, 0].tolist()) == {0, 1}
    uniforms = batch["uniforms"]
    assert uniforms.dtype == torch.float64
    assert uniforms.shape == (NUM_TRAIN, 2)
    assert len(set(uniforms.flatten().tolist())) == 2 * NUM_TRAIN
    assert 0 <= uniforms.min() < 0.1
    assert 0.9 < uniforms.max() < 1


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone() -> None:
    rows = rows_of()
    whole = rows.train_batch(np.arange(NUM_TRAIN), 1)
    mixed = np.random.default_rng(0).permutation(NUM_TRAIN)[:9]
    part = rows_of().train_batch(mixed, 1)
    for name, values in part.items():
        assert torch.equal(values, whole[name][mixed]), name
    # The same images in another order of the dataset.
    facts = table()
    turned = dataclasses.replace(
        facts, **{name: getattr(facts, name)[::-1] for name in ("image_ids", "captions", "splits")}
    )
    other = rows_of(turned).train_batch(np.arange(NUM_TRAIN), 1)
    for name in ("input_ids", "lengths", "uniforms"):
        assert torch.equal(other[name].flip(0), whole[name]), name
    for changed in (rows.train_batch(np.arange(NUM_TRAIN), 2), rows_of(seed=8).train_batch(np.arange(NUM_TRAIN), 1)):
        for name in ("images", "input_ids", "uniforms"):
            assert not torch.equal(changed[name], whole[name]), name


def test_validation_is_the_first_view_and_caption_each_time() -> None:
    rows = rows_of()
    batch, again = (rows.validation_batch(np.arange(NUM_VALIDATION)) for _ in range(2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert [caption_of(rows, batch, place) for place in range(NUM_VALIDATION)] == [0] * NUM_VALIDATION
    assert batch["images"][:, 0].tolist() == [[0, NUM_TRAIN + row] for row in range(NUM_VALIDATION)]
    assert len(set(batch["uniforms"].flatten().tolist())) == 2 * NUM_VALIDATION


def test_an_image_without_a_caption_is_refused() -> None:
    captions = table().captions
    captions[5] = []
    with pytest.raises(InputError, match="image 'image-5' and 0 others have no caption"):
        rows_of(table(captions=captions))
    # An image that is not used may have none.
    splits = table().splits
    splits[5] = "test"
    assert rows_of(table(captions=captions, splits=splits)).num_train == NUM_TRAIN - 1
