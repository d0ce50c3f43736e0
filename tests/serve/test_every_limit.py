"""Every limit, set by its environment variable: a request just within it passes, one just above it is refused."""

import asyncio
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import GENERATIONS, KEY, SIZE, FakeCaptioner, Served, chat, data_uri, error, picture, run, until

from serve.captioner import Captioner
from serve.limits import Limits
from serve.security import Keys

CHAT, CAPTIONS, JOBS = "/v1/chat/completions", "/v1/captions", "/v1/jobs"
PICTURE = picture()
Asked = tuple[str, dict[str, Any]]


def animation(num_frames: int) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(num_frames)]
    first.save(buffer, "GIF", save_all=True, append_images=others)
    return buffer.getvalue()


def captions(number: int) -> Asked:
    return CAPTIONS, {"images": [data_uri(PICTURE)] * number, "models": ["words"]}


def images(prompt: str = "x", **fields: Any) -> Asked:
    return GENERATIONS, {"prompt": prompt, **fields}


def job(**fields: Any) -> Asked:
    return JOBS, {"request": {"prompt": "x", **fields}}


CASES: dict[str, tuple[str, Asked, Asked, int, str]] = {
    # limit: value, a request within it, one past it, status and code of the refusal
    "max_body_bytes": ("1000", captions(1), captions(10), 413, "body_too_large"),
    "max_json_bytes": ("200", images("x" * 150), images("x" * 200), 413, "body_too_large"),
    "max_image_bytes": (
        str(len(PICTURE)), (CHAT, chat(data_uri(PICTURE))), (CHAT, chat(data_uri(PICTURE + b"x"))), 400,
        "image_too_large",
    ),
    "max_data_uri_bytes": (
        str(len(PICTURE)), (CHAT, chat(data_uri(PICTURE))), (CHAT, chat(data_uri(PICTURE + b"xyz"))), 400,
        "image_too_large",
    ),
    "max_pixels": (
        "1200", (CHAT, chat(data_uri(picture(size=(40, 30))))), (CHAT, chat(data_uri(picture(size=(41, 30))))), 400,
        "image_too_large",
    ),
    "max_frames": (
        "3", (CHAT, chat(data_uri(animation(3), "image/gif"))), (CHAT, chat(data_uri(animation(4), "image/gif"))), 400,
        "animated_image",
    ),
    "max_images": ("2", captions(2), captions(3), 400, "invalid_value"),
    "max_prompt_chars": ("5", images("12345"), images("123456"), 400, "invalid_value"),
    "max_prompt_tokens": ("3", images("a b c"), images("a b c d"), 400, "invalid_value"),
    "max_n": ("2", images(n=2), images(n=3), 400, "invalid_value"),
    "max_job_n": ("2", job(n=2), job(n=3), 400, "invalid_value"),
    "max_steps": ("8", images(num_inference_steps=8), images(num_inference_steps=10), 400, "invalid_value"),
    "max_guidance_scale": ("2", images(guidance_scale=2.0), images(guidance_scale=2.1), 400, "invalid_value"),
}  # fmt: skip
# Limits over several requests or over time have their own tests, below or in the named file.
ELSEWHERE = {
    "max_queue": "", "key_share": "", "max_jobs": "", "max_jobs_per_key": "", "rate_burst": "", "rate_per_minute": "",
    "request_timeout_s": "", "caption_words": "", "caption_beams": "", "captioner_batch_size": "",
    "generator_batch_size": "", "batch_wait_s": "", "model_threads": "",
    "max_bodies_bytes": "test_security.py",
    "body_timeout_s": "test_security.py",
    "job_concurrency": "test_jobs_of_images.py",
    "job_ttl_s": "test_jobs_of_images.py",
    "url_expires_s": "test_routes.py",
    "drain_timeout_s": "test_control_faults.py",
}  # fmt: skip


def served(**values: str) -> Served:
    """A service with limits from the environment."""
    environment = {f"SERVE_{name.upper()}": value for name, value in values.items()}
    return Served(limits=Limits.from_environment(environment))


