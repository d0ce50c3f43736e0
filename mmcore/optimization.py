"""What moves the weights: phases of a step with an optimiser each, the learning rate, the average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mmcore import checkpoint
from mmcore.recipe import TrainSettings

# Of the schedule linear_tail: the share of the steps before it falls, and where it ends.
_TAIL_FROM, _TAIL_END = 0.6, 0.02


def lr_factor(settings: TrainSettings, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` as a share of the peak; a function of the step alone, so nothing is remembered."""
    warmup = settings.warmup_steps
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    # From the peak on: a cosine that began with the warm-up would never let the rate reach it. A run that ends within
    # its warm-up has no such step, so nothing is divided by 0.
    if settings.schedule == "cosine" and step >= warmup:
        factor *= 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
    elif settings.schedule == "step" and step >= settings.step_epoch * steps_per_epoch:
        factor *= 0.1
    elif settings.schedule == "linear_tail" and step >= _TAIL_FROM * total_steps:
        fallen = (step - _TAIL_FROM * total_steps) / ((1 - _TAIL_FROM) * total_steps)
        factor *= 1 - (1 - _TAIL_END) * fallen
    return factor


def build_optimizer(settings: TrainSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=settings.fused_optimizer,
    )


@dataclass
class Phase:
    """A part of each step: the weights that it moves, by an optimiser of its own."""

    name: str | None
    """None where the model has but one phase, which is then never spoken of."""
    is_first: bool
    """The first phase gives the run its loss and is what is validated; its outputs are logged under their own names."""
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def arguments(self) -> tuple[str, ...]:
        """What ``forward`` takes after the batch."""
        return () if self.name is None else (self.name,)

    @property
    def group(self) -> str:
        """The optimiser's file in a checkpoint."""
        return "optimizer" if self.is_first else f"optimizer-{self.name}"

    def logged(self, output: str) -> str:
        """The name under which the metrics hold `output`."""
        return output if self.is_first else f"{self.name}_{output}"

    def of(self, what: str) -> str:
        """`what` in an error message."""
        return f"the {what}" if self.is_first else f"the {self.name}'s {what}"


def build_phases(model: nn.Module, settings: TrainSettings) -> list[Phase]:
    """The phases that `model` names, or the one that moves everything trainable."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names: tuple[str, ...] = getattr(model, "phases", ())
    if not names:
        parameters = list(trainable.values())
        return [Phase(None, True, parameters, build_optimizer(settings, parameters))]
    phases = []
    for name in names:
        parameters = list(model.phase_parameters(name))  # type: ignore[operator]
        phases.append(Phase(name, name == names[0], parameters, build_optimizer(settings, parameters)))
    moved = [id(p) for phase in phases for p in phase.parameters]
    unmoved = [name for name, p in trainable.items() if moved.count(id(p)) != 1]
    assert not unmoved, f"not in exactly one phase: {unmoved[:3]}"
    assert len(moved) == len(trainable), "a phase moves what is frozen"
    return phases


@contextmanager
def only(phase: Phase, phases: list[Phase]) -> Iterator[None]:
    """Gradients reach the weights of `phase` alone: a loss that runs through another phase's network leaves it be."""
    others = [p for other in phases if other is not phase for p in other.parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


class Average:
    """The exponential moving average of the weights that train, and of nothing else.

    State buffers are copied: what a model averages by itself, such as a codebook, needs no second average.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: value.clone() for name, value in checkpoint.trainable_state(model).items()}
        """By name, as in a checkpoint."""

    def update(self, model: nn.Module, decay: float, step: int) -> None:
        """Move towards the weights; early steps move it faster, so that it forgets the initial weights."""
        decay = min(decay, (1 + step) / (10 + step))
        with torch.no_grad():
            weights = checkpoint.trainable_parameters(model)
            torch._foreach_lerp_([self.weights[name] for name in weights], list(weights.values()), 1 - decay)
            for name, buffer in checkpoint.state_buffers(model).items():
                self.weights[name].copy_(buffer)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`model` has the average for its weights. Both change places, so nothing is copied."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad} | checkpoint.state_buffers(model)
        for name, tensor in moving.items():
            tensor.data, self.weights[name] = self.weights[name], tensor.data
