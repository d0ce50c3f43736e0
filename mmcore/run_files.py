"""The files that say what a run is.

``RUN/recipe.json`` is written when it begins. ``RUN/model/`` of a finished one holds model.safetensors, and a
recipe.json that names its SHA-256 too.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from mmcore.checkpoint import save_tensors, sha256_file
from mmcore.errors import InputError
from mmcore.recipe import recipe_from_json, recipe_to_json
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder

R = TypeVar("R")
F = TypeVar("F")
_WEIGHTS, _RECIPE = "model.safetensors", "recipe.json"
# Folders under model/ of a tokenizer, and of the VQ-VAE whose latents or codes a run was trained on.
TOKENIZER_ASSET, VQVAE_ASSET = "tokenizer", "vqvae"
# Fields of the file itself; all others are facts.
_OWN = ("recipe", "variant", "settings", "commit", "weights_sha256")


@dataclass(frozen=True)
class RunFile(Generic[R, F]):
    """What the file recipe.json of a run says; in it, the facts stand beside the other fields and not below them."""

    recipe_name: str
    variant: str
    recipe: R
    facts: F
    """What beside the recipe decides the result, such as the fingerprint of the dataset."""
    commit: str
    weights_sha256: str = ""
    """Of the weights beside it, in the folder model/."""
    written: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The file as it was read: what a later version adds must not change a fingerprint of what is there."""

    def to_json(self) -> dict[str, Any]:
        own = {"recipe": self.recipe_name, "variant": self.variant, "settings": recipe_to_json(self.recipe)}
        facts = {**own, **facts_to_json(self.facts), "commit": self.commit}
        return facts if not self.weights_sha256 else {**facts, "weights_sha256": self.weights_sha256}


def facts_to_json(facts: Any) -> dict[str, Any]:
    """The fields of the facts of a run as JSON."""
    return recipe_to_json(facts)


def run_file_from_json(fields: dict[str, Any], recipe_type: type[R], facts_type: type[F], where: str) -> RunFile[R, F]:
    """Raises InputError, naming `where`, for unknown and for missing fields."""
    facts = {name: value for name, value in fields.items() if name not in _OWN}
    if (upgraded := getattr(facts_type, "upgraded", None)) is not None:
        facts = upgraded(facts)
    return RunFile(
        fields.get("recipe", ""),
        fields.get("variant", ""),
        recipe_from_json(recipe_type, fields.get("settings", {}), where),
        recipe_from_json(facts_type, facts, where),
        fields.get("commit", ""),
        fields.get("weights_sha256", ""),
        fields,
    )


def read_begun(run: Storage, recipe_type: type[R], facts_type: type[F]) -> RunFile[R, F]:
    """What a run was begun as. Raises InputError for a file of another version."""
    return run_file_from_json(json.loads(run.read(_RECIPE)), recipe_type, facts_type, f"{run}/{_RECIPE}")


def write_begun(run: Storage, file: RunFile[Any, Any]) -> bool:
    """Begin a run; False where one is there."""
    return run.create(_RECIPE, _bytes(file))


def write_model(run: Storage, weights: dict[str, Tensor], file: RunFile[Any, Any]) -> None:
    """Write the weights and, last, `file` with their SHA-256."""
    with temporary_folder("model") as folder:
        path = folder / _WEIGHTS
        save_tensors(path, weights)
        run.upload(path, f"model/{_WEIGHTS}")
        file = dataclasses.replace(file, weights_sha256=sha256_file(path))
    run.write(f"model/{_RECIPE}", _bytes(file))


def _bytes(file: RunFile[Any, Any]) -> bytes:
    return json.dumps(file.to_json(), indent=1, ensure_ascii=False).encode()


def read_fields(run: Storage) -> tuple[dict[str, Any], str]:
    """The fields of what `write_model` wrote, and the file's name for messages; `mmcore.catalogue` knows their types.

    Raises InputError where `run` is not finished.
    """
    where = f"{run}/model/{_RECIPE}"
    try:
        fields = json.loads((run / "model").read(_RECIPE))
    except FileNotFoundError:
        raise InputError(f"{run}: {_why_not(run)}") from None
    if "weights_sha256" not in fields:
        raise InputError(f"{where}: names no weights_sha256; copy model/ again, or train it anew")
    return fields, where


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


def read_weights(run: Storage, sha256: str) -> dict[str, Tensor]:
    """The weights. Raises InputError where `sha256`, which recipe.json names, is not theirs."""
    with temporary_folder("model") as folder:
        path = folder / _WEIGHTS
        try:
            (run / "model").download(_WEIGHTS, path)
        except FileNotFoundError:
            raise InputError(f"{run}/model/{_WEIGHTS}: missing; copy the whole folder model/ again") from None
        if sha256_file(path) != sha256:
            raise InputError(f"{run}/model/{_WEIGHTS}: not the weights that recipe.json names; copy model/ again")
        return load_file(path)
