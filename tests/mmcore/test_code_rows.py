"""Rows of codes: random choices depend on (seed, epoch, image_id) only, and fresh scenes on their index."""

from typing import Any

import numpy as np
import pytest
import tiny_diffusion
import torch
from PIL import Image

from mmcore.data.columns import Column
from mmcore.data.prepared import CaptionTable, shapes_table
from mmcore.data.shapes import ShapesSettings, make_scene, render_scene
from mmcore.data.shapes_captions import exhaustive_caption, scene_captions
from mmcore.errors import InputError
from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.code_rows import CodeRows, code_dtype
from mmcore.generators.fresh_scenes import FreshScenes
from mmcore.generators.prompt_rows import PromptIds
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder

SHAPES = ShapesSettings(num_train=40, num_validation=8, num_test=4, image_size=64, seed=3, max_objects=2)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> TrainedVQVAE:
    """Images of 32² pixels; the scenes are rendered with 64²."""
    run = Storage(str(tmp_path_factory.mktemp("vqvae")))
    tiny_diffusion.write_vqvae_run(run)
    return open_autoencoder(run.uri).load()


@pytest.fixture(scope="module")
def table() -> CaptionTable:
    return shapes_table(SHAPES)


@pytest.fixture(scope="module")
def tokenizer(table: CaptionTable) -> PromptTokenizer:
    return PromptTokenizer.of_words([text for row in table.captions for text in row], 48)


def rows_of(
    table: CaptionTable, tokenizer: PromptTokenizer, fresh: FreshScenes | None = None, **changes: Any
) -> CodeRows:
    settings = {"captions_per_image": 5, "drop_text": 0.3, "flip": False, "seed": 0, **changes}
    codes = np.random.default_rng(0).integers(0, 64, (2, len(table.image_ids), 8, 8), dtype=np.uint8)
    # Not in the order of the dataset.
    views = [Column(tuple(reversed(table.image_ids)), view[::-1]) for view in codes[: 1 + settings["flip"]]]
    if fresh is not None:
        rows = table.validation_rows()
        views = [Column(tuple(table.image_ids[row] for row in rows), codes[0][rows])]
    return CodeRows(table, views, PromptIds(table.captions, tokenizer), fresh=fresh, **settings)


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def words(batch: dict[str, torch.Tensor], tokenizer: PromptTokenizer) -> list[str]:
    return [tokenizer.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]


def test_a_row_is_the_same_in_every_batch_and_another_in_every_epoch(
    table: CaptionTable, tokenizer: PromptTokenizer
) -> None:
    rows = rows_of(table, tokenizer, flip=True)
    order = np.random.default_rng(0).permutation(40)
    whole = rows.train_batch(order, 2)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in whole.items()} == {
        "codes": (torch.int64, (40, 64)),
        "input_ids": (torch.int64, (40, 48)),
    }
    for start in range(0, 40, 8):
        part = rows.train_batch(order[start : start + 8], 2)
        assert same(part, {name: value[start : start + 8] for name, value in whole.items()})
    plain = rows_of(table, tokenizer).train_batch(order, 2)
    mirrored = (plain["codes"] != whole["codes"]).any(1)
    assert 8 < mirrored.sum() < 32
    assert torch.equal(plain["input_ids"], whole["input_ids"]), "no setting moves another draw"
    again = rows.train_batch(order, 3)
    for name in whole:
        assert (again[name] != whole[name]).any(1).sum() > 8, name
    assert 4 <= words(whole, tokenizer).count("") <= 20, "0.3 of the captions are dropped"


def test_validation_rows_have_their_first_caption(table: CaptionTable, tokenizer: PromptTokenizer) -> None:
    rows = rows_of(table, tokenizer, flip=True, drop_text=0.9)
    batch = rows.validation_batch(np.arange(8))
    chosen = rows.validation.tolist()
    assert same(batch, rows.validation_batch(np.arange(8)))
    assert torch.equal(batch["input_ids"], rows.prompts.batch(chosen, [0] * 8)["input_ids"])
    expected = np.random.default_rng(0).integers(0, 64, (2, 52, 8, 8), dtype=np.uint8)[0][chosen]
    np.testing.assert_array_equal(batch["codes"], expected.reshape(8, 64))