def test_no_limit_is_forgotten() -> None:
    assert {*CASES, *ELSEWHERE} == {field.name for field in dataclasses.fields(Limits)}
    assert not CASES.keys() & ELSEWHERE.keys()
    for name, file in ELSEWHERE.items():
        assert not file or f'"SERVE_{name.upper()}"' in Path(__file__).with_name(file).read_text(), name


@pytest.mark.parametrize("name", CASES)
def test_within_and_past(name: str) -> None:
    value, (good_path, good), (bad_path, bad), status, code = CASES[name]

    async def main() -> None:
        async with served(**{name: value}).client() as client:
            within = await client.post(good_path, json=good)
            assert within.status_code in (200, 202), within.text
            past = await client.post(bad_path, json=bad)
            assert (past.status_code, error(past)["code"]) == (status, code), past.text

    run(main())


async def at_once(client: httpx.AsyncClient, asked: Asked, number: int) -> list[httpx.Response]:
    path, body = asked
    return list(await asyncio.gather(*(client.post(path, json=body) for _ in range(number))))


@pytest.mark.parametrize(
    ("values", "asked", "code"),
    [
        ({"max_queue": "4", "max_n": "2", "max_images": "4"}, images(n=2), "queue_full"),
        ({"max_jobs": "2"}, job(), "jobs_full"),
        ({"max_jobs_per_key": "2"}, job(), "jobs_full"),
        ({"rate_burst": "2", "rate_per_minute": "0.01"}, images(), "rate_limit_exceeded"),
    ],
)
def test_the_third_is_one_too_many(values: dict[str, str], asked: Asked, code: str) -> None:
    async def main() -> None:
        service, (path, body) = served(**values), asked
        async with service.client() as client:
            service.fake_generator.gate.clear()
            asking = [asyncio.ensure_future(client.post(path, json=body)) for _ in range(3)]
            await until(lambda: any(each.done() and each.result().status_code == 429 for each in asking))
            service.fake_generator.gate.set()
            answers = await asyncio.gather(*asking)
            (refused,) = [answer for answer in answers if answer.status_code not in (200, 202)]
            assert (refused.status_code, error(refused)["code"]) == (429, code)
            assert int(refused.headers["retry-after"]) >= 1

    run(main())


def test_an_answer_has_its_time() -> None:
    async def main() -> None:
        service = served(request_timeout_s="0.2")
        async with service.client() as client:
            service.fake_generator.gate.clear()
            path, body = images()
            late = await client.post(path, json=body)
            assert (late.status_code, error(late)["code"]) == (503, "timeout")

    run(main())


def test_words_and_batches() -> None:
    async def main() -> None:
        service = served(caption_words="2", captioner_batch_size="3", generator_batch_size="5")
        async with service.client() as client:
            path, body = captions(8)
            # Requests that arrive during a batch wait for the next one, which is then full.
            batches, gate = service.fake_captioner.batches, service.fake_captioner.gate
            gate.clear()
            asking = asyncio.ensure_future(client.post(path, json=body))
            await until(lambda: sum(batches) + len(service.captioner.batcher._waiting) == 8)
            gate.set()
            rows = (await asking).json()["data"]
            assert [row["captions"]["words"] for row in rows] == ["a red"] * 8
            assert max(batches) == 3
            await at_once(client, images(n=2), 4)
            assert {len(batch) for batch in service.fake_generator.batches} == {5}

    run(main())


def test_jobs_are_counted_by_key() -> None:
    """One key's jobs leave places for the jobs of other keys."""
    others = f"{KEY}-other"
    limits = Limits.from_environment({"SERVE_MAX_JOBS": "3", "SERVE_MAX_JOBS_PER_KEY": "2"})
    service = Served(limits=limits, keys=Keys({"SERVE_API_KEYS": f"{KEY},{others}"}))

    async def main() -> None:
        async with service.client() as client:
            service.fake_generator.gate.clear()
            path, body = job()
            other = {"authorization": f"Bearer {others}"}
            statuses = [(await client.post(path, json=body)).status_code for _ in range(3)]
            statuses += [(await client.post(path, json=body, headers=other)).status_code for _ in range(2)]
            assert statuses == [202, 202, 429, 202, 429]

    run(main())


