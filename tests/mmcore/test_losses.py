"""Several losses in one loop: their denominators, and a loss that compares all rows of the batch."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.distributed import first_row, gathered
from mmcore.errors import InputError
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings
from mmcore.seeding import permutation
from mmcore.training import RunHooks, Training

SETTINGS = TrainSettings(
    max_steps=3, batch_size=8, lr=1e-2, weight_decay=0.0, precision="fp64", log_every_steps=1, clip_grad_norm=None
)
WORDS_WEIGHT, PAIRS_WEIGHT = 0.5, 2.0


class Pairs:
    """16 pairs of vectors, each with a number to predict and up to three words. The second half has no words."""

    num_train, num_validation = 16, 8

    def train_batch(self, indices: np.ndarray, epoch: int) -> dict[str, Tensor]:
        random = np.random.default_rng(0).normal(size=(16, 11))
        rows = torch.from_numpy(random[indices])
        lengths = torch.from_numpy(np.where(indices < 8, indices % 4, 0))
        return {"a": rows[:, :4], "b": rows[:, 4:8], "words": rows[:, 8:], "lengths": lengths}

    def validation_batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return self.train_batch(indices, 0)

    def train_stream(self, epoch: int, rows_per_batch: int) -> None:
        return None


class Two(nn.Module):
    """A regression, whose loss is a mean over rows, and words, whose loss is a mean over words."""

    told = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"words_loss": batch["lengths"].sum() + self.told}

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        made, lengths = self.layer(batch["a"]), batch["lengths"]
        errors = (made - batch["words"]).square() * (torch.arange(3) < lengths[:, None])
        rows = (made.mean(1) - batch["b"].mean(1)).abs()
        near = Mean((rows < 0.5).sum(), len(rows))
        return Outputs(
            {"rows_loss": Loss(rows.sum(), len(rows)), "words_loss": Loss(errors.sum(), lengths.sum(), WORDS_WEIGHT)},
            {"near": near},
        )


class Contrastive(nn.Module):
    """A contrastive loss (InfoNCE) between the two vectors of each row, and a regression.

    One vector comes from a frozen layer, which DDP ignores.
    """

    whole_batch_losses = ("pairs_loss",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        a, b = F.normalize(self.a(self.frozen(batch["a"]))), F.normalize(self.b(batch["b"]))
        num = len(a)
        first = first_row(num) if self.training else 0
        all_a, all_b = (gathered(each) if self.training else each for each in (a, b))
        labels = first + torch.arange(num)
        pairs = sum(
            F.cross_entropy(each @ others.T / 0.2, labels, reduction="sum") for each, others in ((a, all_b), (b, all_a))
        )
        return Outputs(
            {"pairs_loss": Loss(pairs, num, PAIRS_WEIGHT), "rows_loss": Loss((a - batch["b"]).abs().sum(), num)}
        )


def trained(model: nn.Module, folder: Path, **changes: Any) -> Training:
    hooks = RunHooks(commit=lambda folder, metrics: None)
    training = Training(model, Pairs(), dataclasses.replace(SETTINGS, **changes), hooks, workdir=folder)
    training.run()
    return training


@pytest.mark.parametrize("parts", [1, 4])
def test_each_loss_is_divided_by_its_own_count(tmp_path: Path, parts: int) -> None:
    """Compare with one step on the whole batch, computed by hand. Of four micro-batches some have no word."""
    model, hand = Two(), Two().double()
    training = trained(model, tmp_path, max_steps=1, gradient_accumulation=parts)
    batch = Pairs().train_batch(permutation(16, SETTINGS.seed, 0)[:8], 0)
    losses, metrics, _ = hand(batch)
    rows, words = losses["rows_loss"].sum / 8, losses["words_loss"].sum / batch["lengths"].sum()
    (rows + WORDS_WEIGHT * words).backward()
    row = training.state.history[0]
    expected = {
        "loss": rows + WORDS_WEIGHT * words,
        "rows_loss": rows,
        "words_loss": words,
        "near": metrics["near"].sum / 8,
    }
    assert {name: row[name] for name in expected} == pytest.approx({name: v.item() for name, v in expected.items()})
    for mine, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert training.state.history[-1]["validation_words_loss"] > 0


def test_a_batch_without_a_word_trains_on_the_rest(tmp_path: Path) -> None:
    class Silent(Pairs):
        def train_batch(self, indices: np.ndarray, epoch: int) -> dict[str, Tensor]:
            batch = super().train_batch(indices, epoch)
            return {**batch, "lengths": torch.zeros_like(batch["lengths"])}

    training = Training(Two(), Silent(), SETTINGS, RunHooks(), workdir=tmp_path)
    training.run()
    row = training.state.history[0]
    assert row["loss"] == row["rows_loss"] > 0
    assert "words_loss" not in row


def test_counts_that_are_not_those_of_forward_are_found(tmp_path: Path) -> None:
    model = Two()
    model.told = 1
    with pytest.raises(AssertionError, match=r"words_loss is a sum over \d+ values, but"):
        trained(model, tmp_path)


def test_micro_batches_of_a_loss_over_the_whole_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"_accumulation 2: pairs_loss needs all rows .* --gradient-accumulation 1"):
        trained(Contrastive(), tmp_path, gradient_accumulation=2)


def train_as_worker(rank: int, port: int, folder: Path) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **ranks)
    torch.set_num_threads(1)
    unlike = Two()
    unlike.frozen = nn.Linear(2, 2).requires_grad_(False)
    unlike.frozen.weight.data.fill_(rank)
    with pytest.raises(InputError, match=r"frozen weight frozen\.weight differs between worker 1 and worker 0"):
        trained(unlike, folder)
    for model in (Two(), Contrastive()):
        training = trained(model, folder)
        assert training.world_size == 2
        if rank == 0:
            name = type(model).__name__
            (folder / f"{name}.json").write_text(json.dumps(training.state.history))
            torch.save(model.state_dict(), folder / f"{name}.pt")


@pytest.mark.process
def test_two_workers_agree_with_one(tmp_path: Path) -> None:
    """Workers have different numbers of words, and pairs are compared across workers."""
    from conftest import free_port

    torch.multiprocessing.spawn(train_as_worker, args=(free_port(), tmp_path), nprocs=2)
    for model in (Two(), Contrastive()):
        alone = trained(model, tmp_path)
        both = json.loads((tmp_path / f"{type(model).__name__}.json").read_text())
        for mine, theirs in zip(alone.state.history, both, strict=True):
            names = mine.keys() - {"seconds", "samples"}
            assert {name: mine[name] for name in names} == pytest.approx(
                {name: theirs[name] for name in names}, abs=1e-9
            )
        weights = torch.load(tmp_path / f"{type(model).__name__}.pt", weights_only=True)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)
