"""What the jobs that train a generator share: their way, the text, the prompts, the sample images."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from jobs.runtime.features import cached_text_column, read_null
from jobs.runtime.job import Job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, Flow, parameters, say_what_is_cut, train_by, train_captions
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.pixels import to_pixels
from mmcore.data.prepared import CaptionTable
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.text import FrozenTextEncoder, PromptTokenizer, TextInputs
from mmcore.frozen.tokenizers import WORDS
from mmcore.generators.facts import AutoregressiveFacts, DiffusionFacts, InfinityFacts
from mmcore.generators.prompt_rows import PromptEmbeddings, PromptIds, Prompts
from mmcore.images import image_grid
from mmcore.rows import Batch
from mmcore.run_files import TOKENIZER_ASSET
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.training_plan import resolve_precision

F = TypeVar("F", DiffusionFacts, AutoregressiveFacts, InfinityFacts)
GeneratorFacts = DiffusionFacts | AutoregressiveFacts | InfinityFacts
Text = PromptTokenizer | FrozenTextEncoder


@dataclass(frozen=True)
class GeneratorKind(Generic[F]):
    """What is a kind of generator's own. Its recipe has `captions_per_image` and `text` (`TextSettings`)."""

    facts: Callable[[Job[Any], TextInputs], F]
    """Facts of that kind, with the sizes of what is generated."""
    describe: Callable[[Job[Any], F, Text, int], None]
    """Prints sizes and steps for a number of training rows. Raises InputError for what does not fit."""
    encode: Callable[[Job[Any], CaptionTable, F], Encoded[Any, F]]
    """Makes the columns of what the network learns to generate."""
    columns: Callable[[Job[Any], F], dict[str, TensorSpec]]
    """What is cached of an image, beside its text."""
    setup: Callable[[Job[Any], F, Doing], Setup]
    """Model and rows, on a worker."""
    cached: Callable[[Job[Any], CaptionTable], int] = lambda job, table: len(table.image_ids)
    """How many images that is cached of, for a dry run."""
    reads: Callable[[Job[Any]], str] = lambda job: ""
    """What is read beside the data and the text encoder, for a dry run."""
    check: Callable[[Job[Any]], object] = lambda job: None
    """Raises InputError for what can be refused without any data."""
    more_captions: Callable[[Job[Any], CaptionTable], list[str]] = lambda job, table: []
    """Such as are trained on beside those of the data: for their words, and to tell how many of both are cut."""


def train_generator(job: Job[Any], kind: GeneratorKind[F]) -> RunSummary:
    """Make what is missing (Shapes, the columns, the frozen encoder's hidden states), then train. Returns the summary.

    Raises InputError before anything is written for a run, settings or data that cannot be.
    """
    opened: list[Text] = []  # once, as a frozen encoder may be large
    lengths: list[int] = []

    def plan(job: Job[Any], table: CaptionTable) -> F:
        captions, more = train_captions(table, job.recipe.captions_per_image), kind.more_captions(job, table)
        opened.append(open_text(job.recipe, captions, more))
        tokenizer = opened[0] if isinstance(opened[0], PromptTokenizer) else opened[0].tokenize
        lengths.extend(tokenizer.lengths(captions + more))
        facts = kind.facts(job, text_inputs(opened[0]))
        return dataclasses.replace(facts, dataset_fingerprint=table.facts.get("fingerprint", ""))

    def describe(job: Job[Any], facts: F, num_train: int) -> None:
        kind.describe(job, facts, opened[0], num_train)
        mend = _longer(opened[0], job.recipe.text.max_tokens)
        say_what_is_cut(job, lengths, lambda recipe: recipe.text.max_tokens, mend)

    def encode(job: Job[Any], table: CaptionTable, facts: F) -> Encoded[Any, F]:
        encoded = kind.encode(job, table, facts)
        stored = store_text(encoded.job, table, opened[0])
        facts = dataclasses.replace(encoded.facts, text_fingerprint=stored.fingerprint, text=stored.path)
        return dataclasses.replace(encoded, facts=facts)

    def columns(job: Job[Any], facts: F) -> dict[str, TensorSpec]:
        width, recipe = facts.text_inputs.width, job.recipe
        text = {} if width is None else {"text": (recipe.captions_per_image, recipe.text.max_tokens, width)}
        return kind.columns(job, facts) | {name: TensorSpec("float16", shape) for name, shape in text.items()}

    def reads(job: Job[Any]) -> str:
        text = job.recipe.text
        return ", ".join(filter(None, [kind.reads(job), "" if text.is_scratch else text.text_encoder]))

    def check(job: Job[Any]) -> Job[Any]:
        if job.options.stream:
            raise InputError("--stream: this recipe looks its rows up on the worker's disk; leave it out")
        kind.check(job)
        # As a worker, and whoever reads the finished run from elsewhere, finds them.
        text = job.recipe.text
        text = dataclasses.replace(
            text, text_encoder=absolute_folder(text.text_encoder), tokenizer=absolute_folder(text.tokenizer)
        )
        return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, text=text))

    return train_by(Flow(check, plan, describe, encode, columns, kind.setup, kind.cached, reads), job)


def text_sizes(model: nn.Module, text: Text) -> dict[str, int]:
    """Parameters of what reads the captions, by its name: `model`, which is trained, and what is frozen before it."""
    if isinstance(text, FrozenTextEncoder):
        return {"the projection of the text": parameters(model), f"the frozen {text.name}": parameters(text.model)}
    return {"the text encoder": parameters(model)}