@pytest.mark.parametrize(("share", "statuses"), [("0.5", [200, 200, 429]), ("1", [200, 200, 200])])
def test_one_key_leaves_room_for_the_others(share: str, statuses: list[int]) -> None:
    """A queue of 8 takes four requests of 2. One key has two of them at once, a second key the rest."""
    other = {"authorization": f"Bearer {KEY}-other"}
    environment = {"SERVE_MAX_QUEUE": "8", "SERVE_KEY_SHARE": share, "SERVE_MAX_IMAGES": "8"}
    path, body = images(n=2)

    async def main(keys: str, headers: dict[str, str]) -> tuple[list[int], int]:
        service = Served(limits=Limits.from_environment(environment), keys=Keys({"SERVE_API_KEYS": keys}))
        held = service.service.front.admission.held
        async with service.client() as client:
            service.fake_generator.gate.clear()
            first = [asyncio.ensure_future(client.post(path, json=body)) for _ in range(3)]
            await until(lambda: held["shapes"] + 2 * sum(each.done() for each in first) == 6)
            before = held["shapes"]
            another = asyncio.ensure_future(client.post(path, json=body, headers=headers))
            await until(lambda: held["shapes"] == before + 2 or another.done())
            service.fake_generator.gate.set()
            return sorted(answer.status_code for answer in await asyncio.gather(*first)), (await another).status_code

    assert run(main(f"{KEY},{KEY}-other", other)) == (statuses, 200)
    # A single key may use all of it.
    assert run(main(KEY, {})) == ([200] * 3, 200)


def test_a_request_that_is_alone_is_larger_than_a_share() -> None:
    limits = Limits.from_environment({"SERVE_MAX_QUEUE": "8", "SERVE_KEY_SHARE": "0.25", "SERVE_MAX_IMAGES": "8"})
    service = Served(limits=limits, keys=Keys({"SERVE_API_KEYS": f"{KEY},{KEY}-other"}))

    async def main() -> None:
        async with service.client() as client:
            path, body = captions(8)
            assert (await client.post(path, json=body)).status_code == 200

    run(main())


def test_beams_and_threads() -> None:
    service = served(caption_beams="7", model_threads="3")

    async def main() -> None:
        async with service.client() as client:
            path, body = captions(1)
            assert (await client.post(path, json=body)).status_code == 200

    run(main())
    assert service.fake_captioner.num_beams == {7}
    assert service.fake_captioner.num_threads == {3}


def test_a_captioner_with_options_of_its_own_is_capped_too() -> None:
    @dataclass(frozen=True)
    class Sampling:
        temperature: float = 0.5
        num_words: int = field(default=30, metadata={"caps": "words"})

    class Words(FakeCaptioner):
        options = Sampling()

        def caption(self, pixels: np.ndarray, options: Any) -> list[str]:
            return [str(options)] * len(pixels)

    captioner = Captioner("words", lambda device: Words(), Limits(caption_beams=7))
    answer = run(captioner.caption({SIZE: np.zeros((SIZE, SIZE, 3), np.uint8)}, 5))
    assert answer["caption"].endswith("Sampling(temperature=0.5, num_words=5)")


def test_a_lone_request_waits_for_nobody_by_default() -> None:
    assert Limits().batch_wait_s <= 0.001


@pytest.mark.parametrize(("wait_s", "batches"), [("0", [1, 1]), ("3600", [2])])
def test_an_idle_model_waits_for_company(wait_s: str, batches: list[int]) -> None:
    service = served(batch_wait_s=wait_s, captioner_batch_size="2")

    async def main() -> None:
        async with service.client() as client:
            path, body = captions(1)
            first = asyncio.ensure_future(client.post(path, json=body))
            while service.captioner.batcher._task is None:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert (await client.post(path, json=body)).status_code == 200
            assert (await first).status_code == 200

    run(main())
    assert service.fake_captioner.batches == batches
