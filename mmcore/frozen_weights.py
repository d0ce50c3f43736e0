"""The frozen parts of a model in training: their precision, and the check that they do not change.

A frozen part is a largest module without trainable weights. `TrainSettings.frozen_precision` sets its precision. A part
that computes outside of autocast has ``own_precision = True``. It then stays as loaded unless the setting names a
precision.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only  # transformers registers its outputs there

from mmcore import checkpoint
from mmcore.errors import InputError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Layers that autocast computes in the lower precision. It would cast their weights in every step.
_CAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def frozen_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The frozen parts of `model` by name."""
    return dict(_frozen_parts("", model))


def _frozen_parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    trains = {parameter.requires_grad for parameter in module.parameters()}
    if trains == {False}:
        yield name, module
    elif trains:
        for child_name, child in module.named_children():
            yield from _frozen_parts(f"{name}.{child_name}" if name else child_name, child)


def hold_frozen(model: nn.Module, frozen_precision: str, precision: str) -> None:
    """Cast the frozen parts of `model` to `frozen_precision`. `precision` is the precision of the training.

    Raises InputError if `frozen_precision` names a precision and the model has no frozen part.
    """
    parts = list(frozen_parts(model).values())
    if frozen_precision != "auto" and not parts:
        raise InputError(
            f"frozen_precision {frozen_precision}: this model has no frozen part; leave --frozen-precision out"
        )
    for part in parts:
        if frozen_precision != "auto":
            dtype = _DTYPES[frozen_precision]
            saved = part.state_dict(keep_vars=True).values()
            # Computed buffers stay in fp32. In bf16 the frequencies of rotary positions would be far off.
            _cast([value for value in saved if isinstance(value, Tensor)], dtype)
            part.forward = _computing_in(dtype, part.forward)  # type: ignore[method-assign]
        elif precision == "bf16":
            store_for_autocast(part, torch.bfloat16)


def store_for_autocast(module: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights that autocast to `dtype` would cast in every step. What is computed under it stays equal."""
    for layer in _cast_layers(module):
        _cast(list(layer.parameters(recurse=False)), dtype)


def _cast_layers(module: nn.Module) -> Iterator[nn.Module]:
    if getattr(module, "own_precision", False):
        return
    if isinstance(module, _CAST_LAYERS):
        yield module
    for child in module.children():
        yield from _cast_layers(child)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _computing_in(dtype: torch.dtype, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` computed in `dtype`. Outputs are cast back to the dtype of the first real input, else to fp32."""

    @functools.wraps(forward)
    def computed(*arguments: Any, **keywords: Any) -> Any:
        given = [each for each in tree_leaves((arguments, keywords)) if isinstance(each, Tensor)]
        outer = next((each.dtype for each in given if each.is_floating_point()), torch.float32)

        def cast(to: torch.dtype, values: Any) -> Any:
            return tree_map_only(Tensor, lambda each: each.to(to) if each.is_floating_point() else each, values)

        arguments, keywords = cast(dtype, (arguments, keywords))
        with torch.autocast(given[0].device.type, enabled=False):
            made = forward(*arguments, **keywords)
        return cast(outer, made)

    return computed


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256, by name, of each tensor that training must not change.

    These are the frozen weights and the saved buffers that are not in ``state_buffers``.
    """
    moving = checkpoint.trainable_state(model)
    found: dict[int, str] = {}  # tied weights are hashed once
    result = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.requires_grad or name in moving or id(value) in found:
            continue
        found[id(value)] = name
        # One tensor at a time to save memory. A contiguous CPU tensor is not copied.
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        result[name] = hashlib.sha256(data.numpy().data).hexdigest()
    return result
