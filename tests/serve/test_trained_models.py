"""Runs as training leaves them, served: captions and images are those of the bulk jobs."""

import asyncio
import base64
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_infinity
import torch
from PIL import Image
from serving import AUTHORIZED, GENERATIONS, KEY, InProcess, chat, data_uri, error, events_of, run, wanted
from tiny_autoregressive import write_run
from tiny_runs import write_clip, write_latent_run, write_pixel_run, write_resnet
from torch.utils._python_dispatch import TorchDispatchMode

from mmcore.captioners.search_options import SearchOptions
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_rows
from mmcore.device import compute_thread
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.generators.autoregressive import VARIANTS
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.text_context import TextSettings
from mmcore.images import read_png_text
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.generator import open_generator
from serve import hardware
from serve.bench.measuring import write_captioner
from serve.captioner import Captioner
from serve.clients import Model
from serve.generator import Generator
from serve.limits import Limits
from serve.options import options_of
from serve.routes import Service
from serve.schemas import GenerateWork
from serve.security import Keys

LIMITS = Limits(generator_batch_size=3, model_threads=1)


def pictures(number: int) -> list[bytes]:
    rows = shapes_rows(ShapesSettings(number + 2, 1, 1, 48))
    return [row["image"] for row in rows][:number]


@pytest.fixture(params=["local", "s3", "frozen encoder", "frozen encoder that was moved"])
def captioner_run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str | None]:
    """A finished run, and where its encoder lies now, if not where the run had it."""
    storage = Storage(request.getfixturevalue("s3_server") if request.param == "s3" else str(tmp_path))
    run_folder = storage / "runs" / "resnet_captioner" / "tiny"
    if "frozen" not in request.param:
        return write_captioner(run_folder, smoke=True), None
    encoder = write_resnet(tmp_path / "encoder")
    write_captioner(run_folder, smoke=True, encoder=str(encoder))
    if "moved" not in request.param:
        return run_folder, None
    return run_folder, str(encoder.rename(tmp_path / "elsewhere"))


def test_a_captioner_says_what_it_says_in_bulk(captioner_run: tuple[Storage, str | None]) -> None:
    folder, encoder = captioner_run
    images = pictures(5)
    trained = open_captioner(folder.uri, encoder=encoder).load()
    pixels = pixels_from_bytes(images, trained.image_size, [""] * 5)
    expected = trained.caption(pixels, SearchOptions(num_beams=LIMITS.caption_beams))
    captioner = Captioner("tiny", open_captioner(folder.uri, encoder=encoder).load, LIMITS)
    service = Service(
        models=[Model("tiny", "captioner", InProcess(captioner))], keys=Keys({"SERVE_API_KEYS": KEY}), limits=LIMITS
    )

    async def main() -> None:
        transport = httpx.ASGITransport(service.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=AUTHORIZED) as client:
            files = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(images)]
            rows = (await client.post("/v1/captions", files=files)).json()["data"]
            assert [row["captions"]["tiny"] for row in rows] == expected
            body = {**chat(data_uri(images[2])), "model": "tiny"}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            assert answer["choices"][0]["message"]["content"] == expected[2]
        captioner.batcher.close()

    run(main())


@pytest.fixture(
    scope="module",
    params=["pixel diffusion", "latent diffusion", "frozen text encoder", "frozen text encoder that was moved"],
)
def generator_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Storage, str | None]:
    """A finished run, and where its text encoder lies now, if not where the run had it."""
    folder = tmp_path_factory.mktemp("generator")
    if request.param == "pixel diffusion":
        return Storage(str(write_pixel_run(folder / "tiny"))), None
    if request.param == "latent diffusion":
        return Storage(str(write_latent_run(folder / "tiny"))), None
    clip = write_clip(folder / "clip")
    run_folder = Storage(str(write_latent_run(folder / "tiny", TextSettings(str(clip), max_tokens=77))))
    return run_folder, str(clip.rename(folder / "elsewhere")) if "moved" in request.param else None


@pytest.fixture
def generator(generator_run: tuple[Storage, str | None]) -> Iterator[Generator]:
    run_folder, encoder = generator_run
    made = Generator("tiny", open_generator(run_folder.uri, text_encoder=encoder).load, LIMITS)
    yield made
    made.batcher.close()


