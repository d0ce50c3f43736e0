"""A text-to-image pipeline of diffusers as a generator: SDXL, Stable Diffusion and others, with LoRA adapters.

A pipeline is a folder with model_index.json, or a model of the hub. It loads from safetensors alone, and no code of the
folder is run.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcore.checkpoint import sha256_folder
from mmcore.errors import InputError, OptionError
from mmcore.frozen.hub import not_found, quiet_load, say_fetch
from mmcore.frozen.pretrained import absolute_folder
from mmcore.generators.pipeline_options import PipelineOptions, PipelineSampler
from mmcore.recipe import Identity
from mmcore.storage import Storage
from mmcore.temporary import temporary_folder
from mmcore.trained.lora import LORA_FILE, adapter_sha256, is_lora_run, read_adapter

HUB = "hf://"
"""Before the name of a model on the hub."""
INDEX = "model_index.json"
# What decides the images of a folder.
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
# Others keep their guidance elsewhere, or take more than a prompt.
_CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_SAMPLERS: dict[PipelineSampler, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    # The default clips latents to [-1, 1], as if they were pixels.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}
# What a step reads of the prompts. Without guidance its second half alone is left.
_OF_PROMPTS = ("prompt_embeds", "add_text_embeds", "add_time_ids")


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter and its strength."""

    uri: str
    scale: float = 1.0

    def read(self) -> bytes:
        """The file of the adapter. Raises InputError if there is none."""
        place = Storage(self.uri)
        if is_lora_run(place):
            return read_adapter(place)
        for folder, name in ((place, LORA_FILE), (place.parent, place.name)):
            if name.endswith(".safetensors") and folder.exists(name):
                return folder.read(name)
        raise InputError(
            f"--lora {self.uri}: no adapter there; name a .safetensors file, or a folder or a finished run with "
            f"{LORA_FILE}"
        )

    def sha256(self) -> str:
        """What decides the adapter: the weights and the strength of a run, or the bytes of a file."""
        place = Storage(self.uri)
        return adapter_sha256(place) if is_lora_run(place) else hashlib.sha256(self.read()).hexdigest()


def parse_lora(text: str) -> Lora:
    """``URI[:SCALE]``. Raises InputError for a scale that is not above 0."""
    uri, colon, scale = text.rpartition(":")
    try:
        strength = float(scale) if colon else None
    except ValueError:
        strength = None
    if strength is None:
        return Lora(text)
    if not strength > 0 or strength == float("inf"):
        raise InputError(f"--lora {text}: the scale {scale} must be above 0 and finite")
    return Lora(uri, strength)


def names_pipeline(source: str) -> bool:
    """Whether `source` is a name on the hub behind `HUB`, or a folder of a pipeline."""
    return source.startswith(HUB) or (Path(source) / INDEX).is_file()


