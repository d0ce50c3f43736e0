"""The routes that the page and OpenAI's clients use, without a cluster."""

import asyncio
import base64
import gc
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import (
    AUTHORIZED,
    GENERATIONS,
    HANG_S,
    KEY,
    SIZE,
    TIMESTEPS,
    Served,
    colour,
    colour_of,
    error,
    events_of,
    log_records,
    post,
    request,
    run,
    until,
)

from mmcore.storage import Storage
from serve.limits import Limits
from serve.security import Keys

# --- Who may ask -----------------------------------------------------------------------------------------------

CLOSED = [
    ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", GENERATIONS), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/captions"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("DELETE", "/v1/jobs/x"),
    ("GET", "/v1/gallery"), ("GET", "/v1/gallery/x"), ("GET", "/nothing"), ("PUT", GENERATIONS), ("GET", "/docs"),
    ("GET", "/openapi.json"), ("GET", "/v1/models/"), ("OPTIONS", "/v1/models"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_closed_by_default(method: str, path: str) -> None:
    response = request(method, path, headers={})
    assert response.status_code == 401
    assert error(response)["code"] == "missing_api_key"
    wrong = request(method, path, headers={"authorization": f"Bearer {KEY}x"})
    assert (wrong.status_code, error(wrong)["code"]) == (401, "invalid_api_key")


def test_every_route_is_closed_but_health_and_the_page() -> None:
    """Also any route added later."""
    from serve.routes import OPEN_ROUTES

    served = Served()
    assert set(OPEN_ROUTES) == {"/health", "/ready", "/", "/static/{name}"}
    for route in served.service._router.routes:
        path = route.path.replace("{name}", "x").replace("{job_id}", "x").replace("{image_id}", "x")  # type: ignore
        for method in route.methods - {"HEAD"}:  # type: ignore[attr-defined]
            status = request(method, path, headers={}).status_code
            assert (status != 401) == (route.path in OPEN_ROUTES), route.path  # type: ignore[attr-defined]


def test_health_and_readiness_are_open() -> None:
    assert request("GET", "/health", headers={}).json() == {"status": "ok"}
    assert request("GET", "/ready", headers={}).json() == {"status": "ready"}


def test_open_to_all_needs_no_key_and_still_refuses_foreign_pages() -> None:
    served = Served(keys=Keys({}, open_to_all=True))
    here = {"host": "localhost:8000"}
    assert request("GET", "/v1/models", served, headers=here).status_code == 200
    foreign = request("GET", "/v1/models", served, headers={**here, "sec-fetch-site": "cross-site"})
    assert (foreign.status_code, error(foreign)["code"]) == (403, "cross_site")
    assert request("GET", "/v1/models", served, headers={**here, "sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:8000", 200), ("192.168.1.7", 200), ("[::1]:8000", 200),
        ("mine.example:80", 200), ("evil.example", 403), ("localhost.evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403), ("", 403), ("[::1", 403), ("[evil.example]", 403),
    ],
)  # fmt: skip
def test_open_to_all_is_not_open_to_names_that_others_lead_here(host: str, status: int) -> None:
    """DNS rebinding: for a browser, a page of evil.example is on the same site as this service under that name."""
    served = Served(keys=Keys({}, open_to_all=True), allowed_hosts=["mine.example"])
    response = request("GET", "/v1/models", served, headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert error(response)["code"] == "unknown_host"
        assert "allowed_hosts=NAME" in error(response)["message"]
    # With a key the check is not needed.
    assert request("GET", "/v1/models", headers={**AUTHORIZED, "host": host}).status_code == 200


def test_open_to_all_counts_rates_by_address() -> None:
    served = Served(keys=Keys({}, open_to_all=True), limits=Limits(rate_burst=2, rate_per_minute=0.01))

    async def statuses(address: str) -> list[int]:
        transport = httpx.ASGITransport(served.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.get("/v1/models")).status_code for _ in range(3)]

    assert run(statuses("10.0.0.1")) == [200, 200, 429]
    assert run(statuses("10.0.0.2")) == [200, 200, 429]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_answers_carry_what_keeps_browsers_careful(path: str) -> None:
    response = request("GET", path)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["x-request-id"]


def test_routes_that_are_none() -> None:
    assert error(request("GET", "/nothing"))["code"] == "not_found"
    wrong = request("GET", GENERATIONS)
    assert (wrong.status_code, error(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    # Of a path with a route for each method.
    assert request("PUT", "/v1/jobs/x").headers["allow"] == "DELETE, GET, HEAD"


def test_a_rate_too_high_is_429() -> None:
    served = Served(limits=Limits(rate_burst=3, rate_per_minute=0.01))

    async def main() -> list[httpx.Response]:
        async with served.client() as client:
            return [await client.get("/v1/models") for _ in range(5)]

    responses = run(main())
    assert [response.status_code for response in responses] == [200, 200, 200, 429, 429]
    assert error(responses[-1])["code"] == "rate_limit_exceeded"
    assert int(responses[-1].headers["retry-after"]) >= 1


# --- Models, images --------------------------------------------------------------------------------------------


def test_models() -> None:
    body = request("GET", "/v1/models").json()
    assert body["object"] == "list"
    assert [(model["id"], model["kind"]) for model in body["data"]] == [
        ("words", "captioner"),
        ("others", "captioner"),
        ("shapes", "generator"),
    ]
    generator = body["data"][2]
    assert generator["resolution"] == SIZE
    assert generator["options"] == {
        "num_inference_steps": {"type": "integer", "default": 4},
        "guidance_scale": {"type": "number", "default": 3.0},
        "sampler": {"type": "string", "default": "dpmsolver++", "enum": ["dpmsolver++", "ddim"]},
        "negative_prompt": {"type": "string", "default": ""},
    }
    defaults = {name: option["default"] for name, option in generator["options"].items()}
    assert generator["defaults"] == {**defaults, "size": "16x16"}
    assert (generator["object"], generator["owned_by"]) == ("model", "mmcore")


def test_images() -> None:
    response = post(GENERATIONS, {"prompt": "a red square", "n": 3, "seed": 7, "size": "16x16"})
    body = response.json()
    assert body["model"] == "shapes"
    assert body["created"] > 1_700_000_000
    assert [each["seed"] for each in body["data"]] == [7, 8, 9]
    assert all(each["revised_prompt"] is None for each in body["data"])
    assert [colour(each["b64_json"]) for each in body["data"]] == [
        colour_of("a red square", seed) for seed in (7, 8, 9)
    ]


def test_the_file_says_how_it_was_made() -> None:
    from PIL import PngImagePlugin

    fields = {"prompt": "größer", "seed": 5, "num_inference_steps": 5, "guidance_scale": 2, "negative_prompt": "blue"}
    (row,) = post(GENERATIONS, fields).json()["data"]
    image = Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))
    assert isinstance(image, PngImagePlugin.PngImageFile)
    assert image.text == {
        "prompt": "größer", "seed": "5", "steps": "5", "guidance": "2.0", "sampler": "dpmsolver++", "model": "shapes",
        "negative_prompt": "blue",
    }  # fmt: skip


def test_an_image_is_its_prompt_and_its_seed_whoever_shares_the_batch() -> None:
    """Many concurrent requests with different settings: every image equals the one made alone, and batches are full."""
    served = Served()
    batches, batcher = served.fake_generator.batches, served.generator.batcher
    settings = [(steps, guidance) for steps in (2, 4) for guidance in (1.0, 3.0)]
    wanted = [
        {"prompt": f"p{i}", "seed": 10 * i, "n": 1 + i % 3, "num_inference_steps": steps, "guidance_scale": guidance}
        for i, (steps, guidance) in enumerate(settings * 4)
    ]

    async def main() -> list[httpx.Response]:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            asking = [asyncio.ensure_future(client.post(GENERATIONS, json=each)) for each in wanted]
            # A batch is padded with its last image.
            await until(lambda: bool(batches) and len({*batches[0]}) + len(batcher._waiting) == num_images)
            served.fake_generator.gate.set()
            return await asyncio.gather(*asking)

    num_images = sum(each["n"] for each in wanted)
    for each, response in zip(wanted, run(main()), strict=True):
        for index, row in enumerate(response.json()["data"]):
            seed = each["seed"] + index
            expected = colour_of(each["prompt"], seed, each["num_inference_steps"], each["guidance_scale"])
            assert colour(row["b64_json"]) == expected
    # The batch size is constant, so that images are bit-identical. Batches are shared, or there would be one per image.
    assert {len(batch) for batch in batches} == {batcher.batch_size}
    assert len(batches) < num_images / 2
    assert len(served.fake_generator.threads) == 1


def test_what_the_model_refuses_is_told_before_it_waits() -> None:
    served = Served()
    too_many = {"num_inference_steps": TIMESTEPS + 1}
    for fields, param in ((too_many, "num_inference_steps"), ({"prompt": "w " * 300}, "prompt")):
        response = post(GENERATIONS, {"prompt": "x", **fields}, served)
        assert response.status_code == 400
        assert error(response)["param"] == param
    assert not served.fake_generator.batches


def test_unknown_models() -> None:
    response = post(GENERATIONS, {"prompt": "x", "model": "words"})
    assert (response.status_code, error(response)["code"]) == (404, "model_not_found")
    assert "it is a captioner" in error(response)["message"]
    assert "known: shapes" in error(response)["message"]
    assert post(GENERATIONS, {"prompt": "x", "model": "dall-e-3"}).status_code == 404


def test_links_need_a_storage_in_s3(tmp_path: Path) -> None:
    for served in (Served(), Served(storage=Storage(str(tmp_path)))):
        response = post(GENERATIONS, {"prompt": "x", "response_format": "url"}, served)
        assert (response.status_code, error(response)["param"]) == (400, "response_format")
        assert "storage=s3://" in error(response)["message"]


def test_links_to_s3_open_without_a_key_of_ours(s3_server: str) -> None:
    served = Served(storage=Storage(s3_server), limits=Limits.from_environment({"SERVE_URL_EXPIRES_S": "7777"}))
    body = {"prompt": "x", "seed": 3, "n": 2, "response_format": "url"}
    rows = post(GENERATIONS, body, served).json()["data"]
    assert [row["seed"] for row in rows] == [3, 4]
    for row in rows:
        assert "b64_json" not in row
        answer = httpx.get(row["url"], timeout=HANG_S)
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).getpixel((0, 0)) == colour_of("x", row["seed"])
        # Only this image, and only as long as the link is valid.
        assert "X-Amz-Expires=7777" in row["url"]


def test_json_only() -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        response = request("POST", GENERATIONS, content=b'{"prompt": "x"}', headers={**AUTHORIZED, **headers})
        assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")


def test_a_fault_is_not_told_to_the_client() -> None:
    served = Served()
    served.fake_generator.generate = lambda *args: 1 / 0  # type: ignore[assignment, method-assign]
    response = post(GENERATIONS, {"prompt": "x"}, served)
    assert response.status_code == 500
    assert error(response)["code"] == "fault"
    assert "division" not in response.text
    assert response.headers["x-request-id"] in error(response)["message"]


def test_a_request_that_takes_too_long_is_ended() -> None:
    served = Served(limits=Limits(request_timeout_s=0.3))

    async def main() -> tuple[httpx.Response, str]:
        async with served.client() as client:
            answers = []
            for stream in (False, True):
                served.fake_generator.gate.clear()
                body = {"prompt": "x", "num_inference_steps": 200, "stream": stream}
                answers.append(await client.post(GENERATIONS, json=body))
                served.fake_generator.gate.set()
                await served.at_rest()
            assert served.fake_generator.num_steps < 50, "the work goes on though nobody waits for it"
            return answers[0], answers[1].text

    response, text = run(main())
    assert (response.status_code, error(response)["code"]) == (503, "timeout")
    assert events_of(text)[-1][0] == "error"
    assert events_of(text)[-1][1]["error"]["code"] == "timeout"
    assert not any(served.service.front.admission.held.values())


# --- Streams ---------------------------------------------------------------------------------------------------


def test_a_stream_tells_its_steps_and_ends_with_the_answer() -> None:
    response = post(GENERATIONS, {"prompt": "x", "seed": 1, "n": 2, "stream": True, "num_inference_steps": 5})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    names = [name for name, _ in events]
    assert names[0] == "queued"
    assert names[-1] == "done"
    assert events[0][1] == {"type": "image_generation.queued", "position": 1}
    progress = [data for name, data in events if name == "progress"]
    assert [data["step"] for data in progress] == [1, 2, 3, 4, 5]
    assert {data["total"] for data in progress} == {5}
    plain = post(GENERATIONS, {"prompt": "x", "seed": 1, "n": 2, "num_inference_steps": 5}).json()
    assert [events[-1][1][name] for name in ("data", "unknown_words")] == [plain["data"], []]


def test_a_stream_tells_what_is_wrong() -> None:
    events = events_of(post(GENERATIONS, {"prompt": "x", "num_inference_steps": TIMESTEPS + 1, "stream": True}).text)
    assert [name for name, _ in events] == ["error"]
    assert events[0][1]["error"]["param"] == "num_inference_steps"
    # Errors known in advance are a status.
    assert post(GENERATIONS, {"prompt": "", "stream": True}).status_code == 400


def test_who_goes_away_takes_his_work_along() -> None:
    """Under Ray Serve a disconnect cancels the app's task, as this does."""
    served = Served()
    body = json.dumps({"prompt": "x", "num_inference_steps": 200}).encode()

    async def main(stream: bool) -> None:
        content = body if not stream else body[:-1] + b', "stream": true}'
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if sent and sent[-1] == "read":
                await asyncio.sleep(60)
            sent.append("read")
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            sent.insert(0, message)

        headers = [(name.encode(), value.encode()) for name, value in AUTHORIZED.items()]
        headers.append((b"content-type", b"application/json"))
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
            "method": "POST", "path": GENERATIONS, "raw_path": GENERATIONS.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "headers": headers, "client": ("x", 1), "server": ("x", 80),
        }  # fmt: skip
        before = served.fake_generator.num_steps
        served.fake_generator.gate.clear()
        task = asyncio.ensure_future(served.app(scope, receive, send))
        await until(lambda: served.fake_generator.num_steps > before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        served.fake_generator.gate.set()
        await served.at_rest()
        assert served.fake_generator.num_steps < before + 50, "the work goes on"
        assert not any(served.service.front.admission.held.values())
        assert served.service.front.in_flight == 0

    complaints: list[Any] = []

    async def both() -> None:
        # asyncio's warnings about unread exceptions would fill the log of a service whose clients disconnect.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await main(False)
        await main(True)
        gc.collect()
        served.generator.batcher.close()

    run(both())
    assert not complaints


def test_a_stream_that_fails_says_so() -> None:
    """Its status was sent long before. Without an error event, the end would look like success."""
    served = Served()
    served.fake_generator.generate = lambda *args: 1 / 0  # type: ignore[assignment, method-assign]
    headers = {**AUTHORIZED, "x-request-id": "mine-1"}
    response = request("POST", GENERATIONS, served, json={"prompt": "x", "stream": True}, headers=headers)
    name, data = events_of(response.text)[-1]
    assert (name, data["error"]["code"], data["error"]["type"]) == ("error", "fault", "server_error")
    assert "mine-1" in data["error"]["message"]
    assert "division" not in response.text
    assert not any(served.service.front.admission.held.values())


# --- Overload --------------------------------------------------------------------------------------------------


def test_past_the_queue_it_is_429_and_nothing_else() -> None:
    served = Served(limits=Limits(max_queue=8, max_images=8, generator_batch_size=4, rate_burst=1000))

    async def main() -> list[httpx.Response]:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            bodies = ({"prompt": f"p{i}", "seed": i, "n": 2} for i in range(40))
            asking = [asyncio.ensure_future(client.post(GENERATIONS, json=body)) for body in bodies]
            await until(lambda: sum(each.done() for each in asking) == 36)
            served.fake_generator.gate.set()
            return await asyncio.gather(*asking)

    responses = run(main())
    statuses = [response.status_code for response in responses]
    assert statuses.count(200) == 4
    assert statuses.count(429) == 36
    refused = next(response for response in responses if response.status_code == 429)
    assert error(refused)["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for i, response in enumerate(responses):
        if response.status_code == 200:
            assert colour(response.json()["data"][0]["b64_json"]) == colour_of(f"p{i}", i)
    assert not any(served.service.front.admission.held.values())


def test_while_it_ends_nothing_new_begins_and_what_began_is_finished() -> None:
    served = Served()
    front = served.service.front

    async def main() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            first = asyncio.ensure_future(client.post(GENERATIONS, json={"prompt": "x"}))
            await until(lambda: front.in_flight == 1)
            front.draining = True
            refused = await client.post(GENERATIONS, json={"prompt": "x"})
            ready = await client.get("/ready")
            assert front.in_flight == 1
            served.fake_generator.gate.set()
            return await first, refused, ready

    finished, refused, ready = run(main())
    assert finished.status_code == 200
    assert (refused.status_code, error(refused)["code"]) == (503, "draining")
    assert ready.status_code == 503
    assert front.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_at_work_until_a_slow_client_has_its_whole_answer(stream: bool) -> None:
    """The end of the service waits for requests in flight, and cuts the connection of any request that it does not
    count.
    """
    served = Served()
    front = served.service.front
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body}]
    headers = [(name.encode(), value.encode()) for name, value in AUTHORIZED.items()]
    headers.append((b"content-type", b"application/json"))
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": headers, "query_string": b""}
    counts: list[int] = []

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def slow_send(message: Any) -> None:
        await asyncio.sleep(0.01)
        counts.append(front.in_flight)

    async def main() -> None:
        await served.app({**scope, "state": {}}, receive, slow_send)
        await served.close()

    run(main())
    assert len(counts) >= 2, "there was no answer"
    assert set(counts) == {1}
    assert front.in_flight == 0


def test_a_timeout_within_is_no_end_of_the_time() -> None:
    """A storage that gives up is an error in the log, and nobody waited for 300 s."""
    served = Served()
    replica = served.service.front.models["shapes"].replica

    async def give_up(method: str, *args: Any) -> Any:
        raise TimeoutError("the storage does not answer")

    replica.call = give_up  # type: ignore[method-assign]
    with log_records() as records:
        response = post(GENERATIONS, {"prompt": "x"}, served)
    assert response.status_code == 500
    assert "the storage does not answer" in "".join(str(record.exc_info) for record in records)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", f"{GENERATIONS}?n=3"), ("GET", "/v1/models?n"), ("GET", "/v1/jobs/x?n=1"), ("GET", "/v1/gallery?n=1")],
)
def test_a_field_in_a_query_that_nobody_reads_is_refused_by_its_name(method: str, path: str) -> None:
    response = request(method, path, json={"prompt": "x"})
    assert (response.status_code, error(response)["code"], error(response)["param"]) == (400, "unknown_field", "n")
    assert "'n'" in error(response)["message"]
