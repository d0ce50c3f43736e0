"""A generator's own options as fields of its requests."""

import asyncio
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import GENERATIONS, FakeGenerator, InProcess, Served, error, post, run

from mmcore.errors import OptionError
from serve.clients import Model
from serve.generator import Generator
from serve.limits import Limits
from serve.options import tell


@dataclass(frozen=True)
class OfTokens:
    """Options of a generator that is not a diffusion."""

    cfg: float = 4.0
    tau: float = 0.5
    top_k: int | None = None
    sharpen: bool = False


class Tokens(FakeGenerator):
    """Makes images of every size, one at a time."""

    options = OfTokens()

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[OfTokens, tuple[int, int], list[int]]] = []

    def check(self, options: OfTokens, size: tuple[int, int]) -> None:
        if options.tau <= 0:
            raise OptionError("tau", f"{options.tau:g}: must be above 0")

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], options: OfTokens, *, size: tuple[int, int], on_step: Any
    ) -> np.ndarray:
        self.made.append((options, size, sorted({*seeds})))
        return np.zeros((len(seeds), *size, 3), np.uint8)


def test_a_generator_s_own_options_are_fields_of_its_requests() -> None:
    served = Served()
    tokens = Tokens()
    generator = Generator("tokens", lambda device: tokens, Limits())
    served.service.front.models["tokens"] = Model("tokens", "generator", InProcess(generator))

    async def main() -> None:
        async with served.client() as client:

            async def ask(**fields: Any) -> httpx.Response:
                return await client.post(GENERATIONS, json={"model": "tokens", "prompt": "x", "seed": 1, **fields})

            described = (await client.get("/v1/models/tokens")).json()
            assert described["options"]["top_k"] == {"type": "integer", "default": None}
            assert described["defaults"] == {"cfg": 4.0, "tau": 0.5, "top_k": None, "sharpen": False, "size": "16x16"}
            assert described["limits"].keys() == {"n", "job_n", "prompt_chars"}
            made = (await ask(cfg=3, top_k=9, size="24x8", seed=7)).json()
            with Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"]))) as image:
                assert (image.size, made["size"]) == ((24, 8), "24x8")
                text = {"prompt": "x", "seed": "7", "cfg": "3.0", "tau": "0.5", "sharpen": "False"}
                assert image.text == {**text, "top_k": "9", "model": "tokens"}
            assert tokens.made == [(OfTokens(3.0, 0.5, 9), (8, 24), [7])]
            for fields, param, words in (
                ({"num_inference_steps": 3}, "num_inference_steps", "safety_identifier, cfg, tau, top_k, sharpen"),
                ({"tau": 0}, "tau", "tau: 0: must be above 0"), ({"sharpen": 1}, "sharpen", "true or false"),
                ({"top_k": 1.5}, "top_k", "whole number"), ({"cfg": "3"}, "cfg", "number"),
            ):  # fmt: skip
                refused = error(await ask(**fields))
                assert (refused["param"], words in refused["message"]) == (param, True), refused
            # Only requests with equal options and sizes share a batch.
            tokens.made.clear()
            asked = [{}, {"top_k": 5}, {"size": "16x16", "seed": 2}, {"size": "8x16"}, {"tau": 0.5, "seed": 4}]
            await asyncio.gather(*(ask(**fields) for fields in asked))
            seeds: dict[Any, set[int]] = {}
            for options, size, together in tokens.made:
                seeds.setdefault((options, size), set()).update(together)
            square = (16, 16)
            assert seeds == {
                (OfTokens(), square): {1, 2, 4}, (OfTokens(top_k=5), square): {1}, (OfTokens(), (16, 8)): {1},
            }  # fmt: skip
            generator.batcher.close()

    run(main())


def test_another_size_than_the_model_makes_is_refused_before_a_stream_begins() -> None:
    response = post(GENERATIONS, {"prompt": "x", "size": "512x256", "stream": True})
    assert (response.status_code, error(response)["param"]) == (400, "size")
    assert error(response)["message"] == "size: 512x256: this model makes images of 16x16"


def test_an_option_that_no_request_can_give_is_found_when_the_model_is_described() -> None:
    @dataclass(frozen=True)
    class Sizes:
        sizes: tuple[int, ...] = (1, 2)

    with pytest.raises(TypeError, match=r"Sizes.sizes: a tuple\[int, ...\] is no number"):
        tell(Sizes())


def test_words_that_the_model_does_not_know_are_named_once() -> None:
    prompts = {"prompt": "a zebra beside a zebra", "negative_prompt": "no zebra"}
    assert post(GENERATIONS, prompts).json()["unknown_words"] == ["zebra"]
