"""The model of a finished run: ``RUN/model/`` holds model.safetensors and recipe.json, which names its SHA-256."""

import json
import re
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mmcore.checkpoint import save_tensors, sha256_file
from mmcore.errors import InputError
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder

_WEIGHTS, _RECIPE = "model.safetensors", "recipe.json"


def write_model(run: Storage, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the weights and, last, `facts` (what the run's recipe.json holds)."""
    with temporary_folder("model") as folder:
        path = folder / _WEIGHTS
        save_tensors(path, weights)
        run.upload(path, f"model/{_WEIGHTS}")
        facts = {**facts, "weights_sha256": sha256_file(path)}
    run.write(f"model/{_RECIPE}", json.dumps(facts, indent=1, ensure_ascii=False).encode())


def read_facts(run: Storage) -> dict[str, Any]:
    """What `write_model` was given, and ``weights_sha256``. Raises InputError where `run` is not finished."""
    try:
        facts = json.loads((run / "model").read(_RECIPE))
    except FileNotFoundError:
        raise InputError(f"{run}: {_why_not(run)}") from None
    if "weights_sha256" not in facts:
        raise InputError(f"{run}/model/{_RECIPE}: names no weights_sha256; copy model/ again, or train it anew")
    return facts


def _why_not(run: Storage) -> str:
    """What a folder without ``model/`` is, and what to name instead."""
    if run.exists(_WEIGHTS):
        return "no model/ there, since it is one; name the folder that holds it"
    if run.exists(_RECIPE):
        return "no model/ there, so the run is not finished; give its training command again to go on"
    finished: list[str] = []
    if re.search(r"/runs/[^/]+/[^/]+$", run.uri):
        finished = [name for name in run.parent.folders() if (run.parent / name / "model").exists(_RECIPE)]
    there = f"{run.parent} has: {', '.join(finished[:10])}" if finished else "STORAGE/runs/RECIPE/NAME"
    return f"no model/ there; name a finished run, {there}"


def read_weights(run: Storage, facts: dict[str, Any]) -> dict[str, Tensor]:
    """The weights. Raises InputError where they are not those that `facts` names."""
    with temporary_folder("model") as folder:
        path = folder / _WEIGHTS
        try:
            (run / "model").download(_WEIGHTS, path)
        except FileNotFoundError:
            raise InputError(f"{run}/model/{_WEIGHTS}: missing; copy the whole folder model/ again") from None
        if sha256_file(path) != facts["weights_sha256"]:
            raise InputError(f"{run}/model/{_WEIGHTS}: not the weights that recipe.json names; copy model/ again")
        return load_file(path)
