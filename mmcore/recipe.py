"""The protocols that jobs and the service use: recipe, captioner, retriever and generator.

A recipe holds the settings of a training. ``open_captioner``, ``open_retriever``, ``open_generator`` and
``open_autoencoder`` of ``mmcore.trained`` open a finished run. They read recipe.json and no weights. A driver or a
service can then check a request, or send the object to another machine. There ``load`` reads the weights onto the
device that computes.

Shapes: B images, H rows, W columns.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from mmcore.errors import InputError

T = TypeVar("T")
Identity = dict[str, str]
"""Names to URIs, digests and revisions of all parts of a model. Equal identities give equal outputs."""


class Recipe(Protocol):
    """All settings of one model: data, sizes, optimisation. A frozen dataclass in the file of the model."""

    @property
    def dataset(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def train(self) -> "TrainSettings": ...


class Captioner(Protocol):
    """Images to captions."""

    image_size: int
    """Side in pixels that images are resized to."""
    max_length: int
    """Upper limit of a caption's length in tokens, for any options."""
    options: Any
    """The default search options: a frozen dataclass whose fields become flags and request fields. The metadata ``api``
    of a field is its name in a request, if it differs. The metadata ``caps`` marks two fields that the service limits:
    "words" is the longest caption, "beams" the number of beams."""
    takes_prompt: bool
    """Whether a caption can depend on a text prompt beside the image."""

    def identity(self) -> Identity: ...

    def check(self, options: Any) -> None:
        """Raise OptionError for search options that this captioner does not support."""

    def load(self, device: str = "cpu") -> Self:
        """Read the weights and return self. Raises InputError if their digests differ from those in recipe.json."""

    def caption(
        self,
        pixels: np.ndarray,
        options: Any,
        prompts: Sequence[str] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """uint8 (B, P, P, 3) with P = `image_size` -> B captions.

        `on_text` is told the index of an image and its caption so far, after each word of a greedy search.
        """


class Retriever(Protocol):
    """Images and texts to features of one space, in which they are compared.

    Features are normalised. An image may have several, Q; the similarity of a text is that of the most similar one.
    """

    reads_pairs: bool
    """Whether `match` reads an image and a text together, as a Q-Former's ITM does."""

    image_size: int
    """Side in pixels that images are resized to."""
    max_length: int
    """Longest text in tokens, with begin and end. Longer texts are truncated."""

    def identity(self) -> Identity: ...

    def load(self, device: str = "cpu") -> Self:
        """Read the weights and return self. Raises InputError if their digests differ from those in recipe.json."""

    def image_features(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) with P = `image_size` -> fp32 (B, Q, F) on the CPU."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """B texts -> fp32 (B, F) on the CPU."""

    def match(self, pixels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """How well each image and each of its own texts belong together: fp32 on the CPU, a tensor per image.

        These are log-odds if `reads_pairs`. Otherwise they are the similarities of the features.
        """


class Generator(Protocol):
    """Prompts and seeds to images."""

    size: tuple[int, int]
    """Default height and width of an image."""
    options: Any
    """The default sampling options: a frozen dataclass whose fields become flags, manifest columns, PNG text chunks and
    request fields. Its method ``shortened`` returns options for a warm-up: every kernel runs with the least work."""
    max_tokens: int
    """Longest prompt in tokens, including the begin and end tokens. Longer prompts are truncated."""
    decides_by_code: bool
    """Whether images come from discrete codes. Then one rounding error can change a whole patch."""

    def identity(self) -> Identity: ...

    def check(self, options: Any, size: tuple[int, int]) -> None:
        """Raise OptionError for options, or a (height, width) `size`, that this generator does not support."""

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights and return self. Raises InputError if their digests differ from those in recipe.json."""

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, including begin and end. Safe while `generate` runs in a thread."""

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        """The words of each prompt that it cannot tell from each other. Safe beside `generate` on another thread."""

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: Any,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """One image per prompt and seed, uint8 (B, H, W, 3). No image depends on the others of the batch.

        `on_step(done, total)` is called after each step. An exception that it raises stops the work.
        """


def capped_fields(options: Any) -> dict[str, str]:
    """The names of the fields of `options` with the metadata ``caps``, keyed by that: "words" or "beams"."""
    return {field.metadata["caps"]: field.name for field in dataclasses.fields(options) if "caps" in field.metadata}


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the optimisation. Every recipe has them in its field `train`."""

    num_epochs: int = 50
    """Passes over the training rows. The training ends earlier if `max_steps` is reached."""
    max_steps: int | None = None
    """Stop after this many steps, even if `num_epochs` is not reached. None trains all epochs. The schedule ends with
    the last step."""
    batch_size: int = 24
    """Rows of one optimiser step, summed over all workers. It does not change with the number of workers."""
    gradient_accumulation: int = 1
    """Micro-batches per worker and step, to save memory."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """adam adds the weight decay to the gradient (L2); adamw decouples it."""
    fused_optimizer: bool = True
    """Use PyTorch's fused optimiser. A U-Net of 9 M took 0.21 instead of 0.28 s per step (one CPU thread, bf16)."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = 1e-4
    """Weight decay of all trainable parameters."""
    schedule: Literal["constant", "cosine", "step", "linear_tail"] = "constant"
    """Learning-rate schedule after the warm-up. cosine falls to 0 at the last step. step multiplies by 0.1 at
    the epoch `--step-epoch`. linear_tail is constant for 60 % of the steps, then falls linearly to 2 %."""
    step_epoch: int = 30
    """Epoch at which the schedule `step` multiplies by 0.1."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    clip_grad_norm: float | None = 1.0
    """Largest L2 norm of the gradient; None does not clip."""
    ema_decay: float | None = None
    """Decay of the exponential moving average (EMA) of the weights. The EMA is validated and saved. None has no EMA."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto is bf16 autocast if the device supports bf16, else fp32."""
    frozen_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the model's frozen parts. auto stores weights in bf16 if bf16 autocast would cast them in every
    step, with equal results. Other values compute the frozen parts in that precision."""
    compile: bool = False
    """Compile the model with torch.compile. It pays in long runs only. A captioner of 7 M compiled in 13 s and then
    took 14 % less per step (one CPU thread, bf16). A U-Net of 9 M took over 8 minutes to compile. A resumed run is then
    exact only up to rounding, as shapes may be compiled in another order."""
    activation_checkpointing: bool = False
    """Recompute the model's blocks in the backward pass to save memory, with bit-identical results. A U-Net of 9 M kept
    18 instead of 66 MB, a captioner of 7 M 4 instead of 44 MB. Their steps took 33 % and 20 % longer (one CPU
    thread)."""
    seed: int = 2024
    """Seed of everything random."""
    keep: Literal["best", "last"] = "best"
    """Weights that a finished run saves: those with the lowest validation loss, or the last ones."""
    validate_every_epochs: int = 1
    """Epochs between validations. The last step is always validated."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints. Each validation also writes one."""
    log_every_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    num_samples: int = 4
    """Validation rows whose samples are written at each validation."""

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, each with the flag that would make it effective."""
        return {} if self.schedule == "step" else {"step_epoch": "--schedule step"}


def check_effect(recipe: Any, variant: Any) -> None:
    """Raise InputError for a field that differs from `variant` but has no effect, by ``recipe.without_effect()``.

    Fields equal to the variant pass. A variant may set sizes of a part that another flag replaces.
    """
    ignored: dict[str, str] = getattr(recipe, "without_effect", dict)()
    for field in dataclasses.fields(recipe):
        mine, theirs = getattr(recipe, field.name), getattr(variant, field.name)
        if dataclasses.is_dataclass(mine):
            check_effect(mine, theirs)
        elif mine != theirs and field.name in ignored:
            flag = "--" + field.name.replace("_", "-")
            raise InputError(
                f"{flag} {mine}: has no effect without {ignored[field.name]}; give that too, or leave {flag} out"
            )


def recipe_to_json(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe as JSON, nested dataclasses as nested objects."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def recipe_from_json(recipe_type: type[T], fields: dict[str, Any], where: str) -> T:
    """Build `recipe_type` from the fields that `recipe_to_json` returned.

    Raises InputError, naming `where`, for unknown fields and for missing fields without a default.
    """
    known = {field.name: field for field in dataclasses.fields(recipe_type)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InputError(
            f"{where}: written by another version of the code, with unknown fields {', '.join(unknown)}; go on with "
            "that version, whose commit recipe.json names"
        )
    needed = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in fields]
    if missing:
        raise InputError(f"{where}: missing fields {', '.join(missing)}; copy the file again")
    types = get_type_hints(recipe_type)
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            # The type itself, or a union of one dataclass and None.
            kinds = (types[name], *get_args(types[name]))
            (kind,) = (each for each in kinds if dataclasses.is_dataclass(each) and isinstance(each, type))
            values[name] = recipe_from_json(kind, value, f"{where}: {name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return recipe_type(**values)


def difference(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields that differ between two JSON recipes, as ``lr: 0.1 (there: 0.2)``."""
    lines: list[str] = []
    for name in sorted(set(mine) | set(theirs)):
        here, there = mine.get(name), theirs.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            lines += difference(here, there, f"{prefix}{name}.")
        elif here != there:
            lines.append(f"{prefix}{name}: {_short(here)} (there: {_short(there)})")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
