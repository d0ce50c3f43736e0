"""The official Python client of OpenAI uses images and chat over HTTP on loopback."""

import base64
import dataclasses
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import ROOT
from openai.types import ImageGenCompletedEvent
from PIL import Image
from serving import HANG_S, KEY, SIZE, TIMESTEPS, Served, colour_of, data_uri, listening, picture

from serve.limits import Limits


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(Served()) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["words", "others", "shapes"]
    assert all(abs(model.created - time.time()) < 600 for model in listed)
    for model in listed:
        assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dall-e-3")
    assert caught.value.code == "model_not_found"


def test_images(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="shapes",
        prompt="a red square",
        n=2,
        size="16x16",  # type: ignore[call-overload]
        response_format="b64_json",
        extra_body={"seed": 11, "num_inference_steps": 5, "guidance_scale": 2.0},
    )
    assert answer.created > 0
    for index, row in enumerate(answer.data):
        image = Image.open(io.BytesIO(base64.b64decode(row.b64_json)))
        assert image.size == (SIZE, SIZE)
        assert image.getpixel((0, 0)) == colour_of("a red square", 11 + index, 5, 2.0)
        assert row.seed == 11 + index


def test_images_as_a_stream(client: openai.OpenAI) -> None:
    """With OpenAI's event types. Each earlier step is an event of another type."""
    events = list(
        client.images.generate(
            model="shapes", prompt="a red square", n=2, stream=True, extra_body={"seed": 11, "num_inference_steps": 5}
        )
    )
    kinds = [event.type for event in events]
    assert kinds[-3:] == ["image_generation.completed"] * 2 + ["image_generation.done"]
    assert {"image_generation.queued", "image_generation.progress"} >= set(kinds[:-3])
    assert "image_generation.progress" in kinds
    for index, event in enumerate(event for event in events if event.type == "image_generation.completed"):
        assert isinstance(event, ImageGenCompletedEvent)
        image = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert image.getpixel((0, 0)) == colour_of("a red square", 11 + index, 5)
        assert (event.size, event.output_format) == (f"{SIZE}x{SIZE}", "png")
        assert abs(event.created_at - time.time()) < 600
        assert event.seed == 11 + index  # type: ignore[attr-defined]


def test_a_stream_that_ends_in_a_refusal_is_the_clients_own_error(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        model="shapes", prompt="x", stream=True, extra_body={"num_inference_steps": TIMESTEPS + 1}
    )
    with pytest.raises(openai.APIError, match="num_inference_steps"):
        list(stream)


def test_nulls_are_unset(client: openai.OpenAI) -> None:
    """In OpenAI's schema optional fields may be null, and some programs send all of them."""
    nulls = dict.fromkeys(("n", "size", "response_format", "stream", "quality", "style", "seed", "negative_prompt"))
    answer = client.images.generate(model="shapes", prompt="x", extra_body=nulls)
    assert len(answer.data or []) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="shapes", prompt=None)  # type: ignore[call-overload]
    assert caught.value.param == "prompt"
    content = [{"type": "image_url", "image_url": {"url": data_uri(picture("green")), "detail": None}}]
    messages: list[Any] = [{"role": "user", "content": content, "name": None}]
    nulls = dict.fromkeys(("stream", "max_tokens", "max_completion_tokens", "temperature"))
    said = client.chat.completions.create(model="words", messages=messages, extra_body=nulls)
    assert said.choices[0].message.content == "a green picture"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="words",
        messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture("green"))}}]}
        ],
        max_tokens=20,
    )
    assert answer.choices[0].message.content == "a green picture"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_chat_as_most_programs_ask(client: openai.OpenAI) -> None:
    """With a text beside the image and OpenAI's settings, which no captioner uses. The answer says so."""
    picture_part = {"type": "image_url", "image_url": {"url": data_uri(picture("blue")), "detail": "auto"}}
    content: Any = [{"type": "text", "text": "What is in this image?"}, picture_part]
    answer = client.chat.completions.create(
        model="words",
        messages=[{"role": "system", "content": "You are helpful."}, {"role": "user", "content": content}],
        n=1,
        temperature=0.2,
        user="me",
    )
    assert answer.choices[0].message.content == "a blue picture"
    ignored = ["messages.1.content.0.text", "temperature", "user", "messages.0"]
    assert answer.ignored == ignored  # type: ignore[attr-defined]


def test_images_as_most_programs_ask(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="shapes", prompt="x", size="auto", quality="auto", background="auto", output_format="png", user="me"
    )
    assert (answer.size, answer.output_format, answer.background) == (f"{SIZE}x{SIZE}", "png", "opaque")
    assert answer.ignored == ["user"]  # type: ignore[attr-defined]


