"""Opens a trained text-to-image generator: prompts and seeds -> images."""

from collections.abc import Callable
from typing import Any

from mmcore.catalogue import read_model_file
from mmcore.generators.facts import AutoregressiveFacts, DiffusionFacts
from mmcore.recipe import Generator
from mmcore.run_files import RunFile
from mmcore.storage import Storage
from mmcore.trained.autoregressive import TrainedAutoregressive
from mmcore.trained.diffusion import TrainedDiffusion


def open_generator(source: str, *, text_encoder: str | None = None) -> Generator:
    """The generator of a finished run. Reads recipe.json and no weights. The result can be sent to another machine.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        text_encoder: name or folder of the frozen text encoder, if it differs from the one in recipe.json.
    Raises InputError if `source` is not a finished run of a generator.
    """
    run = Storage(source)
    file = read_model_file(run, "generator")
    return BY_FACTS[type(file.facts)](run, file, text_encoder)


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], Generator]] = {
    DiffusionFacts: TrainedDiffusion,
    AutoregressiveFacts: TrainedAutoregressive,
}
"""The class that opens a run, by the type of its facts."""
