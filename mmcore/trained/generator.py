"""Opens a trained text-to-image generator: prompts and seeds -> images."""

from collections.abc import Callable, Sequence
from typing import Any

from mmcore.catalogue import read_model_file
from mmcore.errors import InputError
from mmcore.generators.facts import AutoregressiveFacts, DiffusionFacts, InfinityFacts, SdxlLoraFacts
from mmcore.recipe import Generator
from mmcore.run_files import RunFile
from mmcore.storage import Storage
from mmcore.trained.autoregressive import TrainedAutoregressive
from mmcore.trained.diffusion import TrainedDiffusion
from mmcore.trained.infinity import TrainedInfinity
from mmcore.trained.pipeline import HUB, Lora, TrainedPipeline, names_pipeline, parse_lora


def open_generator(source: str, *, text_encoder: str | None = None, loras: Sequence[str] = ()) -> Generator:
    """The generator of a finished run, or a pipeline of diffusers. Reads settings and no weights.

    The result can be sent to another machine.

    Args:
        source: the run, a local folder or s3://bucket/prefix; or a pipeline, a local folder with model_index.json or
            hf://NAME[@REVISION].
        text_encoder: name or folder of the frozen text encoder of a run, if it differs from the one in recipe.json.
        loras: adapters of a pipeline, each ``URI[:SCALE]``.
    Raises InputError if `source` is neither, or for adapters of a run.
    """
    if names_pipeline(source):
        name, _, revision = source.removeprefix(HUB).partition("@") if source.startswith(HUB) else (source, "", "")
        if text_encoder is not None:
            raise InputError(f"--text-encoder {text_encoder!r}: a pipeline has its own; leave the flag out")
        return TrainedPipeline(name, revision or None, [parse_lora(lora) for lora in loras])
    run = Storage(source)
    file = read_model_file(run, "generator")
    if loras:
        raise InputError(f"--lora {loras[0]}: is for a pipeline of diffusers, and {run} is a run of {file.recipe_name}")
    return BY_FACTS[type(file.facts)](run, file, text_encoder)


def _open_sdxl_lora(run: Storage, file: RunFile[Any, Any], text_encoder: str | None) -> Generator:
    """The pretrained pipeline of the training, with the run's adapter."""
    if text_encoder is not None:
        raise InputError(f"--text-encoder {text_encoder!r}: SDXL has its own; leave the flag out")
    return TrainedPipeline(file.recipe.model, file.recipe.revision, [Lora(run.uri)], file.facts.model_identity)


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Generator]] = {
    DiffusionFacts: TrainedDiffusion,
    AutoregressiveFacts: TrainedAutoregressive,
    InfinityFacts: TrainedInfinity,
    SdxlLoraFacts: _open_sdxl_lora,
}
"""The class that opens a run, by the type of its facts."""