async def in_threads_of(limits: Limits, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives with as many threads as a replica has: sums of another order have other last bits."""
    with compute_thread(hardware.num_threads(limits)) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, make)


def test_a_generator_makes_what_it_makes_in_bulk(
    generator: Generator, generator_run: tuple[Storage, str | None]
) -> None:
    work = wanted("a red circle", (5, 6), 4, 1.0)

    async def make(*works: GenerateWork) -> list[np.ndarray]:
        done = await asyncio.gather(*(generator.generate(each) for each in works))
        assert [each["event"] for each in done] == ["done"] * len(works), done
        return [np.asarray(Image.open(io.BytesIO(png))) for each in done for png in each["images"]]

    async def main() -> None:
        alone = await make(work)
        # In other company, in another place of the batch: the same to the bit.
        other = wanted("a blue square", (9,), 4, 1.0)
        assert all(np.array_equal(*pair) for pair in zip(alone, (await make(other, work))[1:], strict=True))
        # And what a sweep with its own sampler and this size of batch makes.
        run_folder, encoder = generator_run
        trained = open_generator(run_folder.uri, text_encoder=encoder).load()
        prompts, seeds = ["a red circle"] * 3, [5, 6, 6]
        options = DiffusionOptions(steps=4, guidance=1.0)
        bulk = await in_threads_of(LIMITS, lambda: trained.generate(prompts, seeds, options))
        assert all(np.array_equal(*pair) for pair in zip(alone, bulk[:2], strict=True))
        assert alone[0].shape == (*generator.model.size, 3)
        assert not np.array_equal(*alone)

    run(main())


def test_the_defaults_are_those_of_a_sweep(generator: Generator) -> None:
    told = run(generator.describe())["defaults"]
    assert (told["num_inference_steps"], told["guidance_scale"]) == (DiffusionOptions().steps, 3.0)
    assert options_of({}, generator.model.options) == DiffusionOptions()


@pytest.mark.parametrize(
    ("work", "param", "words"),
    [
        (wanted(steps=1001), "num_inference_steps", "give 1 to 1000"),
        (wanted("red " * 300), "prompt", "tokens with begin and end"),
        (GenerateWork("x", (1,), {"negative_prompt": "red " * 300}), "negative_prompt", "tokens with begin and end"),
        (GenerateWork("x", (1,), {"negative_prompt": "x", "guidance_scale": 1.0}), "negative_prompt", "guidance"),
        (
            GenerateWork("x", (1,), {"temperature": 1.0}),
            "temperature",
            "this model has no such option; it has ",
        ),
        (GenerateWork("x", (1,), {}, (512, 768)), "size", "768x512: this model makes images of "),
    ],
)
def test_a_generator_refuses_what_it_cannot_do(
    generator: Generator, work: GenerateWork, param: str, words: str
) -> None:
    refused = run(generator.generate(work))
    assert refused["event"] == "refused"
    assert (refused["error"]["status"], refused["error"]["param"]) == (400, param)
    assert words in refused["error"]["message"]


class _Operators(TorchDispatchMode):
    """The operators that PyTorch was asked for in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_request_is_checked_without_pytorch(generator: Generator) -> None:
    """What it computes in the thread of the requests makes the model's thread 1.7 times as slow (`compute_thread`)."""
    with _Operators() as operators:
        torch.ones(2)
        run(generator.check(GenerateWork("a red circle", (1,), {"negative_prompt": "a blue square"})))
    assert len(operators.seen) == 1, operators.seen


def test_options_reach_the_model(generator: Generator) -> None:
    """Two requests share a batch only where all options are equal; each image is that of its own."""
    changes = (
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "blue"},
        {"sampler": "ddim"},
        {"num_inference_steps": 5},
    )
    works = [GenerateWork("red", (1,), {"num_inference_steps": 4, **each}) for each in changes]

    async def main() -> list[bytes]:
        done = await asyncio.gather(*(generator.generate(work) for work in works))
        return [np.asarray(Image.open(io.BytesIO(each["images"][0]))).tobytes() for each in done]

    assert len(set(run(main()))) == len(works)