def test_codes_take_the_smallest_integers_that_hold_them() -> None:
    assert [str(code_dtype(number)) for number in (2, 256, 257, 65_536, 65_537)] == [
        "uint8", "uint8", "uint16", "uint16", "uint32"
    ]  # fmt: skip


def test_views_of_other_images_are_refused(table: CaptionTable, tokenizer: PromptTokenizer) -> None:
    column = rows_of(table, tokenizer).views[0]
    views = [Column(tuple(ids), column) for ids in (table.image_ids, reversed(table.image_ids))]
    with pytest.raises(InputError, match="have different images"):
        CodeRows(
            table, views, PromptIds(table.captions, tokenizer), captions_per_image=1, drop_text=0, flip=True, seed=0
        )


# -- fresh scenes --------------------------------------------------------------------------------------------------


def fresh_rows(
    table: CaptionTable, tokenizer: PromptTokenizer, autoencoder: TrainedVQVAE, exhaustive: float = 0.0, **changes: Any
) -> CodeRows:
    fresh = FreshScenes(
        SHAPES,
        autoencoder.codes,
        tokenizer,
        output="codes",
        image_size=autoencoder.image_size,
        captions_per_image=5,
        exhaustive_captions=exhaustive,
    )
    return rows_of(table, tokenizer, fresh, **changes)


def test_each_epoch_goes_on_with_scenes_that_none_before_had(
    table: CaptionTable, tokenizer: PromptTokenizer, autoencoder: TrainedVQVAE
) -> None:
    rows = fresh_rows(table, tokenizer, autoencoder, drop_text=0.0)
    for epoch in (0, 2):
        batch = rows.train_batch(np.array([5, 39]), epoch)
        for row, number in enumerate((40 * epoch + 5, 40 * epoch + 39)):
            scene = make_scene(3, "train", number, 2)
            image = np.array(render_scene(scene, 64).resize((32, 32), Image.Resampling.BICUBIC))
            assert torch.equal(batch["codes"][row], autoencoder.codes(np.stack([image] * 8))[0].flatten())
            captions = tokenizer(scene_captions(3, "train", number, scene))[0]
            assert (captions == batch["input_ids"][row]).all(1).any()
    validated = rows.validation_batch(np.arange(8))
    assert same(validated, rows_of(table, tokenizer).validation_batch(np.arange(8))), "as they were cached"


def test_a_fresh_scene_is_the_same_in_every_batch(
    table: CaptionTable, tokenizer: PromptTokenizer, autoencoder: TrainedVQVAE
) -> None:
    """Bit-identical latents, also for a single image and for any number of threads: the last bit can decide a code."""
    rows = fresh_rows(table, tokenizer, autoencoder, exhaustive=0.5)
    order = np.random.default_rng(0).permutation(40)[:16]
    whole = rows.train_batch(order, 1)
    for share in (1, 5, 8):
        parts = [rows.train_batch(order[start : start + share], 1) for start in range(0, 16, share)]
        assert same(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})
    assert len({tuple(codes.tolist()) for codes in whole["codes"]}) == 16


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_captions_is_exhaustive(
    share: float, table: CaptionTable, tokenizer: PromptTokenizer, autoencoder: TrainedVQVAE
) -> None:
    rows = fresh_rows(table, tokenizer, autoencoder, exhaustive=share, drop_text=0.2)
    got = words(rows.train_batch(np.arange(40), 1), tokenizer)
    full = [exhaustive_caption(3, "train", 40 + row, make_scene(3, "train", 40 + row, 2)) for row in range(40)]
    expected = words({"input_ids": tokenizer(full)[0]}, tokenizer)
    with_text = [row for row in range(40) if got[row]]
    assert 20 <= len(with_text) < 40
    # Usual captions are sometimes exhaustive too: with one object they name its position.
    exhaustive = sum(got[row] == expected[row] for row in with_text) / len(with_text)
    assert {0.0: exhaustive < 0.2, 0.5: 0.2 < exhaustive < 0.9, 1.0: exhaustive == 1}[share]
    plain = words(fresh_rows(table, tokenizer, autoencoder, drop_text=0.2).train_batch(np.arange(40), 1), tokenizer)
    assert [bool(text) for text in plain] == [bool(text) for text in got], "no setting moves another draw"
