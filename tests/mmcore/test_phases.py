"""Several optimisers and statistics in one loop: a VQ-VAE with a revived codebook of moving averages, and a
discriminator.
"""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_vqvae
import torch
import torch.multiprocessing
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.errors import InputError
from mmcore.generators.autoencoder_training import DISCRIMINATOR, GENERATOR
from mmcore.generators.quantizer import Quantizer
from mmcore.generators.vqvae import VQVAETraining
from mmcore.losses import Outputs
from mmcore.optimization import Average, build_phases
from mmcore.recipe import TrainSettings
from mmcore.seeding import permutation
from mmcore.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")


def state_tensors(training: Training) -> dict[str, dict[str, Tensor]]:
    tensors = {"weights": checkpoint.trainable_state(training.model), "best": training.best}
    for phase in training.phases:
        tensors[phase.group] = checkpoint.optimizer_state(phase.optimizer)
    if training.ema is not None:
        tensors["ema"] = training.ema.weights
    return tensors


def assert_identical(mine: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> None:
    assert mine.keys() == theirs.keys()
    for group in mine:
        assert mine[group].keys() == theirs[group].keys()
        for name, value in mine[group].items():
            assert torch.equal(value, theirs[group][name]), f"{group} {name}"


BUFFERS = {f"vqvae.quantizer.{name}" for name in ("codebook", "ema_counts", "ema_sums", "ema_scatter")}


# -- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "starts"), [("fp32", (0, 1, 7)), ("bf16", (3,))])
def test_a_run_resumed_at_any_checkpoint_ends_bit_identical(
    tmp_path: Path, precision: str, starts: tuple[int, ...]
) -> None:
    """Before the discriminator's first step (checkpoint 3), after it, in the middle of an epoch and at its end."""
    recipe = tiny_vqvae.recipe(train={"ema_decay": 0.9, "gradient_accumulation": 2, "precision": precision})
    whole = tiny_vqvae.train(recipe, tmp_path / "whole")
    assert whole.training.state.step == 20
    steps = (3, 5, 6, 9, 10, 12, 15, 18, 20)
    assert [path.name for path in whole.checkpoints] == [f"step-{step:08d}" for step in steps]
    tensors, _ = checkpoint.load(whole.checkpoints[0], "")
    assert tensors.keys() == {"weights", "ema", "optimizer", "optimizer-discriminator"}
    assert tensors["weights"].keys() >= BUFFERS
    assert tensors["optimizer-discriminator"] == {}
    assert checkpoint.load(whole.checkpoints[1], "")[0]["optimizer-discriminator"]
    for start in (whole.checkpoints[index] for index in starts):
        folder = tmp_path / f"from-{start.name}"
        again = tiny_vqvae.train(recipe, folder, resume_from=start, model=tiny_vqvae.model_of(recipe, seed=9))
        assert_identical(state_tensors(again.training), state_tensors(whole.training))
        assert_identical({"kept": again.best}, {"kept": whole.best})
        mine, theirs = again.training.state.history, whole.training.state.history
        assert tiny.without_times(mine) == tiny.without_times(theirs)


# -- workers -------------------------------------------------------------------------------------------------------


def runs(folder: Path) -> list[Training]:
    """100 steps; and a few in micro-batches, with too few validation rows for a second worker."""
    train = {"precision": "fp64", "ema_decay": 0.9}
    long = tiny_vqvae.recipe(train={**train, "num_epochs": 20, "validate_every_epochs": 10})
    short = tiny_vqvae.recipe(train={**train, "gradient_accumulation": 2, "max_steps": 8})
    return [
        tiny_vqvae.train(long, folder / "long", num_validation=21).training,
        tiny_vqvae.train(short, folder / "short", num_validation=5).training,
    ]


def train_as_worker(rank: int, world_size: int, port: int, folder: Path) -> None:
    """One worker of a gloo group. It saves its final state."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    trainings = runs(folder / f"rank-{rank}")
    assert [training.world_size for training in trainings] == [world_size] * 2
    (folder / f"history-{rank}.json").write_text(json.dumps([training.state.history for training in trainings]))
    torch.save(state_tensors(trainings[0])["weights"], folder / f"weights-{rank}.pt")


@pytest.mark.process
def test_two_workers_agree_with_one_in_fp64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages and revival use sums of the whole batch, so the same codes die and are replaced."""
    from conftest import free_port

    revived: list[int] = []
    revive = Quantizer._revive

    def counted(self: Quantizer, step: int) -> None:
        before = self.ema_counts.clone()
        revive(self, step)
        if not torch.equal(before, self.ema_counts):
            revived.append(step)

    monkeypatch.setattr(Quantizer, "_revive", counted)
    alone = runs(tmp_path / "alone")
    torch.multiprocessing.spawn(train_as_worker, args=(2, free_port(), tmp_path), nprocs=2)
    mine, theirs = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in range(2))
    assert_identical({"weights": mine}, {"weights": theirs})
    largest = 0.0
    for training, history in zip(alone, json.loads((tmp_path / "history-0.json").read_text()), strict=True):
        assert len(history) == len(training.state.history) >= 8
        for a, b in zip(training.state.history, history, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"seconds", "samples"}:
                largest = max(largest, abs(a[name] - b[name]))
    assert largest <= 1e-9  # of every metric; measured 4.4e-13
    long = alone[0].state.history
    assert long[-1]["step"] == 100
    assert long[-1]["psnr"] > long[0]["psnr"] + 3
    # Otherwise no code was revived, and the comparison would show less.
    assert len(set(revived)) > 10


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole, cut = (
        tiny_vqvae.train(
            tiny_vqvae.recipe(train={"precision": "fp64", "gradient_accumulation": parts}), tmp_path / str(parts)
        ).training.state.history
        for parts in (1, 4)
    )
    for a, b in zip(whole, cut, strict=True):
        for name in ("loss", "psnr", "perplexity", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-9), (a["step"], name)
        if a["step"] > 4:
            assert a["discriminator_loss"] == pytest.approx(b["discriminator_loss"], rel=1e-9)