class TrainedPipeline:
    """A pipeline with its adapters. Reads no weights before `load`."""

    pipeline: Any
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self, model: str, revision: str | None = None, loras: Sequence[Lora] = (), trained_on: str | None = None
    ) -> None:
        """`model`: folder or name on the hub. `revision`: commit, branch or tag of the hub, by default its newest.
        `trained_on`: what `files_or_commit` must be, as an adapter was trained on it; `load` checks it.

        Raises InputError if there is no such pipeline, or if it is no pipeline from text to images.
        """
        # Absolute, as `load` may run in another working directory.
        self.model, self.loras = absolute_folder(model), tuple(loras)
        self.trained_on, self.folder = trained_on, _fetched_settings(model, revision)
        self.revision = self.folder.name if not Path(model).is_dir() else None
        if self.revision is None and revision is not None:
            raise InputError(f"--revision {revision}: is for models of the hub, and {model} is a folder")
        self.class_name = _class_name(self.folder, model)
        self.size: tuple[int, int] = (_side(self.folder),) * 2
        self.scheduler = _read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.num_timesteps: int = self.scheduler.get("num_train_timesteps", 1000)
        self.max_tokens: int = _max_tokens(self.folder)
        self.decides_by_code = False
        sampler: PipelineSampler = "dpmsolver++" if self._can_sample("dpmsolver++") else "own"
        self.options = PipelineOptions(sampler=sampler)

    def identity(self) -> Identity:
        """The model by its commit on the hub, or by the SHA-256 of its files, and the same of each adapter."""
        own = {"revision" if self.revision else "files_sha256": self.files_or_commit()}
        adapters = [{"uri": lora.uri, "scale": lora.scale, "sha256": lora.sha256()} for lora in self.loras]
        return {"model": self.model, **own, **({"loras": json.dumps(adapters)} if adapters else {})}

    def files_or_commit(self) -> str:
        """The commit of a model on the hub, or the SHA-256 of a folder's files."""
        return self.revision or sha256_folder(self.folder, _SUFFIXES)

    def _can_sample(self, sampler: PipelineSampler) -> bool:
        if sampler == "own":
            return True
        import diffusers

        own = getattr(diffusers, self.scheduler.get("_class_name", ""), None)
        names = {self.scheduler.get("_class_name")} | {str(each).split(".")[-1] for each in _compatible(own)}
        return _SAMPLERS[sampler][0] in names

    def check(self, options: PipelineOptions, size: tuple[int, int]) -> None:
        options.check(self.num_timesteps)
        if not self._can_sample(options.sampler):
            raise OptionError(
                "sampler",
                f"{options.sampler}: does not fit {self.scheduler.get('_class_name')} of this model; give own",
            )
        if any(side % 8 or side < 8 for side in size):
            raise OptionError("size", f"{size[1]}x{size[0]}: the sides must be multiples of 8")

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Read the weights in `dtype` and return self.

        Raises InputError for missing weights, or for an adapter that does not fit.
        """
        import diffusers
        from diffusers.utils import logging

        logging.disable_progress_bar()
        self.device, self.dtype = torch.device(device), dtype
        if self.trained_on is not None and self.trained_on != (found := self.files_or_commit()):
            raise InputError(
                f"{self.model}: this model ({found[:12]}) is not the one that the adapter was trained on "
                f"({self.trained_on[:12]}); restore that one, or train again"
            )
        where = {"revision": self.revision} if self.revision else {}
        say_fetch(self.model, INDEX, what="the weights of")
        try:
            with quiet_load():
                pipeline = getattr(diffusers, self.class_name).from_pretrained(
                    self.model, use_safetensors=True, dtype=dtype, trust_remote_code=False, **where
                )
        except (OSError, ValueError) as error:
            raise not_found(self.model, "--model", "pipeline of diffusers with safetensors", error) from None
        pipeline.set_progress_bar_config(disable=True)
        # The watermark is drawn on the CPU after the decoder; the manifest says what an image is.
        if hasattr(pipeline, "watermark"):
            pipeline.watermark = None
        for number, lora in enumerate(self.loras):
            self._add(pipeline, lora, f"lora{number}")
        if self.loras:
            pipeline.set_adapters([f"lora{number}" for number in range(len(self.loras))], [x.scale for x in self.loras])
        self.pipeline = pipeline.to(self.device)
        network = getattr(pipeline, "unet", None)
        if network is not None and self.device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        self._own_scheduler = pipeline.scheduler
        return self

    def _add(self, pipeline: Any, lora: Lora, name: str) -> None:
        """Load an adapter. Raises InputError if it does not fit, also if only a part of it does."""
        data = lora.read()
        # A file and not its tensors, as diffusers reads the adapter's alpha from the file's metadata.
        with temporary_folder("lora") as folder:
            (folder / LORA_FILE).write_bytes(data)
            try:
                names = load_file(folder / LORA_FILE).keys()
                pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=name)
            except (ValueError, RuntimeError, LookupError, OSError, SafetensorError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                reason = "no layer of it is known" if isinstance(error, LookupError) else " ".join(lines[:2])
                raise InputError(f"--lora {lora.uri}: does not fit {self.model} ({reason})") from None
        wanted = sum(".lora_A." in each or "lora_down." in each or ".lora.down." in each for each in names)
        parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        loaded = sum(name in getattr(module, "lora_A", ()) for part in parts for module in part.modules())
        if loaded != wanted:
            raise InputError(f"--lora {lora.uri}: {loaded} of its {wanted} layers are in {self.model}; name its model")

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = self.pipeline.tokenizer
        return [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        """None: the tokenizers of these models split every word into known parts."""
        return [[] for _ in prompts]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: PipelineOptions,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """See `Generator.generate`. Each image has a generator of random numbers on the CPU."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: give one seed per prompt")
        height, width = size or self.size
        self.check(options, (height, width))
        self._set_sampler(options.sampler)
        guided = options.guidance > 1

        def after_step(pipeline: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, options.steps)
            if guided and step + 1 == options.guided_steps < options.steps:
                pipeline._guidance_scale = 1.0
                return {name: _second_half(value) for name, value in kept.items()}
            return {}

        known = self.pipeline._callback_tensor_inputs
        images = self.pipeline(
            prompt=list(prompts),
            # None is not the empty text: SDXL then guides away from zeros.
            negative_prompt=[options.negative_prompt] * len(prompts) if options.negative_prompt else None,
            height=height,
            width=width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=[name for name in _OF_PROMPTS if name in known],
        ).images
        pixels = images.float().clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _set_sampler(self, sampler: PipelineSampler) -> None:
        import diffusers

        if sampler == "own":
            self.pipeline.scheduler = self._own_scheduler
            return
        name, settings = _SAMPLERS[sampler]
        # A sampler's configuration is numbers, so there is no code to trust.
        configured = getattr(diffusers, name).from_config
        self.pipeline.scheduler = configured(self._own_scheduler.config, **settings)


