"""Communication between the workers of one training, beside DDP's averaging of gradients."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.errors import InputError
from mmcore.frozen_weights import frozen_parts


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # Every worker's loss depends on the features of all workers, so their gradients are summed.
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered(features: Tensor) -> Tensor:
    """All-gather with gradients: features (B, ...) of this worker -> features (W·B, ...) of all workers, by rank.

    For losses that compare rows of the whole batch, such as a contrastive loss. Such a loss sums over this worker's
    rows and compares them with the gathered rows. Gradients flow back to the worker of each feature. The average over
    workers is then the gradient of the whole batch. Use it in training only, where all workers have equally many rows.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return features
    return _Gathered.apply(features)


def first_row(num_rows: int) -> int:
    """Index of this worker's first row among the gathered rows, if each worker has `num_rows`."""
    return torch.distributed.get_rank() * num_rows if torch.distributed.is_initialized() else 0


def check_frozen_alike(digests: dict[str, str], world_size: int) -> None:
    """Raise InputError if a worker's frozen weights differ from those of worker 0. `digests`: SHA-256 by name."""
    if world_size == 1:
        return
    workers: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(workers, digests)
    for rank, theirs in enumerate(workers):
        other = [name for name, digest in workers[0].items() if theirs.get(name) != digest]
        if other:
            raise InputError(
                f"frozen weight {other[0]} differs between worker {rank} and worker 0; give all machines the same "
                "pretrained files"
            )


def align_gradients(model: nn.Module) -> None:
    """Give the gradients of kernels the strides of their weights, with the same values.

    A convolution's backward pass may lay out the gradient of a 1 x 1 kernel unlike its weights. DDP then warns from
    C++, even where only strides of axes of size 1 differ.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1 and 1 in parameter.shape:
            parameter.register_hook(functools.partial(_in_strides, parameter.stride()))


def _in_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    if gradient.stride() == strides:
        return gradient
    # Not contiguous(), which does not look at axes of size 1.
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


class Replica(nn.Module):
    """The module that DDP wraps: the model and one unused parameter.

    With ``find_unused_parameters``, DDP warns on every worker if it finds no unused parameter. The warning comes from
    C++, so Python's filters do not apply. `without_gradient` is an unused parameter. It is fp16 and so has a gradient
    bucket of its own: the buckets of the other parameters do not change.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.without_gradient = nn.Parameter(torch.zeros(1, dtype=torch.float16, device=device))
        frozen = [
            f"model.{part}.{name}" for part, module in frozen_parts(model).items() for name in module.state_dict()
        ]
        # `after_step` gives these the same values on every worker, so DDP need not send them in each step.
        alike = [f"model.{name}" for name in getattr(model, "training_buffers", ())]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen + alike)

    def forward(self, *arguments: Any) -> Any:
        return self.model(*arguments)
