"""Checkpoints as safetensors and JSON.

A checkpoint folder holds safetensors files: ``weights``, ``ema``, ``optimizer`` and ``best``. Each further phase adds
``optimizer-PHASE``. ``state.json`` is written last. It lists the SHA-256 of every file and its own. An incomplete or
damaged folder therefore does not load.
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
    """The trainable weights by name. Tied weights appear once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers listed in ``model.state_buffers``. Training updates them without gradients."""
    return {name: model.get_buffer(name) for name in getattr(model, "state_buffers", ())}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: trainable weights and state buffers. Frozen weights are left out."""
    return trainable_parameters(model) | state_buffers(model)


def load_trainable(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy saved weights into `model`. Raises InputError for a missing, unknown or differently shaped weight."""
    copy_state(trainable_state(model), state, where)


def copy_state(own: dict[str, Tensor], state: dict[str, Tensor], where: str) -> None:
    """Copy the saved weights `state` into the tensors `own`. Raises InputError as `load_trainable` does."""
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
    """Restore the tensors that `optimizer_state` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        if value.shape == like.shape:
            # Use the memory layout of the weight. Fused Adam reads weight and moment in memory order. With another
            # layout it would silently mix up the moments of a channels-last weight (safetensors is row-major).
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path, suffixes: tuple[str, ...] = ("",)) -> str:
    """SHA-256 over the files in `folder`, also in folders below, that end with one of `suffixes`, and their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_file(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises DiskError with the path if the disk is full or broken."""
    with writing(path):
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)


def save(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write ``{name}.safetensors`` for each group of tensors, then ``state.json``."""
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
    """Read what `save` wrote: tensors by group and name, and the state. Raises InputError for a damaged folder."""
    advice = "the checkpoint is incomplete or damaged; restore it, or give another --name or --fresh to start anew"
    try:
        record = json.loads((folder / STATE).read_bytes())
        state, intact = record["content"], record["sha256"] == _sha256_json(record["content"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{where}: no readable {STATE}; {advice}") from None
    if not intact:
        raise InputError(f"{where}: {STATE} is damaged: its SHA-256 differs; {advice}")
    tensors = {}
    for name, digest in state.pop("files").items():
        path = folder / name
        if not path.exists() or sha256_file(path) != digest:
            raise InputError(f"{where}: {name} is missing or damaged; {advice}")
        tensors[path.stem] = load_file(path)
    return tensors, state
