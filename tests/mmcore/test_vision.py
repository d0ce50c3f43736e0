"""mmcore/captioners/vision.py: a frozen encoder is loaded whole, quietly, or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification

from mmcore.captioners.vision import FrozenVisionEncoder
from mmcore.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny classifier with random weights, whose head is no part of an encoder."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_load_says_nothing_and_gives_tokens(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokens = FrozenVisionEncoder(str(folder), 32)(PIXELS)
    assert tokens.shape == (2, 16, 16)  # an eighth of the side with these two stages
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_an_error_and_not_random_ones(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "convolution" in name)
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 weights are missing"):
        FrozenVisionEncoder(str(folder), 32)


def test_what_decides_the_tokens_decides_the_fingerprint(folder: Path) -> None:
    before = FrozenVisionEncoder(str(folder), 32).fingerprint()
    assert FrozenVisionEncoder(str(folder), 32).fingerprint() == before
    assert FrozenVisionEncoder(str(folder), 64).fingerprint() != before
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert FrozenVisionEncoder(str(folder), 32).fingerprint() != before
