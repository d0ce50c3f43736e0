"""Checkpoints as safetensors and JSON.

A checkpoint folder holds ``weights``, ``ema``, ``optimizer`` (and ``optimizer-PHASE`` for each further phase) and
``best`` as safetensors, and ``state.json``, written last, which names each file with its SHA-256 and itself carries
one: a folder that is incomplete or damaged does not load.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmcore.errors import InputError
from mmcore.storage import writing

STATE = "state.json"


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name, and no tied copy."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training moves by other means than gradients: those that ``model.state_buffers`` names."""
    return {name: model.get_buffer(name) for name in getattr(model, "state_buffers", ())}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """All that training moves, by name: weights and state buffers (frozen weights are named in the recipe instead)."""
    return trainable_parameters(model) | state_buffers(model)


def load_trainable(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy saved weights into `model`; a missing, unknown or differently shaped weight is an InputError."""
    copy_state(trainable_state(model), state, where)


def copy_state(own: dict[str, Tensor], state: dict[str, Tensor], where: str) -> None:
    """Copy the saved weights `state` into the tensors `own`, as `load_trainable` does."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise InputError(
            f"{where}: the weights do not belong to this recipe: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise InputError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the recipe builds {tuple(parameter.shape)}"
                " (was the vocabulary or a width changed?)"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as ``{index}.{name}``."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, slot in state.items() for name, value in slot.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        if value.shape == like.shape:
            # In the layout of the weight: fused Adam walks both in memory order and would silently mix up the moments
            # of a channels-last weight (safetensors holds rows first).
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError that names it where the disk cannot hold it."""
    with writing(path):
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)


def save(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write ``{name}.safetensors`` for each group of tensors and, last, ``state.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, group in tensors.items():
        path = folder / f"{name}.safetensors"
        save_tensors(path, group)
        digests[path.name] = sha256_file(path)
    content = {**state, "files": digests}
    with writing(folder / STATE):
        (folder / STATE).write_text(json.dumps({"sha256": _sha256_json(content), "content": content}, indent=1))


def _sha256_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(folder: Path, where: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` wrote. Raises InputError when a file is missing or is not the one that was written."""
    mend = "the checkpoint is incomplete or damaged; restore it, or give another --name or --fresh to start anew"
    try:
        record = json.loads((folder / STATE).read_bytes())
        state, intact = record["content"], record["sha256"] == _sha256_json(record["content"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{where}: no readable {STATE}; {mend}") from None
    if not intact:
        raise InputError(f"{where}: {STATE} is not the one that was written; {mend}")
    tensors = {}
    for name, digest in state.pop("files").items():
        path = folder / name
        if not path.exists() or sha256_file(path) != digest:
            raise InputError(f"{where}: {name} is missing or damaged; {mend}")
        tensors[path.stem] = load_file(path)
    return tensors, state
