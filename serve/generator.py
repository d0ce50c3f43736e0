"""A generator of images in a replica: batches of equal settings and one size, progress, and work that can be let go."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np

from mmcore.device import compute_thread
from mmcore.errors import OptionError
from mmcore.storage import Storage
from serve import hardware
from serve.batching import Batcher
from serve.errors import ApiError, bad_value
from serve.limits import Limits
from serve.metrics import configure_logging, facts_of, log_work
from serve.schemas import GenerateWork

# As jobs/generate.py does by default.
_SAMPLER: Literal["dpmsolver++"] = "dpmsolver++"
_CPU_BATCH_SIZE, _GPU_BATCH_SIZE = 4, 8

# What an image of a batch is made of: prompt, negative prompt, seed.
Sample = tuple[str, str | None, int]


class GeneratorModel(Protocol):
    """What the replica needs of a generator; the only place that knows the trained ones is `load_generator`."""

    resolution: int
    device: str
    defaults: dict[str, Any]

    def check(self, work: GenerateWork, max_tokens: int) -> None:
        """Raise ApiError for what this model cannot do."""

    def generate(
        self, samples: Sequence[Sample], steps: int, guidance: float, on_step: Callable[[int, int], None]
    ) -> np.ndarray:
        """uint8 (B, H, W, 3)."""

    def png(self, image: np.ndarray, text: dict[str, str]) -> bytes: ...


class _Trained:
    """A finished run of a generator."""

    def __init__(self, run: Storage, text_encoder: str | None, device: str) -> None:
        from mmcore.trained.generator import open_generator

        self.device = device
        self._generator = open_generator(run.uri, text_encoder=text_encoder).load(device)
        self.resolution = self._generator.size[0]
        options = self._generator.options
        self.defaults = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}

    def check(self, work: GenerateWork, max_tokens: int) -> None:
        most = min(max_tokens, self._generator.max_tokens)
        for name in ("prompt", "negative_prompt"):
            text = getattr(work, name)
            num_tokens = self._generator.num_tokens([text])[0] if text is not None else 0
            if num_tokens > most:
                raise bad_value(name, f"{num_tokens} tokens with begin and end; at most {most}")
        options = self._options(work.num_inference_steps, work.guidance_scale, work.negative_prompt)
        names = {each.name: each.metadata.get("api", each.name) for each in dataclasses.fields(options)}
        try:
            # Computes nothing: this is the thread of the requests (see `compute_thread`).
            self._generator.check(options, self._generator.size)
        except OptionError as error:
            raise bad_value(names.get(error.option, error.option), error.problem) from None

    def _options(self, steps: int, guidance: float, negative_prompt: str | None) -> Any:
        changes = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt or ""}
        return dataclasses.replace(self._generator.options, **changes)

    def generate(
        self, samples: Sequence[Sample], steps: int, guidance: float, on_step: Callable[[int, int], None]
    ) -> np.ndarray:
        prompts, negatives, seeds = zip(*samples, strict=True)
        # Equal for all of a batch, as `stream` groups them.
        return self._generator.generate(prompts, seeds, self._options(steps, guidance, negatives[0]), on_step=on_step)

    def png(self, image: np.ndarray, text: dict[str, str]) -> bytes:
        from mmcore.images import png_bytes

        return png_bytes(image, text)


def load_generator(run: str, text_encoder: str | None, device: str) -> GeneratorModel:
    """The generator of a finished run, local or in S3."""
    return _Trained(Storage(run), text_encoder, device)


class _Progress:
    """Steps and places of all images of one request, told as those of one thing, and only where they change."""

    def __init__(self, num_images: int, events: "asyncio.Queue[dict[str, Any] | None]") -> None:
        self._done, self._queued, self._events = [0] * num_images, dict.fromkeys(range(num_images), -1), events
        self._told: tuple[str, int] | None = None

    def listener(self, index: int) -> "_Listener":
        return _Listener(self, index)

    def queued(self, index: int, position: int) -> None:
        self._queued[index] = position
        # The last of them tells how long it takes until all are made; it is not known before all have their place.
        last = max(self._queued.values())
        if not any(self._done) and min(self._queued.values()) >= 0:
            self._tell("queued", last, {"event": "queued", "position": last})

    def step(self, index: int, done: int, total: int) -> None:
        self._done[index] = done
        step = sum(self._done) // len(self._done)
        if step:
            self._tell("progress", step, {"event": "progress", "step": step, "total": total})

    def _tell(self, name: str, number: int, event: dict[str, Any]) -> None:
        if self._told != (name, number):
            self._told = (name, number)
            self._events.put_nowait(event)


class _Listener:
    def __init__(self, progress: _Progress, index: int) -> None:
        self._progress, self._index = progress, index

    def on_queued(self, position: int) -> None:
        self._progress.queued(self._index, position)

    def on_step(self, done: int, total: int) -> None:
        self._progress.step(self._index, done, total)


class Generator:
    """The replica. An image depends on its prompt, its seed and the request's settings, and on nothing else."""

    def __init__(self, name: str, load: Callable[[str], GeneratorModel], limits: Limits) -> None:
        """`load` is given the device."""
        configure_logging()
        self.name, self.limits = name, limits
        thread = compute_thread(hardware.num_threads(limits))
        self.model = thread.submit(load, hardware.device()).result()
        default = _CPU_BATCH_SIZE if self.model.device == "cpu" else _GPU_BATCH_SIZE
        self.batcher: Batcher[Sample, np.ndarray] = Batcher(
            self._run,
            batch_size=limits.generator_batch_size or default,
            wait_s=limits.batch_wait_s,
            max_silence_s=limits.request_timeout_s,
            thread=thread,
        )
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="png")

    def check_health(self) -> None:
        self.batcher.check()

    async def describe(self) -> dict[str, Any]:
        """As GET /v1/models shows it."""
        resolution, limits = self.model.resolution, self.limits
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "mmcore",
            "kind": "generator",
            "resolution": resolution,
            "defaults": {**self.model.defaults, "size": f"{resolution}x{resolution}"},
            "limits": {
                "n": limits.max_n,
                "job_n": limits.max_job_n,
                "num_inference_steps": limits.max_steps,
                "guidance_scale": limits.max_guidance_scale,
                "prompt_chars": limits.max_prompt_chars,
            },
        }

    async def check(self, work: GenerateWork) -> dict[str, Any] | None:
        """Why the model refuses the work, as `ApiError.as_dict`; None where it does not."""
        try:
            self.model.check(work, self.limits.max_prompt_tokens)
        except ApiError as error:
            return error.as_dict()
        return None

    async def generate(self, work: GenerateWork) -> dict[str, Any]:
        """The last event of `stream`."""
        last: dict[str, Any] = {}
        events = self.stream(work)
        try:
            async for event in events:
                last = event
        finally:
            await events.aclose()
        return last

    async def stream(self, work: GenerateWork) -> AsyncGenerator[dict[str, Any], None]:
        """Events: queued (position), progress (step, total), and at the end done (images as PNG, facts) or refused."""
        if (refusal := await self.check(work)) is not None:
            yield {"event": "refused", "error": refusal}
            return
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        progress = _Progress(len(work.seeds), events)
        group = (work.num_inference_steps, work.guidance_scale, work.negative_prompt)
        tasks = [
            asyncio.ensure_future(
                self.batcher.submit(group, (work.prompt, work.negative_prompt, seed), progress.listener(index))
            )
            for index, seed in enumerate(work.seeds)
        ]

        def end(done: "asyncio.Future[Any]") -> None:
            # Looked at also where nobody reads on: asyncio would report a fault that nobody saw.
            if not done.cancelled():
                done.exception()
            events.put_nowait(None)

        all_done = asyncio.gather(*tasks)
        all_done.add_done_callback(end)
        try:
            while (event := await events.get()) is not None:
                yield event
            results = all_done.result()
        finally:
            # Whoever stops reading stops the work.
            for task in tasks:
                task.cancel()
        loop = asyncio.get_running_loop()
        began = loop.time()
        images = await asyncio.gather(
            *(
                loop.run_in_executor(self._encoders, self.model.png, result.value, self._text(work, seed))
                for result, seed in zip(results, work.seeds, strict=True)
            )
        )
        facts = [{**facts_of(result), "encode_s": loop.time() - began} for result in results]
        log_work("generated", work.request_id, self.name, facts)
        yield {"event": "done", "images": list(images), "facts": facts}

    def _text(self, work: GenerateWork, seed: int) -> dict[str, str]:
        """What is written into the PNG, under the names of a sweep's images."""
        text = {
            "prompt": work.prompt,
            "seed": str(seed),
            "steps": str(work.num_inference_steps),
            "guidance": str(work.guidance_scale),
            "sampler": _SAMPLER,
            "model": self.name,
        }
        return text if work.negative_prompt is None else {**text, "negative_prompt": work.negative_prompt}

    def _run(
        self, group: tuple[int, float, str | None], samples: list[Sample], on_step: Callable[[int, int], None]
    ) -> list[np.ndarray]:
        steps, guidance, _ = group
        # Kernels round differently for different sizes of a batch. Filled up to one size, an image is the same to the
        # bit whoever shares its batch.
        padded = samples + samples[-1:] * (self.batcher.batch_size - len(samples))
        images = self.model.generate(padded, steps, guidance, on_step)
        return list(images[: len(samples)])