# -- what a step is ------------------------------------------------------------------------------------------------


def test_a_step_is_the_generators_and_then_the_discriminators(tmp_path: Path) -> None:
    """Compare with two Adams by hand, each with its own loss over the whole batch.

    The second uses the updated generator.
    """
    recipe = tiny_vqvae.recipe(
        discriminator_from_step=0,
        revive_below=0.0,
        train={
            "max_steps": 1,
            "precision": "fp64",
            "gradient_accumulation": 2,
            "warmup_steps": 0,
            "clip_grad_norm": 0.5,
        },
    )
    model = tiny_vqvae.model_of(recipe).double()
    hand = copy.deepcopy(model).train()
    batch = tiny_vqvae.rows_of(recipe).train_batch(permutation(40, recipe.train.seed, 0)[:8], 0)
    assert hand.active_phases(0) == (GENERATOR, DISCRIMINATOR)
    norms, losses = [], []
    for phase in hand.phases:
        parameters = hand.phase_parameters(phase)
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
        outputs = hand(batch, phase)
        mean = sum(loss.weight * loss.sum / 8 for loss in outputs.losses.values())
        gradients = torch.autograd.grad(mean, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        norms.append(nn.utils.clip_grad_norm_(parameters, 0.5).item())
        losses.append(mean.item())
        optimizer.step()
        if phase == GENERATOR:
            statistics = outputs.statistics
    hand.after_step(statistics, 0)

    row = tiny_vqvae.train(recipe, tmp_path, model=model).training.state.history[0]
    assert [row["loss"], row["discriminator_loss"]] == pytest.approx(losses, rel=1e-9)
    assert [row["grad_norm"], row["discriminator_grad_norm"]] == pytest.approx(norms, rel=1e-9)
    mine, theirs = checkpoint.trainable_state(model), checkpoint.trainable_state(hand)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-7, atol=1e-9, msg=name)


def test_the_discriminator_waits_for_its_step(tmp_path: Path) -> None:
    recipe = tiny_vqvae.recipe(train={"max_steps": 6, "checkpoint_every_steps": 1})
    model = tiny_vqvae.model_of(recipe)
    before = {name: value.clone() for name, value in checkpoint.trainable_state(model).items()}
    run = tiny_vqvae.train(recipe, tmp_path, model=model)
    for step, path in enumerate(run.checkpoints, 1):
        weights = checkpoint.load(path, "")[0]["weights"]
        moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
        judges = {name for name in weights if name.startswith("discriminator.")}
        if step <= 4:
            assert not moved & judges
            assert moved >= BUFFERS
        else:
            assert moved == weights.keys()
    rows = [row for row in run.training.state.history if "validation_loss" not in row]
    assert ["discriminator_loss" in row for row in rows] == [False] * 4 + [True] * 2
    assert ["adversarial_loss" in row for row in rows] == [False] * 4 + [True] * 2


