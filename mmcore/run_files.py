"""The files that describe a run.

``RUN/recipe.json`` is written when a run begins. A finished run has ``RUN/model/`` with model.safetensors and a
recipe.json that also holds the SHA-256 of the weights.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from mmcore.checkpoint import save_tensors, sha256_file
from mmcore.errors import InputError
from mmcore.missing_run import finished_beside, no_such_run, to_name
from mmcore.recipe import recipe_from_json, recipe_to_json
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder

R = TypeVar("R")
F = TypeVar("F")
_WEIGHTS, _RECIPE = "model.safetensors", "recipe.json"
# Folders under model/: the tokenizer of texts, and the autoencoder whose latents or codes a run was trained on.
TOKENIZER_ASSET, VQVAE_ASSET, TOKENIZER_OF_BITS_ASSET = "tokenizer", "vqvae", "infinity_tokenizer"
# Fields of the file itself; all others are facts.
_OWN = ("recipe", "variant", "settings", "commit", "weights_sha256")


@dataclass(frozen=True)
class RunFile(Generic[R, F]):
    """The content of a run's recipe.json. In the file, the fields of `facts` are at the top level."""

    recipe_name: str
    variant: str
    recipe: R
    facts: F
    """Inputs of the training that are not settings, such as the fingerprint of the dataset."""
    commit: str
    weights_sha256: str = ""
    """SHA-256 of model.safetensors in the same folder; empty in RUN/recipe.json."""
    written: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The file as read. Fingerprints use it, so that a field added by a later version does not change them."""

    def to_json(self) -> dict[str, Any]:
        own = {"recipe": self.recipe_name, "variant": self.variant, "settings": recipe_to_json(self.recipe)}
        facts = {**own, **facts_to_json(self.facts), "commit": self.commit}
        return facts if not self.weights_sha256 else {**facts, "weights_sha256": self.weights_sha256}


def facts_to_json(facts: Any) -> dict[str, Any]:
    """The fields of the facts as JSON."""
    return recipe_to_json(facts)


def run_file_from_json(fields: dict[str, Any], recipe_type: type[R], facts_type: type[F], where: str) -> RunFile[R, F]:
    """Build a `RunFile` from JSON fields. Raises InputError, naming `where`, for unknown and missing fields."""
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
    """``RUN/recipe.json``. Raises InputError for a file of an unknown version."""
    return run_file_from_json(json.loads(run.read(_RECIPE)), recipe_type, facts_type, f"{run}/{_RECIPE}")


def write_begun(run: Storage, file: RunFile[Any, Any]) -> bool:
    """Write ``RUN/recipe.json``; False if it exists already."""
    return run.create(_RECIPE, _bytes(file))


def write_model(run: Storage, weights: dict[str, Tensor], file: RunFile[Any, Any]) -> None:
    """Write the weights, then `file` with their SHA-256."""
    with temporary_folder("model") as folder:
        path = folder / _WEIGHTS
        save_tensors(path, weights)
        run.upload(path, f"model/{_WEIGHTS}")
        file = dataclasses.replace(file, weights_sha256=sha256_file(path))
    run.write(f"model/{_RECIPE}", _bytes(file))


def _bytes(file: RunFile[Any, Any]) -> bytes:
    return json.dumps(file.to_json(), indent=1, ensure_ascii=False).encode()


def read_fields(run: Storage) -> tuple[dict[str, Any], str]:
    """The JSON fields that `write_model` wrote, and the file's path for messages. `mmcore.catalogue` has their types.

    Raises InputError if `run` is not finished.
    """
    where = f"{run}/model/{_RECIPE}"
    try:
        fields = json.loads((run / "model").read(_RECIPE))
    except FileNotFoundError:
        raise InputError(f"{run}: {_unfinished_reason(run)}") from None
    if "weights_sha256" not in fields:
        raise InputError(f"{where}: no field weights_sha256; copy model/ again, or train the run again")
    return fields, where


def _unfinished_reason(run: Storage) -> str:
    """Why `run` has no ``model/``, and which folder to name instead."""
    if run.exists(_WEIGHTS):
        return "this is the folder model/ of a run; name the folder that holds it"
    if run.exists(_RECIPE):
        return "no model/ there, so the run is not finished; repeat its training command to continue"
    if not run.exists():
        return no_such_run(run)
    return f"no model/ there, so this is no run; {to_name(run, finished_beside(run))}"


def read_weights(run: Storage, sha256: str) -> dict[str, Tensor]:
    """The weights of a finished run. Raises InputError if their SHA-256 is not `sha256` of recipe.json."""
    with temporary_folder("model") as folder:
        path = folder / _WEIGHTS
        try:
            (run / "model").download(_WEIGHTS, path)
        except FileNotFoundError:
            raise InputError(f"{run}/model/{_WEIGHTS}: missing; copy the whole folder model/ again") from None
        if sha256_file(path) != sha256:
            raise InputError(f"{run}/model/{_WEIGHTS}: SHA-256 differs from the one in recipe.json; copy model/ again")
        return load_file(path)
