"""The adapter of a finished SDXL LoRA run as a file of diffusers, or in the layout of kohya's scripts."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from mmcore.catalogue import read_model_file
from mmcore.errors import InputError
from mmcore.generators.facts import SdxlLoraFacts
from mmcore.generators.sdxl_frozen import load_part
from mmcore.generators.sdxl_lora import ADAPTER, SdxlLoraRecipe
from mmcore.run_files import RunFile, read_weights
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder

Layout = Literal["diffusers", "kohya"]
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file of an adapter, as diffusers calls it."""
_FIRST, _SECOND = "lora_A.weight", "lora_B.weight"
_KOHYA = {_FIRST: "lora_down.weight", _SECOND: "lora_up.weight"}


def adapter_sha256(run: Storage) -> str:
    """What decides the adapter of a finished run: SHA-256 over its weights and its strength. Raises as `read_adapter`.

    That of a file would change with the version of a library that writes it.
    """
    file = _read_file(run)
    facts = [file.weights_sha256, file.recipe.rank, file.recipe.lora_alpha, file.recipe.dora]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_file(run: Storage) -> RunFile[SdxlLoraRecipe, SdxlLoraFacts]:
    file = read_model_file(run, "generator")
    if not isinstance(file.facts, SdxlLoraFacts):
        raise InputError(f"--lora {run}: is a run of {file.recipe_name}, which has no adapter; name one of sdxl_lora")
    return file


def save_adapter(run: Storage, layout: Layout, folder: str) -> None:
    """Write the adapter of a finished run into `folder`. Raises InputError as `read_adapter`."""
    (Path(folder) / LORA_FILE).write_bytes(read_adapter(run, layout))


def adapter_difference(run: Storage, folder: str) -> float:
    """How far the adapters that diffusers loads from `folder` are from those of the run.

    Compared are the changes of the weights that the adapters stand for: scale times second times first factor. Their
    largest difference in a layer is divided by the layer's largest change.
    """
    from diffusers import StableDiffusionXLPipeline

    file = _read_file(run)
    recipe = file.recipe
    layers = layers_of(read_weights(run, file.weights_sha256))
    unet: Any = load_part(recipe.model, recipe.revision, "unet", torch.float32)
    pipeline: Any = StableDiffusionXLPipeline(None, None, None, None, None, unet, None, add_watermarker=False)
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=ADAPTER)
    found, modules = 0.0, dict(unet.named_modules())
    for name, first in layers.items():
        if not name.endswith(_FIRST):
            continue
        layer = name.removesuffix(f".{_FIRST}")
        loaded = modules[layer]
        wanted = recipe.lora_alpha / recipe.rank * layers[f"{layer}.{_SECOND}"] @ first
        there = loaded.scaling[ADAPTER] * loaded.lora_B[ADAPTER].weight @ loaded.lora_A[ADAPTER].weight
        found = max(found, float((there - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)))
    return found


def is_lora_run(source: Storage) -> bool:
    """Whether `source` looks like a finished run."""
    return (source / "model").exists("recipe.json")


def read_adapter(run: Storage, layout: Layout = "diffusers") -> bytes:
    """The adapter of a finished run as a safetensors file.

    Raises InputError for a run of another recipe, or for damaged weights.
    """
    file = _read_file(run)
    layers = layers_of(read_weights(run, file.weights_sha256))
    return kohya_file(layers, file.recipe) if layout == "kohya" else diffusers_file(layers, file.recipe)


def layers_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `SdxlLora` under the names of peft, without the adapter's: ``down_blocks...to_q.lora_A.weight``."""
    layers = {}
    for name, value in weights.items():
        short = name.removeprefix("unet.").replace(f".{ADAPTER}", "")
        layers[short.removesuffix(".weight") if "lora_magnitude_vector" in short else short] = value
    return layers


def diffusers_file(layers: dict[str, Tensor], recipe: SdxlLoraRecipe) -> bytes:
    """The file that ``load_lora_weights`` opens. Its metadata hold rank and alpha."""
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig

    config: dict[str, Any] = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.target_modules),
        use_dora=recipe.dora,
    ).to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    with temporary_folder("lora") as folder:
        StableDiffusionXLPipeline.save_lora_weights(
            str(folder), unet_lora_layers=layers, unet_lora_adapter_metadata=config
        )
        return next(folder.glob("*.safetensors")).read_bytes()


def kohya_file(layers: dict[str, Tensor], recipe: SdxlLoraRecipe) -> bytes:
    """The layout of kohya's scripts. Each layer has its alpha.

    diffusers' own converter writes the rank in place of alpha. Raises InputError for DoRA: diffusers reads it back as
    another adapter.
    """
    if recipe.dora:
        raise InputError("dora: the layout of kohya is for plain LoRA here; export this adapter for diffusers")
    tensors: dict[str, Tensor] = {}
    for name, value in layers.items():
        ending = next(ending for ending in _KOHYA if name.endswith(ending))
        layer = "lora_unet_" + name.removesuffix(f".{ending}").replace(".", "_")
        tensors[f"{layer}.{_KOHYA[ending]}"] = value.contiguous()
        tensors[f"{layer}.alpha"] = torch.tensor(float(recipe.lora_alpha))
    metadata = {"ss_network_dim": str(recipe.rank), "ss_network_alpha": str(recipe.lora_alpha)}
    return save(tensors, metadata={**metadata, "ss_network_module": "networks.lora", "format": "pt"})
