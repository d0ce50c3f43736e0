"""Optimisation: the phases of a step, each with its optimiser, the learning rate, and the moving average of weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mmcore import checkpoint
from mmcore.recipe import TrainSettings

# Schedule linear_tail: the share of the steps at the peak rate, and the last rate as a share of the peak.
_TAIL_FROM, _TAIL_END = 0.6, 0.02


def lr_factor(settings: TrainSettings, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` as a share of the peak. It depends on the step alone and has no state to save."""
    warmup = settings.warmup_steps
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    # The cosine begins after the warm-up, so that the rate reaches its peak. A run that ends during its warm-up never
    # gets here, so there is no division by 0.
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
    """A part of each training step, with its own weights and optimiser."""

    name: str | None
    """None if the model has no phases."""
    is_first: bool
    """The first phase gives the loss of the run and is validated. Its outputs are logged without a prefix."""
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of ``forward`` after the batch."""
        return () if self.name is None else (self.name,)

    @property
    def group(self) -> str:
        """Name of the optimiser's file in a checkpoint, without its ending."""
        return "optimizer" if self.is_first else f"optimizer-{self.name}"

    def logged(self, output: str) -> str:
        """The name of `output` in the metrics."""
        return output if self.is_first else f"{self.name}_{output}"

    def of(self, what: str) -> str:
        """`what` with the name of the phase, for an error message."""
        return f"the {what}" if self.is_first else f"the {self.name}'s {what}"


def build_phases(model: nn.Module, settings: TrainSettings) -> list[Phase]:
    """The phases of `model`, or a single phase with all trainable weights."""
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
    assert not unmoved, f"these weights are not in exactly one phase: {unmoved[:3]}"
    assert len(moved) == len(trainable), "a phase has frozen weights"
    return phases


@contextmanager
def gradients_only_for(phase: Phase, phases: list[Phase]) -> Iterator[None]:
    """Within the block, only the weights of `phase` get gradients. A loss may use the network of another phase."""
    others = [p for other in phases if other is not phase for p in other.parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


class Average:
    """The exponential moving average of the trainable weights.

    State buffers are copied, not averaged. A codebook, for example, is a moving average already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: value.clone() for name, value in checkpoint.trainable_state(model).items()}
        """The averages by name, as in a checkpoint."""

    def update(self, model: nn.Module, decay: float, step: int) -> None:
        """Update the average after `step`. The decay is smaller in early steps, to forget the initial weights."""
        decay = min(decay, (1 + step) / (10 + step))
        with torch.no_grad():
            weights = checkpoint.trainable_parameters(model)
            torch._foreach_lerp_([self.weights[name] for name in weights], list(weights.values()), 1 - decay)
            for name, buffer in checkpoint.state_buffers(model).items():
                self.weights[name].copy_(buffer)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block, `model` has the averaged weights. Both are swapped, not copied."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad} | checkpoint.state_buffers(model)
        for name, tensor in moving.items():
            tensor.data, self.weights[name] = self.weights[name], tensor.data
