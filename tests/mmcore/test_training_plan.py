"""Values derived from training settings: steps, learning rates, and refusals."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from mmcore.errors import InputError
from mmcore.generators.pixel_diffusion import VARIANTS as PIXEL_DIFFUSION
from mmcore.optimization import lr_factor
from mmcore.recipe import TrainSettings
from mmcore.training_plan import check_batch, num_steps


def cosine_of_transformers(num_warmup_steps: int, num_steps: int) -> list[float]:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_steps)
    factors = []
    for _ in range(num_steps):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


def test_steps_and_learning_rate() -> None:
    settings = TrainSettings(num_epochs=3, batch_size=8, warmup_steps=4, schedule="cosine")
    assert num_steps(settings, 43) == (5, 15)
    assert num_steps(dataclasses.replace(settings, max_steps=7), 43) == (5, 7)
    factors = [lr_factor(settings, step, 15, 5) for step in range(15)]
    usual = cosine_of_transformers(4, 15)
    # The reference begins with a step at rate 0. From the peak on both are equal.
    assert factors[:4] == pytest.approx(usual[1:5])
    assert factors[4:] == pytest.approx(usual[4:15])
    report = PIXEL_DIFFUSION["report"].train
    steps_per_epoch, total = num_steps(report, 7_000)
    assert max(lr_factor(report, step, total, steps_per_epoch) for step in range(total)) == 1
    # A run that ends during its warm-up.
    short = [lr_factor(settings, step, 3, 5) for step in range(3)]
    assert short == pytest.approx([1 / 4, 2 / 4, 3 / 4])
    assert [lr_factor(settings, step, 4, 5) for step in range(4)] == pytest.approx([*short, 1])
    falls = dataclasses.replace(settings, warmup_steps=0, schedule="step", step_epoch=2)
    assert [lr_factor(falls, step, 15, 5) for step in (0, 9, 10, 14)] == [1.0, 1.0, 0.1, 0.1]
    assert {lr_factor(dataclasses.replace(falls, schedule="constant"), step, 15, 5) for step in range(15)} == {1.0}
    tail = dataclasses.replace(settings, warmup_steps=2, schedule="linear_tail")
    factors = [lr_factor(tail, step, 1000, 100) for step in (0, 1, 599, 600, 800, 1000)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 0.51, 0.02])


@pytest.mark.parametrize(
    ("changes", "num_workers", "named"),
    [
        ({"batch_size": 9}, 2, ["batch_size 9", "2 workers", "--batch-size"]),
        ({"batch_size": 8, "gradient_accumulation": 3}, 1, ["batch_size 8", "3 micro-batches", "multiple of 3"]),
        ({"num_epochs": 0}, 1, ["num_epochs 0", "--num-epochs"]),
        ({"max_steps": -1}, 1, ["max_steps -1", "--max-steps"]),
        ({"validate_every_epochs": 0}, 1, ["validate_every_epochs 0", "--validate-every-epochs"]),
        ({"checkpoint_every_steps": 0}, 1, ["checkpoint_every_steps 0"]),
        ({"log_every_steps": 0}, 1, ["log_every_steps 0"]),
        ({}, 0, ["num_workers 0", "--num-workers"]),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], num_workers: int, named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check_batch(dataclasses.replace(TrainSettings(), **changes), num_workers)
    assert all(part in str(caught.value) for part in named), caught.value