def test_the_lines_of_the_documents(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    for here, there in {
        "http://127.0.0.1:8000/v1": url, 'model="images"': 'model="shapes"', 'model="resnet"': 'model="words"',
    }.items():  # fmt: skip
        assert here in lines
        lines = lines.replace(here, there)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", KEY)
    exec(compile(lines, "docs/serving.md", "exec"), {})
    with Image.open(tmp_path / "circle.png") as image:
        assert image.getpixel((0, 0)) == colour_of("a large red circle", 7, guidance=2.0)
    assert re.fullmatch(r"a \w+ picture\n", capsys.readouterr().out)


def test_refusals_are_the_clients_own_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="shapes", prompt="x", quality="hd")
    assert caught.value.param == "quality"
    assert caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="dall-e-3", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="x" * 20, max_retries=0).models.list()


def test_the_client_comes_back_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official client obeys Retry-After: a refused request is answered later."""
    served = Served(limits=Limits(rate_burst=1, rate_per_minute=30))
    with listening(served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=3)
        waits: list[float] = []
        wait_of = client._calculate_retry_timeout

        def noted_wait_of(*arguments: Any) -> float:
            waits.append(wait_of(*arguments))
            return waits[-1]

        monkeypatch.setattr(client, "_calculate_retry_timeout", noted_wait_of)
        # One token in two seconds: a machine that is not slower than this is refused at once.
        while not waits:
            assert client.images.generate(model="shapes", prompt="x").data
        # The client's own waits are fractions of a second.
        assert set(waits) <= {1.0, 2.0}


def test_a_client_that_hangs_up_early_does_no_harm() -> None:
    """A body that is announced but never sent, a truncated request, and then a valid request, which is answered."""
    import socket

    served = Served(limits=Limits(body_timeout_s=0.5))
    with listening(served) as address:
        port = int(address.split(":")[2])
        head = f"POST /v1/captions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += "Content-Type: application/json\r\n"
        for hang_up in (True, False):
            with socket.create_connection(("127.0.0.1", port), HANG_S) as connection:
                connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
                if not hang_up:
                    connection.settimeout(HANG_S)
                    assert b" 408 " in connection.recv(1000)
        assert openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0).models.list().data
        deadline = time.monotonic() + HANG_S
        while served.service.front.in_flight and time.monotonic() < deadline:
            time.sleep(0.02)
        assert served.service.front.in_flight == 0


def test_chat_as_a_stream(client: openai.OpenAI) -> None:
    message: Any = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": data_uri(picture("green"))}}],
    }
    stream = client.chat.completions.create(
        model="words", messages=[message], stream=True, stream_options={"include_usage": True}, temperature=0.2
    )
    first, last, usage = list(stream)
    assert {each.object for each in (first, last, usage)} == {"chat.completion.chunk"}
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "a green picture")
    assert first.ignored == ["temperature"]  # type: ignore[attr-defined]
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 3
    broken: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(b"no image")}}]}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="words", messages=[broken], stream=True)


def test_a_greedy_search_is_streamed_word_by_word() -> None:
    served = Served()
    served.fake_captioner.options = dataclasses.replace(served.fake_captioner.options, num_beams=1)
    message: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture("blue"))}}]}
    with listening(served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        stream = client.chat.completions.create(model="words", messages=[message], stream=True)
        *chunks, last = list(stream)
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["a", " blue", " picture"]
        assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
        assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
        assert len({chunk.id for chunk in (*chunks, last)}) == 1
        whole = client.chat.completions.create(model="words", messages=[message])
    assert whole.choices[0].message.content == "a blue picture"
    assert served.fake_captioner.num_beams == {1}


def test_a_failing_captioner_ends_a_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()

    def fail(*arguments: Any, **more: Any) -> list[str]:
        raise RuntimeError("broken on purpose")

    served.fake_captioner.caption = fail  # type: ignore[method-assign]
    message: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture())}}]}
    with listening(served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(model="words", messages=[message], stream=True))
    assert "broken on purpose" not in str(caught.value)


def test_words_are_the_prompt_of_a_captioner_that_takes_one() -> None:
    served = Served()
    served.fake_captioner.takes_prompt = True  # type: ignore[misc]
    image: Any = {"type": "image_url", "image_url": {"url": data_uri(picture("blue"))}}
    words: Any = {"type": "text", "text": "Question: which colour?"}
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [words, image]}]
    with listening(served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        asked = client.chat.completions.create(model="words", messages=messages, user="me")
        assert asked.choices[0].message.content == "Be short. Question: which colour?: a blue picture"
        assert asked.ignored == ["user"]  # type: ignore[attr-defined]
        alone = client.chat.completions.create(model="words", messages=[{"role": "user", "content": [image]}])
        assert alone.choices[0].message.content == "a blue picture"
        words["text"] = "x" * (Limits().max_prompt_chars + 1)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="words", messages=messages)
        assert caught.value.param == "messages"
        words["text"] = "refuse"
        refused: Any = [{"role": "user", "content": [words, image]}]
        with pytest.raises(openai.BadRequestError, match="leaves no room for a caption") as caught:
            client.chat.completions.create(model="words", messages=refused)
        assert caught.value.param == "messages"
        with pytest.raises(openai.APIError, match="leaves no room for a caption"):
            list(client.chat.completions.create(model="words", messages=refused, stream=True))
