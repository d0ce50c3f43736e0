"""Checkpoints: saved tensors are restored, and damaged folders do not load."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mmcore import checkpoint
from mmcore.errors import InputError


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.output = nn.Linear(width, 5)
        self.output.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def saved(folder: Path) -> tuple[Model, torch.optim.Optimizer, Path]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model.output(model.embedding(torch.tensor([0, 1]))).square().sum().backward()
        optimizer.step()
    tensors = {"weights": checkpoint.trainable_state(model), "optimizer": checkpoint.optimizer_state(optimizer)}
    checkpoint.save(folder, tensors, {"progress": {"step": 3}})
    return model, optimizer, folder


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model, optimizer, folder = saved(tmp_path / "c")
    tensors, state = checkpoint.load(folder, "here")
    assert state == {"progress": {"step": 3}}
    # Tied weights are saved once, frozen ones never.
    assert tensors["weights"].keys() == {"embedding.weight", "output.bias"}
    other = Model()
    checkpoint.load_trainable(other, tensors["weights"], "here")
    assert torch.equal(other.output.weight, model.embedding.weight)
    assert other.output.weight is other.embedding.weight
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1, fused=True)
    checkpoint.load_optimizer(again, tensors["optimizer"])
    mine, theirs = checkpoint.optimizer_state(again), checkpoint.optimizer_state(optimizer)
    assert mine.keys() == theirs.keys()
    assert {name.partition(".")[2] for name in mine} == {"step", "exp_avg", "exp_avg_sq"}
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])
        assert value.dtype == theirs[name].dtype
    assert sorted(path.name for path in folder.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]


def test_moments_come_back_in_the_layout_of_their_weight() -> None:
    """Fused Adam reads weights and moments in memory order.

    Row-major moments of a channels-last weight would silently be mixed up.
    """

    def moved(resume: bool) -> torch.Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        for step in range(4):
            weight.grad = torch.randn_like(weight) * (step + 1)
            if resume and step == 2:
                state = {name: value.contiguous() for name, value in checkpoint.optimizer_state(optimizer).items()}
                optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
                checkpoint.load_optimizer(optimizer, state)
            optimizer.step()
        return weight.detach()

    assert torch.equal(moved(resume=True), moved(resume=False))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, change_a_byte, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_does_not_load(tmp_path: Path, name: str, damage) -> None:
    _, _, folder = saved(tmp_path / "c")
    damage(folder / name)
    with pytest.raises(InputError) as caught:
        checkpoint.load(folder, "runs/x")
    message = str(caught.value)
    assert message.startswith("runs/x: ")
    assert name in message
    assert "\n" not in message
    assert re.search(r"--fresh|--name", message), "it says what to do"


def test_the_place_in_the_data_is_guarded_too(tmp_path: Path) -> None:
    """A state.json that still parses but has another step would resume at the wrong place."""
    _, _, folder = saved(tmp_path / "c")
    record = json.loads((folder / "state.json").read_text())
    record["content"]["progress"]["step"] = 4
    (folder / "state.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        checkpoint.load(folder, "runs/x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("output.bias"), ["missing", "output.bias"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["unknown", "extra"]),
        (lambda state: state.update({"output.bias": torch.zeros(7)}), ["output.bias", "(7,)", "(5,)", "vocabulary"]),
    ],
)
def test_weights_of_another_recipe_are_named(change, named: list[str]) -> None:
    state = dict(checkpoint.trainable_state(Model()))
    change(state)
    model = Model()
    before = model.embedding.weight.clone()
    with pytest.raises(InputError) as caught:
        checkpoint.load_trainable(model, state, "runs/x")
    assert all(part in str(caught.value) for part in ["runs/x", *named])
    assert torch.equal(model.embedding.weight, before)
