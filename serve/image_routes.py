"""The routes for images: at once, as a stream of events, or as a job that is fetched later."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Literal, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmcore.storage import Storage
from serve import schemas
from serve.clients import Model, Replica
from serve.errors import ApiError, bad_value, quoted
from serve.event_stream import EventStream, broken_off, event, until_done
from serve.front import Front, facts_of_request
from serve.image_jobs import FinishedJob, RefusedJob, SubmittedJob, UnfinishedJob, new_id
from serve.images import to_base64
from serve.metrics import note_slowest
from serve.options import with_options
from serve.parsing import parse
from serve.schemas import GenerateWork

if TYPE_CHECKING:
    from serve.generator import GeneratorInfo, LastEvent


class ImageRoutes:
    """`storage`: the place of the images that answers link to."""

    def __init__(self, front: Front, jobs: Replica | None, storage: Storage | None) -> None:
        self._front, self._jobs, self._storage = front, jobs, storage

    async def generations(self, request: Request) -> Response:
        front = self._front
        fields = await front.json(request, front.limits.max_json_bytes)
        asked, model, work, links = await self._work(request, fields)
        line = facts_of_request(request)
        with contextlib.ExitStack() as held:
            held.enter_context(front.admission.enter({model.name: len(work.seeds)}))
            if asked.stream:
                return EventStream(self._events(model, work, links, line), held.pop_all())
            done: LastEvent = await model.replica.call("generate", work)
            return JSONResponse(await self._answer(model, work, done, links, line))

    async def _work(
        self, request: Request, fields: Any, *where: str
    ) -> tuple[schemas.GenerationRequest, Model, GenerateWork, Storage | None]:
        """The request, its model, the work in full, and the storage for links. Raises ApiError.

        `fields` stand at `where` in the body: nowhere deeper for a request, at "request" for a job.
        """
        model = self._front.named(schemas.model_of(fields), "generator")
        info = cast("GeneratorInfo", await model.info())
        asked = parse(with_options(schemas.GenerationRequest, info["options"]), fields, *where)
        links, facts = self._links(asked.response_format), facts_of_request(request)
        limits = self._front.limits
        work = schemas.generate_work(asked, info, limits, is_job=bool(where), request_id=facts["request_id"])
        facts.update(model=model.name, n=len(work.seeds))
        if asked.size not in (None, "auto", info["defaults"]["size"]) and (refusal := await model.refusal(work)):
            # The model's refusal is told before a stream begins.
            raise refusal
        return asked, model, work, links

    def _links(self, response_format: str) -> Storage | None:
        """The storage for images that the answer links to; None for images in the answer itself. Raises ApiError."""
        if response_format != "url":
            return None
        if self._storage is None or not self._storage.is_s3:
            raise ApiError(
                400,
                "response_format: url needs a storage in S3, and this service has none (start it with "
                "storage=s3://bucket/prefix); ask for b64_json",
                param="response_format",
                code="unsupported_response_format",
            )
        return self._storage

    async def _answer(
        self, model: Model, work: GenerateWork, done: "LastEvent", links: Storage | None, line: dict[str, Any]
    ) -> dict[str, Any]:
        """The answer of a generator's last event. `line`: what is logged of the request."""
        if done["event"] == "refused":
            raise ApiError.from_dict(done["error"])
        for facts in done["facts"]:
            self._front.metrics.observe(model.name, facts)
            note_slowest(line, facts)
        created = int(time.time())
        if links is None:
            data = [{"b64_json": to_base64(image)} for image in done["images"]]
        else:
            # A name that nobody can guess.
            folder = f"images/{secrets.token_hex(16)}"
            keys = [f"{folder}/{index}.png" for index in range(len(done["images"]))]
            writes = (asyncio.to_thread(links.write, *pair) for pair in zip(keys, done["images"], strict=True))
            await asyncio.gather(*writes)
            data = await self._presigned(links, keys)
        return schemas.generation_answer(work, model.name, created, data, done["unknown_words"])

    async def _presigned(self, links: Storage, keys: list[str]) -> list[dict[str, str]]:
        expires_s = self._front.limits.url_expires_s
        # Computed here, but the first one reads boto3's files, and any may have to ask for new credentials.
        return await asyncio.to_thread(lambda: [{"url": links.presigned_url(key, expires_s)} for key in keys])

    async def _events(
        self, model: Model, work: GenerateWork, links: Storage | None, line: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        """The generator's events as server-sent events. Before the last one stand those of OpenAI's own type."""
        source = model.replica.stream("stream", work)
        waiting: asyncio.Future[Any] | None = None
        timeout_s = self._front.limits.request_timeout_s
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(source, None))
                async for alive in until_done(waiting, timeout_s, deadline):
                    yield alive
                told, waiting = waiting.result(), None
                name = told.pop("event")
                if name in ("done", "refused"):
                    last = cast("LastEvent", {"event": name, **told})
                    answer = await self._answer(model, work, last, links, line)
                    for completed in schemas.completed_events(answer):
                        yield event(completed, completed["type"])
                    yield event({"type": "image_generation.done", **answer}, "done")
                    return
                yield event({"type": f"image_generation.{name}", **told}, name)
        except Exception as error:
            yield broken_off(self._front, error, line, model.name)
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait([waiting])
            await source.aclose()

    # --- Jobs ------------------------------------------------------------------------------------------------

    def _need_jobs(self) -> Replica:
        if self._jobs is None:
            raise ApiError(404, "this service has no generator, so it has no jobs", code="model_not_found")
        return self._jobs

    async def submit_job(self, request: Request) -> Response:
        front, jobs = self._front, self._need_jobs()
        fields = await front.json(request, front.limits.max_json_bytes)
        inner = parse(schemas.JobRequest, fields).request
        asked, model, work, _ = await self._work(request, inner, "request")
        if asked.stream:
            raise bad_value("request.stream", "a job cannot be streamed; fetch it by GET /v1/jobs/ID")
        if (refusal := await model.refusal(work)) is not None:
            raise refusal
        caller = request.scope["state"]["caller"]
        answer: SubmittedJob | RefusedJob = await jobs.call(
            "submit", new_id(), caller, model.name, asked.response_format, work
        )
        if "refused" in answer:
            raise ApiError.from_dict(answer["refused"])
        told = {"ignored": list(work.ignored)} if work.ignored else {}
        return JSONResponse({**answer, **told}, status_code=202, headers={"location": f"/v1/jobs/{answer['id']}"})

    async def get_job(self, request: Request) -> Response:
        return await self._job(request, "get")

    async def cancel_job(self, request: Request) -> Response:
        return await self._job(request, "cancel")

    async def _job(self, request: Request, method: str) -> Response:
        job_id, jobs = request.path_params["job_id"], self._need_jobs()
        job: UnfinishedJob | FinishedJob | None = await jobs.call(method, request.scope["state"]["caller"], job_id)
        if job is None:
            raise ApiError(404, f"no job {quoted(job_id)} of this key", param="id", code="job_not_found")
        result = None
        if job["status"] == "done":
            if links := self._links(job["response_format"]):
                data = await self._presigned(links, job["keys"])
            else:
                data = [{"b64_json": to_base64(image)} for image in await jobs.call("images", job["keys"])]
            work, unknown_words = GenerateWork.from_json(job["work"]), job.get("unknown_words", [])
            result = schemas.generation_answer(work, job["model"], job["created"], data, unknown_words)
        names: tuple[Literal["id", "status", "progress", "error"], ...] = ("id", "status", "progress", "error")
        return JSONResponse({**{name: job[name] for name in names}, "result": result})
