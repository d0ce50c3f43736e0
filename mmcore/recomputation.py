"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): less memory for more time.

The forward pass keeps only the inputs of a block. The backward pass computes the block again, with the same dropout and
bit-identical results.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcore.errors import InputError


def recompute_blocks(model: nn.Module) -> None:
    """Apply activation checkpointing to each of ``model.blocks()``. Raises InputError for a model without blocks."""
    blocks: list[nn.Module] = model.blocks() if hasattr(model, "blocks") else []  # type: ignore[operator]
    if not blocks:
        raise InputError(
            "activation_checkpointing: this model does not support it; leave --activation-checkpointing out"
        )
    for block in blocks:
        block.forward = _recomputed(block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def computed(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    return computed
