"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): memory for time.

Of a block only its inputs are kept; the backward pass computes it a second time, with the same dropout and to the same
bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcore.errors import InputError


def recompute_blocks(model: nn.Module) -> None:
    """Let the backward pass compute each of ``model.blocks()`` again. Raises InputError for a model that names none."""
    blocks: list[nn.Module] = model.blocks() if hasattr(model, "blocks") else []  # type: ignore[operator]
    if not blocks:
        raise InputError(
            "activation_checkpointing: this model names no blocks that could be computed again; leave "
            "--activation-checkpointing out"
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
