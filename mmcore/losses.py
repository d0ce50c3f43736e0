"""The outputs of a model for the training loop: named losses, each a sum and its count, and their combination.

The total loss is the weighted sum of the mean losses over the whole batch. The denominators are summed over
micro-batches and workers before the first backward pass. A step is therefore the same for any number of either.

By default a loss is divided by the number of rows. A model with other denominators defines ``counts(batch)``, or with
phases ``counts(batch, phase)``. It returns the denominators of those losses, computed from the batch alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

TOTAL = "loss"


class Mean(NamedTuple):
    """A mean to log."""

    sum: Tensor
    """Sum of the values; a scalar."""
    count: Tensor | int  # type: ignore[assignment]  # not the method of tuples
    """Number of values, such as images or words."""


class Loss(NamedTuple):
    """One term of the total loss."""

    sum: Tensor
    """Sum of the values; a scalar with a gradient."""
    count: Tensor | int  # type: ignore[assignment]  # not the method of tuples
    """Number of values, such as images or words; must equal what the model's ``counts`` returned."""
    weight: float = 1.0
    """Weight of the mean in the total."""


class Outputs(NamedTuple):
    """The return value of ``forward``. DDP finds the tensors with gradients in it."""

    losses: dict[str, Loss]
    """A single loss is named `loss`. Several losses have other names; their total is logged as `loss`."""
    metrics: dict[str, Mean] = {}  # noqa: RUF012 - never changed
    """Logged as means."""
    statistics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """Summed over micro-batches and workers and given to ``after_step`` and ``summarize`` of the model; not logged."""


class Denominators:
    """The denominators of the losses of one step."""

    def __init__(self, num_rows: int, counts: dict[str, float]) -> None:
        """`num_rows`: rows of the whole batch; `counts`: other denominators by loss name, over the whole batch."""
        self.num_rows, self.counts = float(num_rows), counts
        # The loop differentiates the loss times `unit`, the largest count, and divides the gradient by it at the end.
        # With a single loss its plain sum is differentiated, so rounding does not depend on the micro-batches.
        self.unit = 1.0

    def of(self, name: str) -> float:
        return self.counts.get(name, self.num_rows)

    def backward_loss(self, outputs: Outputs) -> Tensor:
        """This batch's part of the total loss, times `unit`. A loss with a count of 0 is left out."""
        self.unit = max(1.0, *(self.of(name) for name in outputs.losses))
        parts = [
            loss.weight * (self.unit / self.of(name) if self.of(name) else 0.0) * loss.sum
            for name, loss in outputs.losses.items()
        ]
        return sum(parts[1:], start=parts[0])

    def check(self, sums: "Sums") -> None:
        """Assert that the counts from ``forward`` equal those from ``counts``."""
        for name in sums.weights:
            counted = sums.count(name)
            assert counted == self.of(name), (
                f"{name} is a sum over {counted:g} values, but the model's `counts` returned {self.of(name):g}"
            )


@dataclass
class Sums:
    """Outputs added up over micro-batches and workers, in float64."""

    parts: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each loss."""

    def add(self, outputs: Outputs) -> None:
        assert TOTAL not in outputs.losses or len(outputs.losses) == 1, (
            "one of several losses has the name of the total"
        )
        for name, loss in outputs.losses.items():
            self.weights[name] = loss.weight
        for name, mean in (outputs.losses | outputs.metrics).items():
            self._add(("sum", name), mean.sum)
            self._add(("count", name), mean.count)
        for name, value in outputs.statistics.items():
            self._add(("statistic", name), value)

    def _add(self, key: tuple[str, str], value: Tensor | int) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        self.parts[key] = self.parts[key] + value if key in self.parts else value

    def zeros(self) -> "Sums":
        """Zeros of the same shapes."""
        return Sums({key: torch.zeros_like(value) for key, value in self.parts.items()}, self.weights)

    def reduced(self, add_up: Callable[[Tensor], Tensor]) -> "Sums":
        """The sums over all workers, on the CPU. `add_up` reduces a vector over the workers."""
        keys = sorted(self.parts)
        values = add_up(torch.cat([self.parts[key].cpu().flatten() for key in keys]))
        parts = values.split([self.parts[key].numel() for key in keys])
        return Sums(
            {key: part.view(self.parts[key].shape) for key, part in zip(keys, parts, strict=True)}, self.weights
        )

    def count(self, name: str) -> float:
        return self.parts["count", name].item()

    def means(self) -> dict[str, float]:
        """The total `loss`, the losses if there are several, and the metrics.

        A mean with a count of 0 is left out of the result and of the total.
        """
        means = {
            name: self.parts["sum", name].item() / self.count(name)
            for kind, name in self.parts
            if kind == "sum" and self.count(name)
        }
        total = sum(weight * means.get(name, 0.0) for name, weight in self.weights.items())
        return {**means, TOTAL: total}

    @property
    def statistics(self) -> dict[str, Tensor]:
        return {name: value for (kind, name), value in self.parts.items() if kind == "statistic"}
