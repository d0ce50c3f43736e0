"""Code that comes with weights is not run, and nobody is asked whether to run it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from mmcore.errors import InputError
from mmcore.frozen.hub import not_found, say_fetch
from mmcore.frozen.pretrained import absolute_folder, load_frozen, read_weights
from mmcore.frozen.text import PromptTokenizer
from mmcore.storage import Storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and a tokenizer that need their own code to load."""
    made, ran = tmp_path / "model", tmp_path / "ran"
    made.mkdir()
    (made / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    config = {"model_type": "of-its-own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (made / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (made / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (made / "tokenizer.json").write_text("{}")
    return made


def load_model(folder: Path) -> Any:
    from transformers import AutoModel

    return load_frozen(str(folder), lambda config: AutoModel, flag="--encoder", what="model")


@pytest.mark.parametrize(
    "load",
    [
        load_model,
        lambda folder: PromptTokenizer.from_name(str(folder), 8),
        lambda folder: PromptTokenizer.read(Storage(str(folder)), 8),
    ],
    ids=["model", "tokenizer by name", "tokenizer of a run"],
)
def test_code_of_others_is_refused_unasked(
    load: Callable[[Path], Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises((InputError, ValueError), match="custom code"):
        load(folder)
    assert not asked
    assert not (folder.parent / "ran").exists()


def test_a_folder_is_made_absolute_and_no_model_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("encoder", "scratch", "words"):
        (tmp_path / name).mkdir()
    names = ["encoder", "scratch", "words", "microsoft/resnet-18"]
    assert [absolute_folder(name) for name in names] == [str(tmp_path / "encoder"), *names[1:]]


def test_a_hub_out_of_reach_is_told_from_a_model_that_is_not_there() -> None:
    unreachable = r"^--tokenizer 'no/such': no .* cannot be reached \(HF_HUB_OFFLINE is set\); name a folder$"
    with pytest.raises(InputError, match=unreachable):
        PromptTokenizer.from_name("no/such", 8)
    with pytest.raises(InputError, match=unreachable.replace("tokenizer", "encoder")):
        load_model(Path("no/such"))
    error = OSError("not a valid model identifier")
    answer: Any = SimpleNamespace(headers={}, request=None)
    error.__cause__ = RepositoryNotFoundError("404", response=answer)
    assert "the hub of Hugging Face has no such model" in str(not_found("no/such", "--encoder", "model", error))
    with pytest.raises(InputError, match=r"or on the hub of Hugging Face \(Repo id must be"):
        load_model(Path("no/such/folder"))
    gone = r"^--tokenizer '/no/such/folder': no such folder; name the one where the tokenizer is now$"
    with pytest.raises(InputError, match=gone):
        PromptTokenizer.from_name("/no/such/folder", 8)


def test_weights_may_lie_beside_the_state_of_a_training(tmp_path: Path) -> None:
    path, weights = tmp_path / "x.pth", {"a": torch.ones(2)}

    def read(content: Any) -> dict[str, torch.Tensor]:
        torch.save(content, path)
        return read_weights(str(path), "--weights", inside=("outer", "inner"), what="a checkpoint")

    for content in (weights, {"outer": weights, "step": 3}, {"outer": {"inner": weights}}, {"inner": weights}):
        assert torch.equal(read(content)["a"], weights["a"])
    for other in ({"step": 3}, {"outer": [1.0]}, 3):
        with pytest.raises(InputError, match=r"x.pth': not a file of weights by name; name a checkpoint$"):
            read(other)


def test_only_what_is_fetched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say_fetch("some/model", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in (str(tmp_path), "no/such/folder"):
        say_fetch(name, "config.json")
    assert capsys.readouterr() == ("", "")
    say_fetch("some/model", "config.json")
    say_fetch("some/model", "model.safetensors", what="the weights of")
    told = capsys.readouterr().err.splitlines()
    assert told == [f"reading {what}some/model from the hub of Hugging Face" for what in ("", "the weights of ")]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--model"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    say_fetch("some/model", "config.json")
    assert capsys.readouterr().err == ""
