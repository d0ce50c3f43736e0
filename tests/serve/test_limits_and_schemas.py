"""Limits from the environment, and requests: unknown fields by name, ranges, invalid numbers."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from serving import chat, data_uri

from mmcore.errors import InputError
from serve import limits, options, parsing, schemas
from serve.errors import ApiError, quoted
from serve.limits import Limits
from serve.queueing import Admission

INFO: dict[str, Any] = {
    "id": "shapes",
    "resolution": 64,
    "defaults": {"size": "64x64"},
    "options": {
        "num_inference_steps": {"type": "integer", "default": 50},
        "guidance_scale": {"type": "number", "default": 3.0},
        "sampler": {"type": "string", "default": "dpmsolver++", "enum": ["dpmsolver++", "ddim"]},
        "negative_prompt": {"type": "string", "default": ""},
    },
}


@pytest.mark.parametrize("field", dataclasses.fields(Limits), ids=lambda field: field.name)
def test_every_limit_has_a_variable(field: dataclasses.Field[Any]) -> None:
    value = (field.default or 1) * 2
    name = f"SERVE_{field.name.upper()}"
    environment = {name: str(value), "SERVE_MAX_QUEUE": "1000"} | {name: str(value)}
    assert getattr(Limits.from_environment(environment), field.name) == value
    for bad in ("-1", "many", "nan", "inf", "", "1e400"):
        with pytest.raises(InputError, match=name):
            Limits.from_environment({name: bad})


def test_every_limit_is_explained() -> None:
    source = re.sub(r"\s+", " ", Path(limits.__file__).read_text())
    for field in dataclasses.fields(Limits):
        assert re.search(rf"{field.name}: (int|float) = [^\"]*\"\"\"[A-Z]", source), f"{field.name} has no docstring"


def test_a_misspelt_variable_is_an_error_and_a_foreign_one_is_not() -> None:
    with pytest.raises(InputError, match="SERVE_MAX_QUEU: no such variable; did you mean SERVE_MAX_QUEUE"):
        Limits.from_environment({"SERVE_MAX_QUEU": "3"})
    with pytest.raises(InputError, match="SERVE_API_KEYS_FILE"):
        Limits.from_environment({"SERVE_API_KEY_FILE": "x"})
    # Kubernetes sets such variables for every service.
    assert Limits.from_environment({"SERVE_SVC_PORT_8000_TCP": "tcp://10.0.0.1:8000", "PATH": "x"}) == Limits()


def test_limits_that_exclude_each_other() -> None:
    for name, value, words in (
        ("MAX_QUEUE", "4", "SERVE_MAX_QUEUE is 4"),
        ("MAX_BODIES_BYTES", "1000", "SERVE_MAX_BODIES_BYTES is 1000"),
        ("MAX_BODY_BYTES", "999999999", "SERVE_MAX_BODY_BYTES 999999999"),
        # S3 refuses such links only when they are used.
        ("URL_EXPIRES_S", "604801", "give 1 to 604800"),
        ("URL_EXPIRES_S", "0.5", "give 1 to 604800"),
        ("KEY_SHARE", "2", "SERVE_KEY_SHARE 2: give 1, which is all, or less"),
        ("MAX_GUIDANCE_SCALE", "0.5", "SERVE_MAX_GUIDANCE_SCALE 0.5"),
        *((name, "0", f"SERVE_{name} 0: give more than 0") for name in (
            "BODY_TIMEOUT_S", "REQUEST_TIMEOUT_S", "DRAIN_TIMEOUT_S", "JOB_TTL_S", "RATE_PER_MINUTE",
        )),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            Limits.from_environment({f"SERVE_{name}": value})
    assert Limits.from_environment({"SERVE_BATCH_WAIT_S": "0", "SERVE_URL_EXPIRES_S": "604800"}).batch_wait_s == 0


DEFAULTS = {name: option["default"] for name, option in INFO["options"].items()}


def generation(**fields: Any) -> schemas.GenerateWork:
    kind = options.with_options(schemas.GenerationRequest, INFO["options"])
    asked = parsing.parse(kind, {"prompt": "a red square", **fields})
    return schemas.generate_work(asked, INFO, Limits())


def test_defaults_come_from_the_model_and_seeds_count_up() -> None:
    work = generation(n=3, seed=41)
    assert work == schemas.GenerateWork("a red square", (41, 42, 43), DEFAULTS, (64, 64))
    drawn = generation(n=2)
    assert drawn.seeds[1] == drawn.seeds[0] + 1
    assert generation().seeds != generation().seeds
    # Exactly representable in JavaScript.
    assert all(generation().seeds[0] < 2**53 for _ in range(20))


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"steps": 3}, "steps", "unknown field 'steps'; its fields are prompt, model, n, size, seed,"),
    ({"cfg": 3, "n": 99}, "cfg", "safety_identifier, num_inference_steps, guidance_scale, sampler, negative_prompt"),
    ({"promt": "x"}, "promt", "unknown field 'promt'; did you mean 'prompt'? its fields are prompt,"),
    ({"sampler": "me"}, "sampler", "'ddim', got 'me'"),
    ({"quality": "hd"}, "quality", "images have one quality; leave it out, got 'hd'"),
    ({"background": "transparent"}, "background", "no transparency"),
    ({"output_format": "webp"}, "output_format", "PNG"),
    ({"output_compression": 50}, "output_compression", "PNG loses nothing"),
    ({"partial_images": 2}, "partial_images", "before it is finished"),
    ({"partial_images": False}, "partial_images", "must be a whole number, got False"),
    ({"style": "natural"}, "style", "one style"),
    ({"user": 3}, "user", "must be text"),
    ({"prompt": 3}, "prompt", "prompt must be text, got 3"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": " \n "}, "prompt", "empty"),
    ({"prompt": "x" * 1001}, "prompt", "1001 characters; at most 1000"),
    ({"prompt": "a\x00b"}, "prompt", "U+0000 at 1"),
    ({"prompt": "a\ud800b"}, "prompt", "U+D800 at 1"),
    ({"n": 0}, "n", "n must be at least 1, got 0"),
    ({"n": 9}, "n", "n: 9 images; one request makes up to 8, and a job (POST /v1/jobs) makes up to 64"),
    ({"n": -1}, "n", "n must be at least 1, got -1"),
    ({"n": True}, "n", "whole number"),
    ({"n": "2"}, "n", "whole number"),
    ({"n": 2.0}, "n", "whole number"),
    ({"prompt": None}, "prompt", "must be text"),
    ({"size": "64X64"}, "size", "auto or WIDTHxHEIGHT, such as 64x64"),
    ({"size": "0x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "9" * 400 + "x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": 64}, "size", "must be text"),
    ({"seed": -1}, "seed", "give 0 to"),
    ({"seed": 2**32}, "seed", "give 0 to"),
    ({"seed": 2**32 - 4, "n": 8}, "seed", "give 0 to"),
    ({"seed": 1.5}, "seed", "whole number"),
    ({"num_inference_steps": 0}, "num_inference_steps", "give 1 to 250"),
    ({"num_inference_steps": 10**9}, "num_inference_steps", "give 1 to 250"),
    ({"guidance_scale": 0.5}, "guidance_scale", "give 1 to 30"),
    ({"guidance_scale": 31}, "guidance_scale", "give 1 to 30"),
    ({"guidance_scale": float("inf")}, "guidance_scale", "inf"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "nan"),
    ({"guidance_scale": "3"}, "guidance_scale", "number"),
    ({"negative_prompt": "a\x00b"}, "negative_prompt", "U+0000 at 1"),
    ({"negative_prompt": "b" * 1001}, "negative_prompt", "1001"),
    ({"response_format": "png"}, "response_format", "b64_json"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream": 1}, "stream", "true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS)
def test_fields_that_are_wrong(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        generation(**fields)
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"size": "auto", "quality": "auto", "background": "auto", "output_format": "png", "partial_images": 0}, ()),
        ({"size": "64x64", "quality": "standard", "background": "opaque"}, ()),
        (
            {"safety_identifier": "x", "user": "me", "moderation": "auto", "style": "vivid", "output_compression": 100},
            ("output_compression", "style", "moderation", "user", "safety_identifier"),
        ),
        (dict.fromkeys(("size", "quality", "n", "user", "style", "unheard_of")), ()),
    ],
)
def test_what_clients_send_and_changes_nothing(fields: dict[str, Any], ignored: tuple[str, ...]) -> None:
    work = generation(seed=1, **fields)
    assert work == schemas.GenerateWork("a red square", (1,), DEFAULTS, (64, 64), ignored=ignored)
    answer = schemas.generation_answer(work, "shapes", 5, [{"b64_json": "x"}], [])
    assert answer.get("ignored", []) == list(ignored)
    assert (answer["size"], answer["output_format"], answer["background"]) == ("64x64", "png", "opaque")


def test_a_whole_number_is_a_guidance_scale() -> None:
    assert repr(generation(guidance_scale=5).options["guidance_scale"]) == "5.0"


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not JSON"),
    "broken": (b'{"prompt": ', "not JSON"),
    "two": (b"{} {}", "not JSON"),
    "nan": (b'{"guidance_scale": NaN}', "NaN is not a number"),
    "infinity": (b'{"guidance_scale": -Infinity}', "-Infinity is not a number"),
    "twice": (b'{"n": 1, "n": 8}', "'n' is given twice"),
    "utf-16": ('{"prompt": "x"}'.encode("utf-16"), "UTF-8"),
    "latin-1": (b'{"prompt": "\xe9"}', "UTF-8"),
    "deep": (b"[" * 1500 + b"]" * 1500, "nested too deeply"),
    "many": (b"[" + b"0," * 3000 + b"0]", "more than 2000 values"),
    "digits": (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bodies_that_are_no_json(name: str) -> None:
    body, words = BAD_JSON[name]
    with pytest.raises(ApiError) as caught:
        parsing.parse_json(body)
    assert caught.value.status == 400
    assert words in caught.value.message


@pytest.mark.parametrize("body", [b"[]", b"3", b'"x"', b"null", b"true"])
def test_a_body_is_an_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="must be a JSON object"):
        parsing.parse(schemas.GenerationRequest, parsing.parse_json(body))


def test_infinity_by_exponent_is_refused() -> None:
    with pytest.raises(ApiError, match="guidance_scale: inf"):
        generation(**parsing.parse_json(b'{"guidance_scale": 1e999}'))


URI = data_uri(b"x")
PART = {"type": "image_url", "image_url": {"url": URI}}


def said(*content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


WORDS = {"type": "text", "text": "What is in this image?"}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
MESSAGES = chat(URI)["messages"]

BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    (chat(URI, beams=3), "beams", "unknown field 'beams'; its fields are messages, model, max_tokens,"),
    (chat(URI, max_tokens=0), "max_tokens", "max_tokens must be at least 1, got 0"),
    ({"messages": []}, "messages", "0 messages"),
    ({"messages": ["x"]}, "messages.0", "message 1 must be an object"),
    ({"messages": MESSAGES * 2}, "messages", "2 messages"),
    ({"messages": [SYSTEM]}, "messages", "0 messages of the user"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "messages.1.role", "got 'assistant'"),
    ({"messages": [{"role": "user", "content": "what?"}]}, "messages.0.content", "message 1: it is text alone"),
    ({"messages": [{**SYSTEM, "content": [WORDS, PART]}, *MESSAGES]}, "messages.0.content.1", "image in a message of"),
    ({"messages": [{**MESSAGES[0], "tool_calls": []}]}, "messages.0.tool_calls", "in message 1; its fields are role,"),
    (said(), "messages.0.content", "0 images"),
    (said(WORDS), "messages.0.content", "0 images"),
    (said(PART, {"type": "text"}), "messages.0.content.1.text", "text of part 2 of message 1 is missing"),
    (said(PART, {**WORDS, "size": 3}), "messages.0.content.1.size", "in part 2 of message 1; its fields are type,"),
    (said(PART, PART), "messages.0.content", "2 images"),
    (
        said({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}),
        "messages.0.content.0.image_url.detail",
        "one size; leave it out, got 'low'",
    ),
    (
        said({"type": "image_url", "image_url": {"url": URI, "crop": 1}}),
        "messages.0.content.0.image_url.crop",
        "unknown field 'crop' in image_url of part 1 of message 1; its fields are url, detail",
    ),
    (said({"type": "input_audio"}), "messages.0.content.0", "input_audio"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "content of message 1 is missing"),
    *(
        (chat(URI, **{name: value}), name, words)
        for name, value, words in (
            ("stream", "yes", "true or false"), ("n", 2, "one caption"), ("n", True, "whole"),
            ("n", "1", "whole number"),
            ("temperature", -1, "at least 0"), ("temperature", "hot", "number"), ("top_p", True, "number"),
            ("presence_penalty", 0.5, "no penalties"), ("frequency_penalty", -1, "no penalties"),
            ("repetition_penalty", 1.2, "no penalties"),
            ("stop", "\n", "ends by itself"), ("stop", ["."], "ends by itself"), ("logit_bias", {"5": -100}, "weights"),
            ("logprobs", True, "probabilities"), ("top_logprobs", 2, "probabilities"),
            ("response_format", {"type": "json_object"}, "is text"), ("modalities", ["text", "audio"], "is text"),
            ("tools", [{"type": "function"}], "no tools"), ("tool_choice", "required", "no tools"),
            ("functions", [{}], "no tools"), ("function_call", {"name": "f"}, "no tools"),
            ("verbosity", "low", "one manner"), ("store", True, "kept"), ("user", 3, "must be text"),
            ("audio", {"voice": "x"}, "unknown"), ("web_search_options", {}, "unknown"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), BAD_CHATS)
def test_chats_that_are_wrong(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.image_of_chat(parsing.parse(schemas.ChatRequest, body))
    error = caught.value
    assert error.status == 400
    assert error.param == param
    assert words in error.message


def test_a_chat_has_one_image() -> None:
    asked = parsing.parse(schemas.ChatRequest, chat(URI, max_completion_tokens=5))
    assert schemas.image_of_chat(asked) == (URI, "messages.0.content.0.image_url.url", [])


def test_what_programs_send_along_is_named() -> None:
    done_anyway: dict[str, Any] = {
        "n": 1, "stream": False, "stop": [], "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "logit_bias": {},
        "stream_options": None, "store": False, "modalities": ["text"], "top_logprobs": 0, "verbosity": "medium",
    }  # fmt: skip
    unread: dict[str, Any] = {
        "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 1, "top_k": 40, "min_p": 0, "seed": 5,
        "parallel_tool_calls": True, "reasoning_effort": "none", "metadata": {"a": "b"}, "service_tier": "auto",
        "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k", "safety_identifier": "x",
        "user": "me",
    }  # fmt: skip
    auto = {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}}
    asker = {"role": "user", "content": [WORDS, auto, WORDS], "name": "x"}
    developer = {"role": "developer", "content": [WORDS], "name": "y"}
    texts = ["messages.1.content.0.text", "messages.1.content.2.text", "messages.1.name"]
    body = {"messages": [SYSTEM, asker, developer], **done_anyway, **unread}
    uri, param, ignored = schemas.image_of_chat(parsing.parse(schemas.ChatRequest, body))
    assert (uri, param) == (URI, "messages.1.content.1.image_url.url")
    assert ignored == [*texts, *unread, "messages.0", "messages.2"]


LONG = "http://" + "x" * 15_000_000


def test_what_is_repeated_is_cut_before_it_is_quoted() -> None:
    for value in (LONG, [LONG] * 3, {LONG: LONG}, (LONG, {"a": [LONG]})):
        assert len(quoted(value)) <= 64
    assert quoted("http://x") == "'http://x'"
    assert quoted(None) == "None"


@pytest.mark.nightly  # a limit of time
def test_what_is_quoted_is_not_read_to_its_end() -> None:
    for value in (LONG, [LONG] * 3, {LONG: LONG}, (LONG, {"a": [LONG]})):
        began = time.thread_time()
        quoted(value)
        assert time.thread_time() - began < 0.01


@pytest.mark.parametrize(
    "body",
    [
        said({"type": "image_url", "image_url": {"url": LONG, "detail": "low"}}),
        said({"type": LONG}),
        {"messages": [], LONG: 1},
        {"messages": LONG},
        chat(URI, stream=LONG),
    ],
)  # fmt: skip
def test_no_refusal_is_longer_than_a_person_reads(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.image_of_chat(parsing.parse(schemas.ChatRequest, body))
    assert len(json.dumps(caught.value.body())) < 1000


def test_errors_have_the_form_of_openai() -> None:
    error = ApiError(429, "busy", code="queue_full", retry_after_s=2.2)
    assert error.body() == {
        "error": {"message": "busy", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert error.headers() == {"retry-after": "3"}
    start, body = ApiError.from_dict(json.loads(json.dumps(error.as_dict()))).asgi_messages()
    assert start["status"] == 429
    assert json.loads(body["body"]) == error.body()


def test_admission_is_all_or_nothing_and_says_when_to_come_back() -> None:
    admission = Admission(4)
    with admission.enter({"a": 3, "b": 1}):
        assert admission.held == {"a": 3, "b": 1}
        with pytest.raises(ApiError) as caught, admission.enter({"b": 2, "a": 2}):
            pass
        assert caught.value.status == 429
        assert 1 <= float(caught.value.headers()["retry-after"]) <= 60
        assert admission.held == {"a": 3, "b": 1}, "nothing of a refused request is held"
        with admission.enter({"a": 1}):
            assert admission.held["a"] == 4
    assert not any(admission.held.values())
    with pytest.raises(RuntimeError), admission.enter({"a": 4}):
        raise RuntimeError
    assert not any(admission.held.values())


def test_the_chunks_of_a_chat_add_up_to_its_caption() -> None:
    chunks = schemas.ChatChunks("x", "words", ["seed"])
    made = [chunk for text in ("a", "a dog", "", "a", "a dog") for chunk in chunks.words(text)]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in made] == ["a", " dog"], "a replica began again"
    assert [chunk.get("ignored") for chunk in made] == [["seed"], None]
    *words, ended, usage = chunks.end(schemas.chat_answer("x", "words", "a dog .", 30, []), include_usage=True)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in words] == [" ."]
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 3
    with pytest.raises(ApiError, match="the model was replaced"):
        chunks.words("two dogs")
    empty = schemas.ChatChunks("x", "words", [])
    first, _ = empty.end(schemas.chat_answer("x", "words", "", 30, []), include_usage=False)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
