"""Captions, the gallery, the page, metrics and logs, without a cluster."""

import asyncio
import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import (
    AUTHORIZED,
    GENERATIONS,
    Served,
    chat,
    data_uri,
    error,
    log_records,
    picture,
    post,
    request,
    run,
    until,
    write_sweep,
)

from mmcore.data.manifest import read_manifest
from mmcore.storage import Storage
from serve.limits import Limits

# --- Captions --------------------------------------------------------------------------------------------------


def test_chat() -> None:
    body = post("/v1/chat/completions", chat(data_uri(picture("green")))).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "words"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a green picture", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 3}
    short = post("/v1/chat/completions", chat(data_uri(picture("green")), max_tokens=2)).json()
    assert short["choices"][0]["message"]["content"] == "a green"
    assert short["choices"][0]["finish_reason"] == "length"


def test_chat_takes_no_addresses() -> None:
    response = post("/v1/chat/completions", chat("http://127.0.0.1:9/x.png"))
    assert (response.status_code, error(response)["code"]) == (400, "unsupported_url")


def test_captions_of_many_images_from_every_captioner() -> None:
    colours = ["red", "green", "blue", "white", "red"]
    files = [("images", (f"{i}.png", picture(name), "image/png")) for i, name in enumerate(colours)]
    served = Served()
    rows = request("POST", "/v1/captions", served, files=files).json()["data"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["file_name"] for row in rows] == [f"{i}.png" for i in range(5)]
    assert [row["captions"] for row in rows] == [
        {"words": f"a {name} picture", "others": f"some {name} picture"} for name in colours
    ]
    assert sum(served.fake_captioner.batches) == 5
    body = {"images": [data_uri(picture(name)) for name in colours], "models": ["others"]}
    rows = post("/v1/captions", body).json()["data"]
    assert [row["captions"] for row in rows] == [{"others": f"some {name} picture"} for name in colours]
    assert rows[0]["file_name"] is None


def test_captions_share_batches() -> None:
    served = Served()
    batches, batcher = served.fake_captioner.batches, served.captioner.batcher

    async def main() -> None:
        async with served.client() as client:
            served.fake_captioner.gate.clear()
            body = chat(data_uri(picture()))
            asking = [asyncio.ensure_future(client.post("/v1/chat/completions", json=body)) for _ in range(24)]
            await until(lambda: sum(batches) + len(batcher._waiting) == 24)
            served.fake_captioner.gate.set()
            await asyncio.gather(*asking)

    run(main())
    assert sum(batches) == 24
    # The first batch takes what is there, the others are full.
    assert len(batches) <= 1 + math.ceil(23 / batcher.batch_size)


def test_one_form_field_chooses_captioners() -> None:
    files = [("images", ("x.png", picture("blue"), "image/png"))]
    response = request("POST", "/v1/captions", files=files, data={"model": ["words", "others"]})
    assert list(response.json()["data"][0]["captions"]) == ["words", "others"]


@pytest.mark.parametrize("as_form", [True, False])
def test_one_bad_image_is_named(as_form: bool) -> None:
    pictures = [picture("red"), picture("blue"), picture("red")[:60], picture("green")]
    served = Served()
    if as_form:
        files = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures)]
        response = request("POST", "/v1/captions", served, files=files)
    else:
        response = post("/v1/captions", {"images": [data_uri(data) for data in pictures]}, served)
    assert response.status_code == 400
    assert error(response)["param"] == "images.2"
    place = "image 3 of 4 ('2.png'): " if as_form else "image 3 of 4: "
    assert error(response)["message"].startswith(place)
    assert not any(served.service.front.admission.held.values())


