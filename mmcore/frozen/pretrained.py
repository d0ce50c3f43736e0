"""Loads frozen pretrained models of Hugging Face, by name on the hub or from a local folder."""

import functools
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcore.errors import InputError
from mmcore.frozen.hub import not_found, quiet_load, say_fetch

# Values of recipes that are not names of models. A local folder of such a name is ignored.
_NO_MODELS = ("scratch", "words", "")
# Fields of a configuration that do not affect what the model computes.
_CONFIG_WITHOUT_EFFECT = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "_commit_hash",
)
# Errors of the two file formats for an invalid file of weights.
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError)


def read_config(name: str, *, flag: str, what: str) -> Any:
    """The configuration of the model `name`. Raises InputError, naming `flag` and the kind of model, if not found."""
    from transformers import AutoConfig

    say_fetch(name, "config.json")
    try:
        # trust_remote_code is always given. Without it transformers may ask on a terminal whether to run remote code.
        with quiet_load():
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_found(name, flag, what, error) from None


def load_frozen(
    name: str,
    choose: Callable[[Any], Any],
    *,
    flag: str,
    what: str,
    may_miss: tuple[str, ...] = ("pooler",),
    part_of: Callable[[Any], str | None] = lambda config: None,
) -> Any:
    """The model `name` in fp32, in evaluation mode and without gradients. `choose(config)` returns its class.

    Raises InputError, naming `flag`, if the model is not found or weights are missing. `what` is the kind of model for
    the message. `may_miss`: parts of names of weights that may be missing. They are then random. The default is the
    pooler: it does no harm where only the last hidden state is used, as it comes after it. `part_of(config)` returns
    the part of a larger model that the class is, as weights name it, for a class of which transformers does not know.
    """
    config = read_config(name, flag=flag, what=what)
    part = part_of(config)
    say_fetch(name, "model.safetensors", "model.safetensors.index.json", what="the weights of")
    try:
        with quiet_load():
            model, loaded = choose(config).from_pretrained(
                name,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                trust_remote_code=False,
                key_mapping=None if part is None else {rf"^{part}\.": ""},
            )
    except (OSError, ValueError) as error:
        raise not_found(name, flag, what, error) from None
    # Unused weights, such as a classifier's head, do no harm.
    missing = sorted(key for key in loaded["missing_keys"] if not any(part in key for part in may_miss))
    if missing:
        raise InputError(f"{flag} {name!r}: {len(missing)} weights are missing there, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def sha256_of(model: nn.Module, facts: Any) -> str:
    """SHA-256 over `facts` (as JSON with sorted keys) and all weights and buffers of `model`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def effective_config(config: Any) -> dict[str, Any]:
    """The fields of a configuration of transformers that affect what the model computes."""
    return {key: value for key, value in config.to_dict().items() if key not in _CONFIG_WITHOUT_EFFECT}


def absolute_folder(name: str) -> str:
    """The absolute path of a local folder, as workers have another working directory. Other names are unchanged."""
    return str(Path(name).absolute()) if name not in _NO_MODELS and Path(name).is_dir() else name


def read_weights(
    path: str, flag: str, *, inside: tuple[str, ...] = (), what: str = "one", shapes_only: bool = False
) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, or of a folder of such files with an index of Hugging Face, by name.

    `inside`: keys under which a file may have its tensors, beside the state of a training; the outer one is first.
    With `shapes_only` the tensors are on the meta device, and little of the files is read.
    Raises InputError, naming `flag`, if there is no such file or it is none of weights. It says to name `what`.
    No code of a .pth file is run.
    """
    content = _read(path, functools.partial(_read_file, flag=flag, shapes_only=shapes_only), flag)
    for key in inside:
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{flag} {path!r}: not a file of weights by name; name {what}")
    return content


def _read(path: str, read: Callable[[str], Any], flag: str) -> Any:
    """What `read` gives of the file, or of all files of an index."""
    indexes = sorted(Path(path).glob("*.index.json"))
    if indexes:
        try:
            files = set(json.loads(indexes[0].read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            raise InputError(f"{flag} {path!r}: {indexes[0].name} is no index of weights; fetch it again") from None
        return {name: value for file in sorted(files) for name, value in read(f"{path}/{file}").items()}
    return read(path)


def _read_file(path: str, flag: str, shapes_only: bool) -> Any:
    if not Path(path).is_file():
        raise InputError(f"{flag} {path!r}: no such file; name a .safetensors or .pth file with weights")
    try:
        if path.endswith(".safetensors"):
            if shapes_only:
                with safe_open(path, "pt") as file:
                    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            return load_file(path)
        # Files of old versions of PyTorch cannot be mapped into memory.
        mapped = shapes_only and zipfile.is_zipfile(path)
        device = "meta" if shapes_only else "cpu"
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{flag} {path!r}: not a file of weights ({reason})") from None