def _longer(text: Text, max_tokens: int) -> str:
    """What helps captions that are too long."""
    if isinstance(text, FrozenTextEncoder) and max_tokens == text.model.config.to_dict().get("max_position_embeddings"):
        return f"{text.name} reads no more"
    return "raise --max-tokens"


# -- text ----------------------------------------------------------------------------------------------------------


def open_text(recipe: Any, captions: list[str], more: list[str]) -> Text:
    """The frozen text encoder, or the tokenizer of the one that is trained along.

    One of words knows those of `captions`, and of `more` where they lack some.
    """
    text = recipe.text
    if not text.is_scratch:
        return FrozenTextEncoder(text.text_encoder, text.max_tokens)
    if text.tokenizer != WORDS:
        return PromptTokenizer.from_name(text.tokenizer, text.max_tokens)
    words = PromptTokenizer.of_words(captions, text.max_tokens)
    unknown = words.tokenizer.unk_token_id
    lacking = bool(more) and any(unknown in ids for ids in words.tokenizer(more, verbose=False)["input_ids"])
    # Otherwise every word keeps its id, which goes by how often it occurs: an unfinished run then goes on.
    return PromptTokenizer.of_words(captions + more, text.max_tokens) if lacking else words


def text_inputs(text: Text) -> TextInputs:
    """What the network is fed of it."""
    if isinstance(text, PromptTokenizer):
        return text.inputs()
    return TextInputs(width=text([""]).shape[-1])


class StoredText(NamedTuple):
    """Where the tokenizer, or the hidden states of a frozen encoder, lie."""

    fingerprint: str
    """Of the tokenizer, or of the encoder."""
    path: tuple[str, ...]
    """Under the storage."""


def store_text(job: Job[Any], table: CaptionTable, text: Text) -> StoredText:
    """Write the tokenizer to the storage, or cache the hidden states of a frozen encoder there."""
    fingerprint = text.fingerprint()
    if isinstance(text, PromptTokenizer):
        folder = job.storage / "tokenizers" / fingerprint[:24]
        for name, data in text.files().items():
            folder.create(name, data)
        return StoredText(fingerprint, (folder.parent.name, folder.name))
    column = cached_text_column(
        job.storage,
        table,
        encoder=text,
        max_tokens=job.recipe.text.max_tokens,
        captions_per_image=job.recipe.captions_per_image,
        stall_timeout_s=job.options.stall_timeout,
    )
    return StoredText(fingerprint, (column.folder.parent.name, column.folder.name))


# -- on a worker ---------------------------------------------------------------------------------------------------


def _text_folder(job: Job[Any], facts: GeneratorFacts) -> Storage:
    """Where in the storage the tokenizer or the hidden states lie."""
    parent, name = facts.text
    return job.storage / parent / name


def read_tokenizer(job: Job[Any], facts: GeneratorFacts) -> PromptTokenizer:
    """The tokenizer of a text encoder that is trained along."""
    return PromptTokenizer.read(_text_folder(job, facts), job.recipe.text.max_tokens)


def read_prompts(job: Job[Any], facts: GeneratorFacts, table: CaptionTable, doing: Doing) -> Prompts:
    """The captions of all rows, as the network takes them."""
    recipe = job.recipe
    if recipe.text.is_scratch:
        captions = [row[: recipe.captions_per_image] for row in table.captions]
        return PromptIds(captions, read_tokenizer(job, facts))
    folder = _text_folder(job, facts)
    return PromptEmbeddings(open_column(folder, default_cache(), doing=doing), read_null(folder), table.image_ids)


def text_assets(job: Job[Any], facts: GeneratorFacts) -> dict[str, Storage]:
    """What a finished run keeps a copy of: the tokenizer of a text encoder that is trained along."""
    return {TOKENIZER_ASSET: _text_folder(job, facts)} if job.recipe.text.is_scratch else {}


def sample_grids(
    recipe: Any,
    table: CaptionTable,
    validation: np.ndarray,
    prompts: Prompts,
    images: Callable[[Any, Batch, Batch, list[int]], Tensor],
) -> Callable[[nn.Module, int], dict[str, Any]]:
    """What makes `samples` of a `Setup`: the same prompts, the first validation rows' first captions, and seeds each
    time.

    Args:
        validation: the rows of the dataset that validate.
        images: of a model, prompts, as many empty ones and seeds, images (B, 3, P, P) in [-1, 1].
    """
    chosen = validation[: recipe.train.num_samples].tolist()
    seeds = [derive_seed(recipe.train.seed, "sample", number) for number in range(len(chosen))]

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        if not chosen:
            return {}
        parameter = next(model.parameters())
        device = parameter.device

        def batch(captions: list[int | None]) -> Batch:
            return {
                name: each.to(device, parameter.dtype if each.is_floating_point() else None)
                for name, each in prompts.batch(chosen, captions).items()
            }

        in_bf16 = resolve_precision(recipe.train, device) == "bf16"
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            made = images(model, batch([0] * len(chosen)), batch([None] * len(chosen)), seeds)
            pixels = to_pixels(made).cpu().numpy()
        return sample_grid(pixels, table, chosen)

    return samples


def sample_grid(pixels: np.ndarray, table: CaptionTable, rows: Sequence[int]) -> dict[str, Any]:
    """A square grid of images, uint8 (N, H, W, 3), and their prompts: the first captions of `rows`."""
    prompts = " | ".join(table.captions[row][0] for row in rows)
    return {"grid": image_grid(pixels, math.ceil(math.sqrt(len(pixels)))), "prompts": prompts}