FORMS: list[tuple[dict[str, Any], str | None]] = [
    ({"data": {"model": "words"}, "files": []}, None),
    ({"files": [("pictures", ("x", b"x", "image/png"))]}, "pictures"),
    ({"files": [("images", ("x", picture(), "image/png"))], "data": {"models": "words"}}, "models"),
    ({"files": [("images", ("x", picture(), "image/png"))], "data": {"model": "nobody"}}, "models"),
    ({"files": [("images", ("x", picture(), "image/png"))], "data": {"model": ["words"] * 2}}, "models"),
    ({"files": [("images", (f"{i}", picture(), "image/png")) for i in range(17)]}, None),
    ({"files": [("model", ("x", b"words", "text/plain"))]}, "model"),
    ({"data": {"images": "x"}, "files": [("images", ("x", picture(), "image/png"))]}, "images"),
    ({"content": b"no form", "headers": {**AUTHORIZED, "content-type": "multipart/form-data"}}, None),
    ({"content": b"no form", "headers": {**AUTHORIZED, "content-type": "multipart/form-data; boundary=x"}}, None),
    ({"content": b"--x\r\n\r\n", "headers": {**AUTHORIZED, "content-type": "multipart/form-data; boundary=x"}}, None),
]  # fmt: skip


def form_of(*pictures: bytes) -> bytes:
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="%d.png"\r\n\r\n%s\r\n' % (i, data)
        for i, data in enumerate(pictures)
    )
    return b"".join(parts) + b"--b--\r\n"


def test_a_form_that_breaks_off_loses_no_image_in_silence() -> None:
    """Truncated after a complete part, it looks like a form with fewer images."""
    headers = {**AUTHORIZED, "content-type": "multipart/form-data; boundary=b"}
    body = form_of(picture("red"), picture("blue"))
    assert len(request("POST", "/v1/captions", content=body, headers=headers).json()["data"]) == 2
    # In the last image, after it, in the last boundary, and after the first image.
    for end in (len(body) - 30, len(body) - 9, len(body) - 4, body.index(b"--b", 3), body.index(b"--b", 3) + 5):
        response = request("POST", "/v1/captions", content=body[:end], headers=headers)
        assert (response.status_code, error(response)["code"]) == (400, "invalid_form"), end
        assert "ends before its last boundary" in error(response)["message"], end


