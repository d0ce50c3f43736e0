"""The model of a finished run: what is read back, and what is refused."""

from pathlib import Path

import pytest
import torch

from mmcore.errors import InputError
from mmcore.run_files import read_facts, read_weights, write_model
from mmcore.storage import Storage

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5])}


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uri = tmp_path.as_posix() if request.param == "local" else request.getfixturevalue("s3_server")
    return Storage(uri) / "runs" / "tiny" / "default"


def test_what_was_written_is_read(run: Storage) -> None:
    # A transposed view: safetensors refuses tensors that are not contiguous.
    write_model(run, WEIGHTS | {"turned": WEIGHTS["a.weight"].T}, {"recipe": "tiny"})
    facts = read_facts(run)
    assert facts["recipe"] == "tiny"
    weights = read_weights(run, facts)
    assert weights.keys() == {"a.weight", "b", "turned"}
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())
    assert torch.equal(weights["turned"], WEIGHTS["a.weight"].T)


def test_an_unfinished_run_is_refused(run: Storage) -> None:
    with pytest.raises(InputError, match="no model/ there"):
        read_facts(run)


def test_what_to_name_instead_is_said(run: Storage) -> None:
    write_model(run, WEIGHTS, {"recipe": "tiny"})
    with pytest.raises(InputError, match="name the folder that holds it"):
        read_facts(run / "model")
    with pytest.raises(InputError, match=r"name a finished run, .*runs/tiny has: default"):
        read_facts(run.parent / "defualt")
    (run.parent / "begun").write("recipe.json", b"{}")
    with pytest.raises(InputError, match="not finished; give its training command again"):
        read_facts(run.parent / "begun")
    with pytest.raises(InputError, match="name a finished run, STORAGE/runs/RECIPE/NAME"):
        read_facts(Storage("/no-such-folder"))


def test_weights_that_are_not_the_named_ones_are_refused(run: Storage) -> None:
    write_model(run, WEIGHTS, {"recipe": "tiny"})
    facts = read_facts(run)
    data = run.read("model/model.safetensors")
    run.write("model/model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"not the weights that recipe.json names"):
        read_weights(run, facts)
    (run / "model").delete("model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        read_weights(run, facts)
