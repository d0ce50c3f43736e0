"""mmcore/trained/image_encoder.py: a run gets the encoder that it was trained on, or none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import write_resnet

from mmcore.errors import InputError
from mmcore.frozen.vision import FrozenVisionEncoder
from mmcore.storage import Storage
from mmcore.trained.image_encoder import encoder_name, load_encoder


def test_a_run_that_trained_its_own_encoder_takes_none(tmp_path: Path) -> None:
    scratch = SimpleNamespace(encoder="scratch")
    assert encoder_name(scratch, None) is None
    assert load_encoder(None, Storage(str(tmp_path)), SimpleNamespace(), "cpu") is None  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^--encoder 'some': this run trained its own encoder; leave the flag out$"):
        encoder_name(scratch, "some")


def test_the_encoder_must_be_that_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(write_resnet(tmp_path / "resnet"))
    recipe, run = SimpleNamespace(encoder="some/model", image_size=32), Storage(str(tmp_path))
    assert encoder_name(recipe, None) == "some/model"
    assert encoder_name(recipe, "resnet") == folder, "absolute"
    fingerprint = FrozenVisionEncoder(folder, 32).fingerprint()
    file: Any = SimpleNamespace(recipe=recipe, facts=SimpleNamespace(encoder_fingerprint=fingerprint))
    encoder = load_encoder(folder, run, file, "cpu")
    assert encoder is not None
    assert encoder.fingerprint() == fingerprint
    file.facts.encoder_fingerprint = "of another"
    with pytest.raises(InputError, match=r"^--encoder .*: .* was trained on another encoder; name that one$"):
        load_encoder(folder, run, file, "cpu")