@pytest.mark.parametrize("charset", ["unicode_escape", "raw_unicode_escape", "utf-16", "idna", "x\x00", "none", ""])
def test_a_form_has_one_charset(charset: str) -> None:
    """Clients may send file names that no answer can hold, such as half of a surrogate pair."""
    body = form_of(picture()).replace(b"0.png", rb"\ud800.png")
    headers = {**AUTHORIZED, "content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    response = request("POST", "/v1/captions", content=body, headers=headers)
    assert (response.status_code, error(response)["code"]) == (400, "invalid_form")
    headers = {**AUTHORIZED, "content-type": "multipart/form-data; boundary=b; charset=UTF-8"}
    (row,) = request("POST", "/v1/captions", content=body, headers=headers).json()["data"]
    assert row["file_name"] == r"\ud800.png"


@pytest.mark.parametrize("name", ["größer 图.png", "a b;c=d'.png", "x" * 300, "../../etc/passwd"])
def test_file_names_come_back_as_they_were_sent(name: str) -> None:
    files = [("images", (name, picture(), "image/png"))]
    (row,) = request("POST", "/v1/captions", files=files).json()["data"]
    assert row["file_name"] == name[:200]


@pytest.mark.parametrize("headers", [AUTHORIZED, {**AUTHORIZED, "content-type": "text/plain"}])
def test_captions_without_a_body_name_both_forms(headers: dict[str, str]) -> None:
    response = request("POST", "/v1/captions", headers=headers)
    assert (response.status_code, error(response)["message"]) == (
        415,
        "the body must be JSON (Content-Type: application/json) or a form with images as files (multipart/form-data)",
    )


@pytest.mark.parametrize(("options", "param"), FORMS)
def test_forms_that_are_wrong(options: dict[str, Any], param: str | None) -> None:
    response = request("POST", "/v1/captions", **options)
    assert response.status_code in (400, 404, 415), response.text
    if param is not None:
        assert error(response)["param"] == param


# --- Gallery, page, metrics, logs ------------------------------------------------------------------------------


def test_the_gallery_is_the_manifest(tmp_path: Path) -> None:
    write_sweep(tmp_path, {f"image {i}": f"png {i}".encode() for i in range(5)})
    (tmp_path / "secret").write_text("secret")
    served = Served(gallery=Storage(str(tmp_path)))

    async def main() -> None:
        async with served.client() as client:
            first = (await client.get("/v1/gallery", params={"limit": 3})).json()
            assert [row["prompt"] for row in first["data"]] == ["p0", "p1", "p2"]
            assert (await client.get(first["data"][1]["url"])).content == b"png 1"
            rest = (await client.get("/v1/gallery", params={"limit": 3, "cursor": first["next"]})).json()
            assert [row["seed"] for row in rest["data"]] == [3, 4]
            assert rest["next"] is None
            image = await client.get("/v1/gallery/image%202")
            assert (image.content, image.headers["content-type"]) == (b"png 2", "image/png")
            for name in ("nobody", "..%2fsecret", "%2e%2e%2fsecret", "..", "secret"):
                assert (await client.get(f"/v1/gallery/{name}")).status_code == 404
            for query in ("limit=0", "limit=201", "limit=x", "cursor=-1", "cursor=x", "page=2", "limit=9" + "9" * 50):
                assert (await client.get(f"/v1/gallery?{query}")).status_code == 400

    run(main())


def test_the_gallery_follows_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gallery that grows, and one that is made again with equal names of its parts."""
    monkeypatch.setattr("serve.gallery._REREAD_S", 0.0)
    read = []
    monkeypatch.setattr("mmcore.data.manifest.read_manifest", lambda sweep: read.append(1) or read_manifest(sweep))
    served = Served(gallery=Storage(str(tmp_path)))

    async def ids(client: httpx.AsyncClient) -> list[str]:
        return [row["image_id"] for row in (await client.get("/v1/gallery")).json()["data"]]

    async def main() -> None:
        async with served.client() as client:
            assert (await client.get("/v1/gallery")).status_code == 404
            write_sweep(tmp_path, {"old": b"png"})
            (tmp_path / "sweep.json").write_text('{"seed": 0}')
            assert await ids(client) == await ids(client) == ["old"]
            assert len(read) == 2, "what did not change was read again"
            (tmp_path / "manifest" / "part-000001.parquet").write_bytes(
                (tmp_path / "manifest" / "part-000000.parquet").read_bytes()
            )
            assert await ids(client) == ["old", "old"]
            for folder in ("manifest", "images"):
                shutil.rmtree(tmp_path / folder)
            write_sweep(tmp_path, {"new": b"png"})
            (tmp_path / "manifest" / "part-000001.parquet").write_bytes(
                (tmp_path / "manifest" / "part-000000.parquet").read_bytes()
            )
            (tmp_path / "sweep.json").write_text('{"seed": 1}')
            assert await ids(client) == ["new", "new"]
            assert (await client.get("/v1/gallery/new")).content == b"png"
            assert (await client.get("/v1/gallery/old")).status_code == 404

    run(main())


def test_without_a_gallery() -> None:
    assert error(request("GET", "/v1/gallery"))["code"] == "no_gallery"


def test_a_gallery_without_a_sweep_does_not_tell_where_it_lies(tmp_path: Path) -> None:
    with log_records() as records:
        response = request("GET", "/v1/gallery", Served(gallery=Storage(str(tmp_path))))
    assert (response.status_code, error(response)["code"]) == (404, "no_gallery")
    assert error(response)["message"] == "the gallery has no sweep of images"
    assert str(tmp_path) not in response.text
    assert any(str(tmp_path) in str(getattr(record, "fields", "")) for record in records)


def test_the_page_is_open_and_only_its_files_are(tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    (web / "index.html").write_text("<title>page</title>")
    (web / "app.js").write_text("//")
    (tmp_path / "secret").write_text("secret")
    for path, status in {
        "/": 200, "/static/app.js": 200, "/static/index.html": 200, "/static/none.js": 404,
        "/static/..%2fsecret": 401, "/static/%2e%2e/secret": 401, "/static/": 401, "/static/a/b": 401,
    }.items():  # fmt: skip
        assert request("GET", path, Served(web=web), headers={}).status_code == status, path
    page = request("GET", "/", Served(web=web), headers={})
    assert page.headers["content-type"].startswith("text/html")
    script = request("GET", "/static/app.js", Served(web=web), headers={})
    assert "javascript" in script.headers["content-type"]


def test_metrics() -> None:
    served = Served()

    async def main() -> str:
        async with served.client() as client:
            await client.post(GENERATIONS, json={"prompt": "secret words", "n": 3})
            await client.post("/v1/chat/completions", json=chat(data_uri(picture())))
            await client.post(GENERATIONS, json={"prompt": "x", "n": 99})
            await client.get("/some/path/of/a/stranger")
            return (await client.get("/metrics")).text

    text = run(main())
    for line in (
        f'mmcore_requests_total{{method="POST",route="{GENERATIONS}",status="200"}} 1.0',
        f'mmcore_requests_total{{method="POST",route="{GENERATIONS}",status="400"}} 1.0',
        'mmcore_refused_total{code="invalid_value"} 1.0',
        'mmcore_images_total{model="shapes"} 3.0',
        'mmcore_batch_size_count{model="shapes"} 1.0',
        'mmcore_batch_size_sum{model="shapes"} 3.0',
        'mmcore_stage_seconds_count{model="shapes",stage="model"} 3.0',
        'mmcore_stage_seconds_count{model="shapes",stage="queue"} 3.0',
        'mmcore_stage_seconds_count{model="shapes",stage="encode"} 3.0',
        'mmcore_stage_seconds_count{model="all",stage="decode"} 1.0',
        'mmcore_queue_images{model="shapes"} 0.0',
        "mmcore_in_flight 1.0",
        "process_resident_memory_bytes",
    ):
        assert line in text, line
    assert "secret" not in text
    assert "stranger" not in text, "a path that a stranger makes up became a label"


def test_one_line_of_json_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    from serve.metrics import configure_logging, logger

    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    configure_logging()
    try:
        headers = {**AUTHORIZED, "x-request-id": "my-request.1"}
        response = request("POST", GENERATIONS, json={"prompt": "secret words", "n": 2}, headers=headers)
        assert response.status_code == 200
        request("POST", GENERATIONS, json={"prompt": "x", "n": 99})
        hostile = {**AUTHORIZED, "x-request-id": 'x" }\t{' + "y" * 200}
        request("GET", "/nothing", headers=hostile)
        request("POST", "/v1/chat/completions", json=chat(data_uri(picture())), headers=headers)
        asyncio.run(one_job(headers))
        for path in ("/health", "/ready", "/", "/static/app.js"):
            request("GET", path, headers=headers)
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    lines = [line for line in told if line["message"] == "request"]
    first, second, third = lines[:3]
    assert first["request_id"] == "my-request.1"
    assert (first["method"], first["route"], first["status"]) == ("POST", GENERATIONS, 200)
    assert (first["model"], first["n"]) == ("shapes", 2)
    assert first["seconds"] > 0
    assert len(first["caller"]) == 12
    assert (second["status"], second["error"]) == (400, "invalid_value")
    assert third["route"] == "other"
    assert len(third["request_id"]) <= 64
    assert "secret" not in json.dumps(told)
    # The times of the models' processes are in the request's own line; the end of a job has one more.
    assert {"queue_s", "model_s", "encode_s"} <= first.keys()
    mine = [line for line in told if line["request_id"] == "my-request.1"]
    captioned = next(line for line in mine if line.get("route") == "/v1/chat/completions")
    assert (captioned["model"], captioned["n"], captioned["model_s"] > 0) == ("words", 1, True)
    (job,) = [line for line in mine if line["message"] == "job"]
    assert (job["status"], job["n"]) == ("done", 3)
    assert job["job"].startswith("job-")
    assert {line["message"] for line in mine} == {"request", "job"}
    assert not {"/health", "/ready", "/", "/static/{name}"} & {line.get("route") for line in mine}
    once = [line["route"] for line in mine if line["message"] == "request" and line["method"] == "POST"]
    assert sorted(once) == sorted([GENERATIONS, "/v1/chat/completions", "/v1/jobs"])


async def one_job(headers: dict[str, str]) -> None:
    async with Served().client(headers) as client:
        job = (await client.post("/v1/jobs", json={"request": {"prompt": "secret words", "n": 3}})).json()
        while (await client.get(f"/v1/jobs/{job['id']}")).json()["status"] != "done":
            await asyncio.sleep(0.01)


def test_limits_reach_the_models_that_are_described() -> None:
    limits = dataclasses.replace(Limits(), max_n=3)
    model = request("GET", "/v1/models", Served(limits=limits)).json()["data"][2]
    assert model["limits"]["n"] == 3
    assert np.isfinite(list(model["limits"].values())).all()