def _second_half(values: Tensor) -> Tensor:
    """The rows with a prompt: the pipelines compute those without one first."""
    return values.chunk(2)[1]


def _compatible(scheduler: Any) -> list[Any]:
    return list(getattr(scheduler, "_compatibles", []))


def _fetched_settings(model: str, revision: str | None) -> Path:
    """The folder with the settings of a pipeline. Of a model on the hub, its name is the commit."""
    if Path(model).is_dir():
        if not (Path(model) / INDEX).is_file():
            raise InputError(f"--model {model}: no {INDEX} in this folder; name a folder of a pipeline of diffusers")
        return Path(model).absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    say_fetch(model, INDEX)
    try:
        with quiet_load():
            return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.txt"]))
    except (OSError, ValueError, HFValidationError) as error:
        raise not_found(model, "--model", "pipeline of diffusers", error) from None


def _class_name(folder: Path, model: str) -> str:
    """The pipeline's class. Raises InputError for code of the folder, or a class that is not supported."""
    if not (folder / INDEX).is_file():
        raise InputError(f"--model {model}: there is no {INDEX}; name a pipeline of diffusers")
    name = _read_json(folder / INDEX).get("_class_name")
    if name not in _CLASSES:
        raise InputError(f"--model {model}: {name} of {INDEX} is not supported; name one of {', '.join(_CLASSES)}")
    return str(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from None


def _side(folder: Path) -> int:
    """Default side of an image in pixels."""
    network = next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), None)
    if network is None:
        raise InputError(f"{folder}: has neither unet/ nor transformer/; name another pipeline")
    levels = len(_read_json(folder / "vae" / "config.json").get("block_out_channels", [0] * 4))
    return int(_read_json(network / "config.json").get("sample_size", 128)) * 2 ** (levels - 1)


def _max_tokens(folder: Path) -> int:
    settings = folder / "tokenizer" / "tokenizer_config.json"
    return int(_read_json(settings).get("model_max_length", 77)) if settings.is_file() else 77
