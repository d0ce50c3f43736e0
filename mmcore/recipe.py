"""The contracts: what a recipe, a captioner, a generator and an autoencoder are to jobs and to the service.

A recipe is what a training is told. What it trained is opened by ``open_captioner``, ``open_generator`` or
``open_autoencoder`` (``mmcore.trained``), the one door for all that uses it. Opening reads facts alone, so that a
driver or a service can check a request, and what is opened can be sent to another machine; ``load`` then reads the
weights, there and on the device that is to compute.

Shapes: B images, H rows, W columns, C channels of a latent with h rows and w columns.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from mmcore.errors import InputError

T = TypeVar("T")
Identity = dict[str, str]
"""What a model is made of: names to URIs, digests and revisions. Equal identities give equal outputs."""


class Recipe(Protocol):
    """Everything about one model: data, sizes, optimisation. A frozen dataclass beside its model."""

    @property
    def dataset(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def train(self) -> "TrainSettings": ...


class Captioner(Protocol):
    """Images to captions."""

    image_size: int
    """Pixels a side that images are squashed to."""
    max_length: int
    """Words at which a caption ends whatever the options ask for."""
    options: Any
    """The default search: a frozen dataclass whose fields become flags and fields of a request (there under the name in
    the field's metadata ``api``, where that is another). The metadata ``caps`` of the field with the most words of a
    caption is "words", that of the field with the beams is "beams": the service sets both."""
    takes_prompt: bool
    """Whether words beside an image change its caption."""

    def identity(self) -> Identity: ...

    def check(self, options: Any) -> None:
        """Raise OptionError for a search that this captioner cannot do."""

    def load(self, device: str = "cpu") -> Self:
        """Read the weights; returns itself. Raises InputError where they are not those that the facts name."""

    def caption(self, pixels: np.ndarray, options: Any, prompts: Sequence[str] | None = None) -> list[str]:
        """uint8 (B, P, P, 3) with P `image_size` -> B captions."""


class Generator(Protocol):
    """Prompts and seeds to images."""

    size: tuple[int, int]
    """Height and width of an image where nobody asks for another size."""
    options: Any
    """The default sampling: a frozen dataclass whose fields become flags, columns, text chunks and request fields. Its
    method ``shortened`` gives the same with as little work as shows every kernel."""
    max_tokens: int
    """Tokens of a prompt, with begin and end, beyond which its tail is lost."""
    decides_by_code: bool
    """Whether images come from discrete codes, where the last bit of a sum can change a whole patch."""

    def identity(self) -> Identity: ...

    def check(self, options: Any, size: tuple[int, int]) -> None:
        """Raise OptionError for options or a (height, width), named ``size``, that this generator cannot do."""

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights; returns itself. Raises InputError where they are not those that the facts name."""

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, with begin and end, before any is cut. Safe beside `generate` on another thread."""

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: Any,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """An image of each prompt and seed, uint8 (B, H, W, 3); none depends on its batch-mates.

        `on_step(done, total)` is called as the work goes on, and what it raises ends the work.
        """


class Autoencoder(Protocol):
    """Images to latents and back."""

    image_size: int
    latent_shape: tuple[int, int, int]
    """(C, h, w) of an image of `image_size`."""
    num_codes: int
    """Codes in the codebook."""
    code_shape: tuple[int, int]
    """(h, w) of the codes of an image of `image_size`."""

    def identity(self) -> Identity: ...

    def load(self, device: str = "cpu") -> Self:
        """Read the weights; returns itself. Raises InputError where they are not those that the facts name."""

    def encode(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> latents (B, C, h, w), before any quantisation."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, P, P) in [-1, 1]."""

    def codes(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> the number of the code nearest to each latent, int64 (B, h, w)."""

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Numbers of codes, int64 (B, h, w) -> images (B, 3, P, P) in [-1, 1]."""


def capped_fields(options: Any) -> dict[str, str]:
    """What fields of a captioner's `options` cap, "words" or "beams", to the names of the fields."""
    return {field.metadata["caps"]: field.name for field in dataclasses.fields(options) if "caps" in field.metadata}


@dataclass(frozen=True)
class TrainSettings:
    """How a model is optimised; every recipe holds one as `train`."""

    num_epochs: int = 50
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many steps, whatever `num_epochs` says (the schedule ends there too)."""
    batch_size: int = 24
    """Rows of one optimiser step, over all workers; constant whatever their number."""
    gradient_accumulation: int = 1
    """Micro-batches that a worker's share of a step is cut into, to fit its memory."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """adam adds the weight decay to the gradient (L2), adamw decouples it."""
    fused_optimizer: bool = True
    """Move each weight in one pass: on one CPU thread in bf16, a step of a U-Net of 9 M took 0.21 s, else 0.28 s."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: float = 1e-4
    """Weight decay, on every trainable parameter."""
    schedule: Literal["constant", "cosine", "step", "linear_tail"] = "constant"
    """cosine falls from the end of the warm-up to 0 at the last step; step multiplies by 0.1 at `step_epoch`;
    linear_tail is constant for the first 60 % of the steps and then falls in a straight line to 2 %."""
    step_epoch: int = 30
    """Epoch of the fall of the `step` schedule."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    clip_grad_norm: float | None = 1.0
    """Largest L2 norm of the whole gradient; None does not clip."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights that is validated and kept; None keeps the weights."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto is bf16 autocast where the device has it, else fp32."""
    frozen_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of a model's frozen parts. auto holds in bf16 what bf16 autocast would cast anew each time, with equal
    results, and leaves the rest as it was loaded; any other computes a frozen part in that precision throughout."""
    compile: bool = False
    """Compile the model with torch.compile. Off, since it pays in long runs only: on one CPU thread in bf16, a step of
    a captioner of 7 M took 14 % less after 13 s; a U-Net of 9 M took over 8 minutes on a shared machine to compile.
    Resuming is then exact only up to rounding, since other shapes may be compiled first."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the model's blocks and compute them again in the backward pass, to the same bits. Off,
    since it pays where memory is short only: a U-Net of 9 M kept 18 MB where it kept 66 MB, a captioner of 7 M 4 MB
    where it kept 44 MB; on one CPU thread their steps took 33 % and 20 % longer."""
    seed: int = 2024
    """Everything random derives from it."""
    keep: Literal["best", "last"] = "best"
    """The weights that a finished run holds: those of the lowest validation loss, or the last ones."""
    validate_every_epochs: int = 1
    """Epochs between validations; the last step is always validated."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints, beside the one at each validation."""
    log_every_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    num_samples: int = 4
    """Validation rows whose output is written out at each validation."""

    def without_effect(self) -> dict[str, str]:
        """Fields that these settings leave without effect, each with the flag that would give it one."""
        return {} if self.schedule == "step" else {"step_epoch": "--schedule step"}


def check_effect(recipe: Any, variant: Any) -> None:
    """Raise InputError for a field in which `recipe` departs from its `variant` although its other settings leave that
    field without effect, by its ``without_effect()``.

    Only for what departs, since a flag that changes the kind of a part must not call for others that undo the sizes
    which the variant gives to the part of the other kind.
    """
    ignored: dict[str, str] = getattr(recipe, "without_effect", dict)()
    for field in dataclasses.fields(recipe):
        mine, theirs = getattr(recipe, field.name), getattr(variant, field.name)
        if dataclasses.is_dataclass(mine):
            check_effect(mine, theirs)
        elif mine != theirs and field.name in ignored:
            flag = "--" + field.name.replace("_", "-")
            raise InputError(
                f"{flag} {mine}: has no effect without {ignored[field.name]}; give that, or leave {flag} out"
            )


def recipe_to_json(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe as JSON, nested dataclasses as nested objects."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def recipe_from_json(recipe_type: type[T], fields: dict[str, Any], where: str) -> T:
    """Build `recipe_type` from what `recipe_to_json` gave.

    Raises InputError, naming `where`, for unknown keys and for missing ones that have no default.
    """
    known = {field.name: field for field in dataclasses.fields(recipe_type)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InputError(f"{where}: unknown fields {', '.join(unknown)}; this version knows {', '.join(known)}")
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
            values[name] = recipe_from_json(types[name], value, f"{where}: {name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return recipe_type(**values)


def difference(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two JSON recipes differ, as ``lr: 0.1 (there: 0.2)``."""
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