def test_outputs_that_are_statistics_are_summarised_and_never_logged(tmp_path: Path) -> None:
    recipe = tiny_vqvae.recipe(train={"max_steps": 5})
    run = tiny_vqvae.train(recipe, tmp_path)
    validated = [row for row in run.training.state.history if "validation_loss" in row]
    assert len(validated) == 1
    for row in run.training.state.history:
        assert {"perplexity", "codes_used", "psnr", "lr"} <= row.keys()
        assert not row.keys() & {"counts", "sums", "squares", "validation_counts", "count"}
    # Over the whole set, not a mean over its batches (8 and 4 images).
    model, rows = run.training.model.eval(), tiny_vqvae.rows_of(recipe)
    with torch.no_grad():
        whole = model(rows.validation_batch(np.arange(12))).statistics
        each = [model(rows.validation_batch(np.array([row]))).metrics["psnr"].sum.item() for row in range(12)]
    assert validated[0]["validation_psnr"] == pytest.approx(sum(each) / 12, rel=1e-5)
    assert validated[0]["validation_codes_used"] == (whole["counts"] > 0).double().mean().item()
    assert validated[0]["validation_perplexity"] == pytest.approx(model.summarize(whole)["perplexity"], rel=1e-9)
    assert whole.keys() == {"counts"}
    assert "validation_adversarial_loss" not in validated[0]


def test_the_average_copies_what_a_model_averages_itself() -> None:
    recipe = tiny_vqvae.recipe()
    model, ema = tiny_vqvae.model_of(recipe, 0), Average(tiny_vqvae.model_of(recipe, 1))
    model.vqvae.quantizer.ema_counts += 3
    before = ema.weights["vqvae.quant_conv.bias"].clone()
    ema.update(model, 0.5, step=100)
    for name in BUFFERS:
        assert torch.equal(ema.weights[name], model.get_buffer(name))
    torch.testing.assert_close(ema.weights["vqvae.quant_conv.bias"], (before + model.vqvae.quant_conv.bias) / 2)


# -- what stops it -------------------------------------------------------------------------------------------------


class Breaks(VQVAETraining):
    """The discriminator's loss or gradient is nan from its second step on."""

    what = "loss"
    calls = 0

    def _discriminator(self, x_B3PP: Tensor) -> Outputs:
        outputs = super()._discriminator(x_B3PP)
        self.calls += 1
        if self.calls > 1:
            zero = sum((p * 0).sum() for p in self.phase_parameters(DISCRIMINATOR))
            loss, wrong = outputs.losses["loss"], zero * torch.nan if self.what == "loss" else torch.sqrt(zero * zero)
            outputs.losses["loss"] = loss._replace(sum=loss.sum + wrong)
        return outputs


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_phase_that_diverges_is_named(tmp_path: Path, what: str) -> None:
    recipe = tiny_vqvae.recipe(train={"checkpoint_every_steps": 1})
    model = Breaks(recipe)
    model.what = what
    named = "the discriminator's loss is nan" if what == "loss" else "the discriminator's gradient's norm is nan"
    with pytest.raises(InputError, match=f"{re.escape(named)} at step 6; last good checkpoint: step 5"):
        tiny_vqvae.train(recipe, tmp_path, model=model)
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-00000005"


@pytest.mark.parametrize("changed", ["missing", "twice"])
def test_phases_that_do_not_part_the_weights_are_refused(changed: str) -> None:
    model = tiny_vqvae.model_of(tiny_vqvae.recipe())
    parts: dict[str, Any] = {phase: model.phase_parameters(phase) for phase in model.phases}
    parts[DISCRIMINATOR] = parts[DISCRIMINATOR][1:] if changed == "missing" else parts[DISCRIMINATOR] + parts[GENERATOR]
    model.phase_parameters = parts.__getitem__  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not in exactly one phase"):
        build_phases(model, TrainSettings())
