"""What workers of one training share beside the average of their gradients."""

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
        # Each worker's loss reads the features of all: what they ask of this worker's features adds up.
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered(features: Tensor) -> Tensor:
    """The features (B, ...) of this worker's rows -> those of the whole batch (W·B, ...), by rank.

    For a loss that compares rows with each other: it is a sum over this worker's rows, against the gathered features
    of all. Gradients flow back to the workers that the features came from, and the loop's average over workers gives
    the gradient of the whole batch. Only in training, where all workers have as many rows: in validation each has
    batches of its own.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return features
    return _Gathered.apply(features)


def first_row(num_rows: int) -> int:
    """Where this worker's `num_rows` rows begin among the gathered ones."""
    return torch.distributed.get_rank() * num_rows if torch.distributed.is_initialized() else 0


def check_frozen_alike(digests: dict[str, str], world_size: int) -> None:
    """Raise InputError where a worker has loaded other frozen weights than the first, by name their digests."""
    if world_size == 1:
        return
    workers: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(workers, digests)
    for rank, theirs in enumerate(workers):
        other = [name for name, digest in workers[0].items() if theirs.get(name) != digest]
        if other:
            raise InputError(
                f"frozen weight {other[0]} of worker {rank} is not that of worker 0; give all machines the same "
                "pretrained files"
            )


class Replica(nn.Module):
    """What DDP wraps.

    DDP warns on every worker where it looked for weights without a gradient and found none, and no filter of Python's
    sees that warning. `without_gradient` is one that it finds, in a bucket of its own by its type, so the layout of the
    others is as if it were not there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.without_gradient = nn.Parameter(torch.zeros(1, dtype=torch.float16, device=device))
        frozen = [
            f"model.{part}.{name}" for part, module in frozen_parts(model).items() for name in module.state_dict()
        ]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def forward(self, *arguments: Any) -> Any:
        return self.model(*arguments)
