"""The model of a finished run: reading it back, and refusals."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.errors import InputError
from mmcore.run_files import RunFile, read_fields, read_weights, run_file_from_json, write_model
from mmcore.storage import Storage

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5])}


@dataclasses.dataclass(frozen=True)
class TinyRecipe:
    width: int = 2


@dataclasses.dataclass(frozen=True)
class TinyFacts:
    columns: tuple[str, ...]
    fingerprint: str | None = None


FILE = RunFile("tiny", "smoke", TinyRecipe(3), TinyFacts(("a", "b")), "commit")


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uri = tmp_path.as_posix() if request.param == "local" else request.getfixturevalue("s3_server")
    return Storage(uri) / "runs" / "tiny" / "default"


def test_what_was_written_is_read(run: Storage) -> None:
    # A transposed view, as safetensors refuses tensors that are not contiguous.
    write_model(run, WEIGHTS | {"turned": WEIGHTS["a.weight"].T}, FILE)
    fields, where = read_fields(run)
    read = run_file_from_json(fields, TinyRecipe, TinyFacts, where)
    assert dataclasses.replace(read, weights_sha256="") == FILE
    assert read.written == fields
    weights = read_weights(run, read.weights_sha256)
    assert weights.keys() == {"a.weight", "b", "turned"}
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())
    assert torch.equal(weights["turned"], WEIGHTS["a.weight"].T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"columns": ["a"], "colums": ["b"]}, "^here: written by another version .* unknown fields colums; go on with"),
        ({}, "^here: missing fields columns"),
        (
            {"columns": ["a"], "settings": {"depth": 1}},
            "^here: written by another version of the code, with unknown fields depth",
        ),
    ],
)
def test_facts_are_read_strictly(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_file_from_json({"recipe": "tiny", **fields}, TinyRecipe, TinyFacts, "here")


def test_an_unfinished_run_is_refused(run: Storage) -> None:
    with pytest.raises(InputError, match="no such run; name a finished run, STORAGE/runs"):
        read_fields(run)


def test_what_to_name_instead_is_said(run: Storage) -> None:
    write_model(run, WEIGHTS, FILE)
    with pytest.raises(InputError, match="name the folder that holds it"):
        read_fields(run / "model")
    with pytest.raises(InputError, match=r"no such run; did you mean default\? .*runs/tiny has: default$"):
        read_fields(run.parent / "defualt")
    with pytest.raises(InputError, match=r"no such run; name a finished run, .*runs/tiny has: default$"):
        read_fields(run.parent / "x")
    (run.parent / "empty").write("notes.txt", b"")
    with pytest.raises(InputError, match=r"no model/ there, so this is no run; name .*/tiny has: default$"):
        read_fields(run.parent / "empty")
    (run.parent / "begun").write("recipe.json", b"{}")
    with pytest.raises(InputError, match="not finished; repeat its training command"):
        read_fields(run.parent / "begun")
    with pytest.raises(InputError, match="name a finished run, STORAGE/runs/RECIPE/NAME"):
        read_fields(Storage("/no-such-folder"))


def test_weights_that_are_not_the_named_ones_are_refused(run: Storage) -> None:
    write_model(run, WEIGHTS, FILE)
    fields, _ = read_fields(run)
    data = run.read("model/model.safetensors")
    run.write("model/model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"SHA-256 differs from the one in recipe.json"):
        read_weights(run, fields["weights_sha256"])
    (run / "model").delete("model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        read_weights(run, fields["weights_sha256"])
