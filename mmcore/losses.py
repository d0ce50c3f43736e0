"""What a model returns to the loop: named losses, each a sum and its count, and how they become one loss.

The total is the weighted sum of the means, each over the whole batch. What a mean divides by is agreed over
micro-batches and workers before the first backward pass, so a step is the same for any number of either. A model
whose losses all count rows needs nothing more. Any other says what they count: ``counts(batch)``, of the losses that do
not count rows, computed from the batch alone (with phases, ``counts(batch, phase)``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

TOTAL = "loss"


class Mean(NamedTuple):
    """A number to log."""

    sum: Tensor
    """Over what `count` counts; a scalar."""
    count: Tensor | int  # type: ignore[assignment]  # not the method of tuples
    """How many it is of, such as images or words."""


class Loss(NamedTuple):
    """A part of what is minimised."""

    sum: Tensor
    """Over what `count` counts; a scalar with a gradient."""
    count: Tensor | int  # type: ignore[assignment]  # not the method of tuples
    """How many it is of, such as images or words; equal to what the model's ``counts`` told."""
    weight: float = 1.0
    """Share of the mean in the total."""


class Outputs(NamedTuple):
    """What ``forward`` returns for a batch. DDP finds the gradients in it."""

    losses: dict[str, Loss]
    """A sole loss is called `loss`; several have names of their own and are logged beside their total, `loss`."""
    metrics: dict[str, Mean] = {}  # noqa: RUF012 - never changed
    """Logged as means."""
    statistics: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """Summed over micro-batches and workers, for the model's ``after_step`` and ``summarize``; never logged."""


class Denominators:
    """What the losses of one step are divided by."""

    def __init__(self, num_rows: int, counts: dict[str, float]) -> None:
        """`num_rows`: rows of the whole batch; `counts`: of the losses that do not count rows, over the whole batch."""
        self.num_rows, self.counts = float(num_rows), counts
        # Gradients come in units of the largest count and are divided by it once, at the end: the sum of a sole loss is
        # then what is differentiated, and micro-batches differ in nothing else.
        self.unit = 1.0

    def of(self, name: str) -> float:
        return self.counts.get(name, self.num_rows)

    def backward_loss(self, outputs: Outputs) -> Tensor:
        """What to differentiate: the batch's part of the total, times `unit`. A loss of which the whole batch holds
        nothing has no part in it."""
        self.unit = max(1.0, *(self.of(name) for name in outputs.losses))
        parts = [
            loss.weight * (self.unit / self.of(name) if self.of(name) else 0.0) * loss.sum
            for name, loss in outputs.losses.items()
        ]
        return sum(parts[1:], start=parts[0])

    def check(self, sums: "Sums") -> None:
        """Whether ``forward`` counted what ``counts`` had told."""
        for name in sums.weights:
            counted = sums.count(name)
            assert counted == self.of(name), (
                f"{name} is a sum over {counted:g}, and {self.of(name):g} were agreed: the model's `counts` is wrong"
            )


@dataclass
class Sums:
    """Outputs added up over micro-batches and workers, in float64."""

    parts: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    """Of each loss."""

    def add(self, outputs: Outputs) -> None:
        assert TOTAL not in outputs.losses or len(outputs.losses) == 1, "one of several losses is called like their sum"
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
        """Nothing, in the shapes of this."""
        return Sums({key: torch.zeros_like(value) for key, value in self.parts.items()}, self.weights)

    def reduced(self, add_up: Callable[[Tensor], Tensor]) -> "Sums":
        """The sums over all workers, on the CPU; `add_up` takes a vector of this worker's."""
        keys = sorted(self.parts)
        values = add_up(torch.cat([self.parts[key].cpu().flatten() for key in keys]))
        parts = values.split([self.parts[key].numel() for key in keys])
        return Sums(
            {key: part.view(self.parts[key].shape) for key, part in zip(keys, parts, strict=True)}, self.weights
        )

    def count(self, name: str) -> float:
        return self.parts["count", name].item()

    def means(self) -> dict[str, float]:
        """`loss`, the weighted sum of the mean losses; the losses, where they are several; the metrics. What nothing
        was counted of adds nothing to the total and is left out."""
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
