"""The adapter of a finished SDXL LoRA run as a file of diffusers, or in the layout of kohya's scripts."""

from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from mmcore.catalogue import read_model_file
from mmcore.errors import InputError
from mmcore.generators.facts import SdxlLoraFacts
from mmcore.generators.sdxl_lora import ADAPTER, SdxlLoraRecipe
from mmcore.run_files import read_weights
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder

Layout = Literal["diffusers", "kohya"]
_KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def is_lora_run(source: Storage) -> bool:
    """Whether `source` looks like a finished run."""
    return (source / "model").exists("recipe.json")


def read_adapter(run: Storage, layout: Layout = "diffusers") -> bytes:
    """The adapter of a finished run as a safetensors file.

    Raises InputError for a run of another recipe, or for damaged weights.
    """
    file = read_model_file(run, "generator")
    if not isinstance(file.facts, SdxlLoraFacts):
        raise InputError(f"--lora {run}: is a run of {file.recipe_name}, which has no adapter; name one of sdxl_lora")
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
