"""The frozen encoder runs once over the images, also for later jobs."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_diffusion
import tiny_tokenizer
import torch
from transformers import BertConfig, BertModel, MobileNetV2Config, MobileNetV2Model

from jobs.prepare import PrepareSettings, prepare
from jobs.runtime.blocks import blocks_of_rows
from jobs.runtime.encoders import AutoencoderOutput, EncodeImages
from jobs.runtime.features import (
    CachedColumn,
    cached_autoencoder_column,
    cached_column,
    cached_image_column,
    cached_text_column,
    read_null,
)
from mmcore.data.columns import VALUE, TensorSpec, column_table, open_column
from mmcore.data.prepared import read_captions
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_rows
from mmcore.errors import InputError
from mmcore.frozen.text import FrozenTextEncoder, PromptTokenizer
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder, pixels_from_bytes
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder, open_tokenizer

pytest_plugins = ("sweep_fixtures",)

SHAPES = ShapesSettings(num_train=70, num_validation=10, num_test=12, image_size=32)
NUM_IMAGES = 92


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny convolutional encoder in Hugging Face format, with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.1, finegrained_output=False, depth_divisible_by=2)
    MobileNetV2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def storage(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    prepare(PrepareSettings(dataset="shapes", storage=storage.uri, shapes=SHAPES))
    return storage


def part_times(folder: Storage) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(Path(folder.uri, "parts").glob("*.parquet"))}


def test_the_encoder_runs_once(
    storage: Storage,
    encoder_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "calls"

    class CountedEncoder(EncodeImages):
        """Counts the images that the encoder sees in the worker."""

        def __call__(self, rows: dict[str, Any]) -> pa.Table:
            with open(log, "a") as file:
                file.write(f"{len(rows['image'])}\n")
            return super().__call__(rows)

    def num_encoded() -> int:
        return sum(map(int, log.read_text().split()))

    monkeypatch.setattr("jobs.runtime.features.EncodeImages", CountedEncoder)
    first = cached_image_column(storage, "shapes", encoder=encoder_folder, image_size=32)
    assert first.encoded_now == NUM_IMAGES == num_encoded()
    times = part_times(first.folder)

    again = cached_image_column(storage, "shapes", encoder=encoder_folder, image_size=32)
    assert (again.encoded_now, again.folder) == (0, first.folder)
    # The same weights in another folder are the same encoder, as the key hashes the content.
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(encoder_folder).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert cached_image_column(storage, "shapes", encoder=str(copy), image_size=32).encoded_now == 0
    assert num_encoded() == NUM_IMAGES
    assert part_times(first.folder) == times

    capsys.readouterr()
    mirrored = cached_image_column(storage, "shapes", encoder=encoder_folder, image_size=32, flip=True, num_views=2)
    assert f"encode shapes, view 2 of 2, mirrored, with {encoder_folder}: " in capsys.readouterr().err
    assert mirrored.encoded_now == NUM_IMAGES == num_encoded() - NUM_IMAGES
    assert mirrored.folder != first.folder


def test_an_interrupted_encoding_goes_on(storage: Storage, encoder_folder: str, tmp_path: Path) -> None:
    done = cached_image_column(storage, "shapes", encoder=encoder_folder, image_size=32)
    times = part_times(done.folder)
    assert len(times) > 1
    lost = sorted(times)[-1]
    done.folder.delete("_SUCCESS")
    done.folder.delete(f"parts/{lost}")
    # With another name, as on another machine.
    renamed = shutil.copytree(encoder_folder, tmp_path / "renamed")
    resumed = cached_image_column(storage, "shapes", encoder=str(renamed), image_size=32)
    assert 0 < resumed.encoded_now < NUM_IMAGES
    assert {name: time for name, time in part_times(done.folder).items() if name != lost} == {
        name: time for name, time in times.items() if name != lost
    }


def test_the_column_holds_what_the_encoder_says(storage: Storage, encoder_folder: str, tmp_path: Path) -> None:
    cached = cached_image_column(storage, "shapes", encoder=encoder_folder, image_size=32)
    column = open_column(cached.folder, tmp_path)
    rows = list(shapes_rows(SHAPES))
    assert list(column.image_ids) == [row["image_id"] for row in rows]
    pixels = pixels_from_bytes([row["image"] for row in rows[:5]], 32, ["x"] * 5)
    expected = FrozenVisionEncoder(encoder_folder, 32)(pixels).numpy()
    # fp16 has 11 bits: half a unit in the last place of values below 8 is 0.002.
    np.testing.assert_allclose(column.values[:5].astype(np.float32), expected, atol=0.004)

    some = [rows[3]["image_id"], rows[60]["image_id"]]
    part = open_column(cached.folder, tmp_path, only=some)
    assert list(part.image_ids) == some
    np.testing.assert_array_equal(part.values[1], column.values[60])


def test_pixels_for_an_encoder_that_is_trained(storage: Storage, tmp_path: Path) -> None:
    cached = cached_image_column(storage, "shapes", encoder=SCRATCH, image_size=32)
    column = open_column(cached.folder, tmp_path)
    assert (column.values.dtype, column.values.shape) == (np.uint8, (NUM_IMAGES, 32, 32, 3))
    row = next(iter(shapes_rows(SHAPES)))
    np.testing.assert_array_equal(column.values[0], pixels_from_bytes([row["image"]], 32, ["x"])[0])


def test_unfinished_columns_are_not_read(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished column"):
        open_column(storage / "features" / "none", tmp_path)


def test_a_key_is_of_content(storage: Storage, encoder_folder: str) -> None:
    encoder = FrozenVisionEncoder(encoder_folder, 32)
    before = encoder.fingerprint()
    with torch.no_grad():
        weight = next(encoder.model.parameters())
        weight[(0,) * weight.ndim] += 1
    assert encoder.fingerprint() != before
    facts = json.loads((storage / "data" / "shapes").read("_SUCCESS"))
    assert len(facts["fingerprint"]) == len(hashlib.sha256().hexdigest())


def test_latents_and_codes_are_made_once_and_of_both_views(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, copy = Storage(str(tmp_path / "vqvae")), Storage(str(tmp_path / "copy"))
    for run in (vqvae, copy):
        tiny_diffusion.write_vqvae_run(run)
    fingerprint = open_autoencoder(vqvae.uri).load().fingerprint()

    def column_of(output: AutoencoderOutput, run: Storage, flip: bool) -> CachedColumn:
        return cached_autoencoder_column(storage, "shapes", output=output, run=run, fingerprint=fingerprint, flip=flip)

    columns = [column_of("latents", vqvae, flip) for flip in (False, True)]
    assert [column.encoded_now for column in columns] == [NUM_IMAGES, NUM_IMAGES]
    assert columns[0].folder != columns[1].folder
    monkeypatch.setattr(TrainedVQVAE, "load", lambda *_: pytest.fail("read to find what is cached"))
    assert column_of("latents", copy, False).encoded_now == 0, "the same weights elsewhere"
    monkeypatch.undo()

    autoencoder = open_autoencoder(vqvae.uri).load()
    rows = list(shapes_rows(SHAPES))[:5]
    pixels = pixels_from_bytes([row["image"] for row in rows], 32, ["x"] * 5)
    for column, view in zip(columns, (pixels, pixels[:, :, ::-1].copy()), strict=True):
        expected = autoencoder.encode(view).numpy()
        values = open_column(column.folder, tmp_path).values
        assert (values.dtype, values.shape) == (np.float16, (NUM_IMAGES, 4, 8, 8))
        np.testing.assert_allclose(values[:5].astype(np.float32), expected, atol=0.004)

    column = column_of("codes", vqvae, True)
    assert (column.encoded_now, column.tensors) == (NUM_IMAGES, {VALUE: TensorSpec("uint8", (8, 8))})
    codes = open_column(column.folder, tmp_path).values[:5]
    # With another batch size, rounding may choose another code.
    assert (codes == autoencoder.codes(pixels[:, :, ::-1].copy()).numpy()).mean() > 0.99


def test_latents_of_a_tokenizer_are_made_before_quantisation(storage: Storage, tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "tokenizer"))
    tiny_tokenizer.write_run(run)
    trained = open_tokenizer(run.uri).load()
    column = cached_autoencoder_column(
        storage, "shapes", output="latents", run=run, fingerprint=trained.fingerprint(), flip=True
    )
    assert column.tensors == {VALUE: TensorSpec("float16", trained.latent_shape)}
    pixels = pixels_from_bytes([row["image"] for row in shapes_rows(SHAPES)][:5], trained.image_size, ["x"] * 5)
    expected = trained.encode(pixels[:, :, ::-1].copy()).numpy()
    values = open_column(column.folder, tmp_path).values[:5].astype(np.float32)
    np.testing.assert_allclose(values, expected, atol=0.004)


def test_hidden_states_of_captions_are_made_once(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_captions(storage, "shapes", "split")
    captions = [text for row in table.captions for text in row]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=128, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    for name, data in PromptTokenizer.of_words(captions, 12).files().items():
        (tmp_path / "bert" / name).write_bytes(data)
    encoder = FrozenTextEncoder(str(tmp_path / "bert"), 12)
    make = lambda per_image: cached_text_column(
        storage, table, encoder=encoder, max_tokens=12, captions_per_image=per_image
    )
    column = make(2)
    assert (column.encoded_now, column.tensors) == (NUM_IMAGES, {VALUE: TensorSpec("float16", (2, 12, 16))})
    with monkeypatch.context() as patch:
        patch.setattr("jobs.runtime.features.run_sweep", lambda **asked: pytest.fail("encoded anew"))
        assert make(2).encoded_now == 0
        with pytest.raises(pytest.fail.Exception, match="encoded anew"):
            make(1)  # another number of captions is another column
    opened = open_column(column.folder, tmp_path)
    assert list(opened.image_ids) == table.image_ids
    for row in (0, 70, NUM_IMAGES - 1):
        expected = encoder(table.captions[row][:2]).numpy()
        np.testing.assert_allclose(opened.values[row].astype(np.float32), expected, atol=0.004)
    np.testing.assert_allclose(read_null(column.folder).astype(np.float32), encoder([""])[0].numpy(), atol=0.004)


class EncodeSeveral:
    """A ragged tensor of one length, and a number."""

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        tokens = [np.ones((length, 2), np.float16) for length in rows["length"]]
        sizes = np.array([[length, length] for length in rows["length"]], np.uint8)
        return column_table(rows["image_id"], {"tokens": tokens, "size": sizes})


@pytest.mark.usefixtures("without_ray")
def test_several_tensors_of_an_image_are_made_once(tmp_path: Path) -> None:
    make = lambda: cached_column(
        Storage(str(tmp_path)),
        what="encode",
        key=["several"],
        blocks=lambda: blocks_of_rows({"image_id": list("abc"), "length": [3, 1, 2]}, 2),
        worker_type=EncodeSeveral,
        worker_kwargs={},
        stall_timeout_s=None,
    )
    column = make()
    assert column.tensors == {"tokens": TensorSpec("float16", (None, 2)), "size": TensorSpec("uint8", (2,))}
    assert (column.encoded_now, make().encoded_now) == (3, 0)
    assert open_column(column.folder, tmp_path / "cache").tensors["tokens"].lengths.tolist() == [3, 1, 2]  # type: ignore[union-attr]