def test_a_transformer_over_codes_answers_with_its_own_options(tmp_path: Path) -> None:
    run_folder = str(write_run(tmp_path / "codes"))
    generator = Generator("tiny", open_generator(run_folder).load, LIMITS)
    models = [Model("tiny", "generator", InProcess(generator))]
    service = Service(models=models, keys=Keys({"SERVE_API_KEYS": KEY}), limits=LIMITS)
    fields = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "guidance_scale": 2, "guidance_scale_end": 1}

    async def main() -> None:
        transport = httpx.ASGITransport(service.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=AUTHORIZED) as client:

            async def ask(**fields: Any) -> httpx.Response:
                return await client.post(GENERATIONS, json={"prompt": "a red circle", "seed": 5, **fields})

            told = (await client.get("/v1/models/tiny")).json()
            own = VARIANTS["smoke"].sample
            api = {field.metadata.get("api", field.name): getattr(own, field.name) for field in dataclasses.fields(own)}
            assert told["defaults"] == {**api, "size": "32x32"}
            assert told["limits"].keys() == {"n", "job_n", "prompt_chars", "guidance_scale", "guidance_scale_end"}
            # In company of other options, which is another batch; as a sweep makes it.
            answers = await asyncio.gather(ask(n=2, **fields), ask(n=2), ask(n=2, **{**fields, "top_p": 0.2}))
            pngs = [base64.b64decode(each["b64_json"]) for answer in answers for each in answer.json()["data"]]
            images = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])
            assert len({image.tobytes() for image in images}) == 6
            trained, options = open_generator(run_folder).load(), AutoregressiveOptions(2.0, 1.0, 0.9, 20, 0.8)
            how = (["a red circle"] * 3, [5, 6, 6], options)
            assert np.array_equal(await in_threads_of(LIMITS, lambda: trained.generate(*how)[:2]), images[:2])
            said = {"guidance": "2.0", "guidance_end": "1.0", "temperature": "0.9", "top_k": "20", "top_p": "0.8"}
            assert read_png_text(pngs[0]) == {"prompt": "a red circle", "seed": "5", **said, "model": "tiny"}
            events = events_of((await ask(stream=True)).text)
            steps = [data["step"] for name, data in events if name == "progress" and data["total"] == 64]
            assert (steps, steps[-1]) == (sorted(steps), 64)
            for name, value, words in (
                ("top_p", 0, "top_p: 0: must be above 0"), ("top_p", 1.1, "at most 1"),
                ("top_k", -1, "top_k: -1: must be at least 1"),
                ("temperature", 0, "temperature: 0: must be at least"), ("guidance_scale", 0.5, "give 1 to 30"),
                ("guidance_scale_end", 31, "give 1 to 30"), ("num_inference_steps", 4, "temperature"),
                ("size", "64x64", "this model makes images of 32x32"),
            ):  # fmt: skip
                refused = error(await ask(**{name: value}))
                assert (refused["param"], words in refused["message"]) == (name, True), refused
        generator.batcher.close()

    run(main())


def test_infinity_answers_with_its_own_options(tmp_path: Path) -> None:
    run_folder = str(tiny_infinity.write_run(tmp_path / "bits"))
    generator = Generator("tiny", open_generator(run_folder).load, LIMITS)
    models = [Model("tiny", "generator", InProcess(generator))]
    service = Service(models=models, keys=Keys({"SERVE_API_KEYS": KEY}), limits=LIMITS)

    async def main() -> None:
        transport = httpx.ASGITransport(service.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=AUTHORIZED) as client:

            async def ask(**fields: Any) -> httpx.Response:
                return await client.post(GENERATIONS, json={"prompt": "a red circle", "seed": 5, **fields})

            told = (await client.get("/v1/models/tiny")).json()
            assert told["defaults"].keys() == {
                "guidance_scale", "guidance_layer", "guided_grids", "num_grids", "temperature", "top_p", "size"
            }  # fmt: skip
            answers = await asyncio.gather(ask(num_grids=2, guidance_scale=3), ask())
            first, second = (base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in answers)
            assert read_png_text(first)["num_grids"] == "2"
            assert "num_grids" not in read_png_text(second)
            assert np.asarray(Image.open(io.BytesIO(first))).shape == (16, 16, 3)
            events = events_of((await ask(stream=True)).text)
            assert [data["step"] for name, data in events if name == "progress" and data["total"] == 3][-1] == 3
            for name, value, words in (("num_grids", 0, "at least 1"), ("top_p", 0.5, "above 0.5")):
                refused = error(await ask(**{name: value}))
                assert (refused["param"], words in refused["message"]) == (name, True), refused
        generator.batcher.close()

    run(main())
