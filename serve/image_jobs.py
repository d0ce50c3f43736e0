"""Jobs: requests for images that are handed in, done when there is time, and fetched later.

A job lies in the storage. Its request is ``pending/{id}.json`` until it is finished. Then ``jobs/{id}/`` holds its
images and, written last, ``result.json``. With a lasting storage (`storage=URI`) the next process does what is pending.
The images are then the same, as the seeds are part of the request. Without one, jobs lie in a temporary folder and end
with this process.
"""

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast, final

from mmcore.storage import Storage
from mmcore.temporary import make_folder, remove_folder
from serve.clients import Deployed, Replica
from serve.draining import Unfinished
from serve.errors import ApiError, ErrorFields, ErrorObject, fault
from serve.limits import Limits
from serve.metrics import configure_logging, logger
from serve.schemas import GenerateWork

if TYPE_CHECKING:
    from serve.generator import LastEvent

_PENDING, _FINISHED, _RESULT = "pending", "jobs", "result.json"
_RECOVER_EVERY_S = 3600.0
# The pause before a job is tried again that had no model or no storage, which is not its own fault ...
_UNAVAILABLE_PAUSE_S = 10.0
# ... and the pauses after the model failed. Its process may be broken, and is replaced within a minute. If the job
# fails in the next one too, the job is the cause.
_FAULT_PAUSES_S = (5.0, 10.0, 60.0)
# The pauses before further attempts to write into a storage that failed. On S3 it has tried ten times by then.
_WRITE_PAUSES_S = (1.0, 5.0, 25.0)
_ID = re.compile(r"job-([0-9a-f]{10})-[0-9a-f]{32}")


def new_id() -> str:
    """A new job's id. It holds the time, and cannot be guessed."""
    return f"job-{int(time.time()):010x}-{secrets.token_hex(16)}"


def _submitted_at(job_id: str) -> int | None:
    """Unix seconds; None if the text is not the id of a job."""
    match = _ID.fullmatch(job_id)
    return int(match.group(1), 16) if match else None


_Open = Literal["queued", "running"]
_Ended = Literal["done", "failed", "cancelled"]


@final
class SubmittedJob(TypedDict):
    """A job that is in the storage."""

    id: str
    status: _Open | _Ended


@final
class RefusedJob(TypedDict):
    """Why a job is not taken in."""

    refused: ErrorFields


class JobProgress(TypedDict):
    """Steps done, of the steps of all images."""

    step: int
    total: int


class UnfinishedJob(TypedDict):
    """What is known of a job that is not finished."""

    id: str
    status: _Open
    progress: JobProgress | None
    error: ErrorObject | None


class FinishedJob(TypedDict):
    """What is known of a job that is finished; `created` in Unix seconds, `keys` of the images of one that is done."""

    id: str
    status: _Ended
    progress: JobProgress | None
    error: ErrorObject | None
    model: str
    response_format: str
    created: int
    work: dict[str, Any]
    keys: NotRequired[list[str]]
    # Not in jobs that earlier services have finished.
    unknown_words: NotRequired[list[str]]


class _StoredJob(FinishedJob):
    """What the storage keeps of a finished job."""

    owner: str


class _JobEnd(TypedDict):
    """The end of a job: `keys` and `unknown_words` of its images if it is done, `error` if it failed."""

    status: _Ended
    keys: NotRequired[list[str]]
    unknown_words: NotRequired[list[str]]
    error: NotRequired[ErrorObject]


@dataclass
class _Job:
    """An unfinished job. `owner`: the fingerprint of the key that it was handed in with."""

    id: str
    owner: str
    model: str
    response_format: str
    created: int
    work: GenerateWork
    status: _Open = "queued"
    progress: JobProgress | None = None
    cancelled: bool = False
    """Cancelled by its owner. If its task ends in another way, the next process does the job."""
    finishing: bool = False
    keys: list[str] = field(default_factory=list)
    """Keys of its images that are already in the storage."""
    unknown_words: list[str] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)

    def request(self) -> dict[str, Any]:
        names = ("owner", "model", "response_format", "created")
        return {**{name: getattr(self, name) for name in names}, "work": asdict(self.work)}


class Jobs:
    """One process holds all jobs. `generators`: Ray Serve's handles by name; `reach` turns a handle into a replica."""

    def __init__(
        self,
        generators: Mapping[str, Any],
        storage: str | None,
        limits: Limits,
        reach: Callable[[Any], Replica] = Deployed,
    ) -> None:
        configure_logging()
        self._replicas = {name: reach(handle) for name, handle in generators.items()}
        self._temporary = None if storage else make_folder("jobs")
        self._storage = Storage(storage or f"{self._temporary}/jobs")
        self._limits = limits
        self._jobs: dict[str, _Job] = {}
        self._places = asyncio.Semaphore(limits.job_concurrency)
        self._draining = False
        # Of the time when it began to drain, without those that were finished since in a lasting storage.
        self._unfinished: set[str] = set()
        self._recovered_at = float("-inf")
        self._recovery: asyncio.Task[None] | None = None
        self._pruning: asyncio.Task[None] | None = None

    # --- Called by the routes --------------------------------------------------------------------------------

    async def submit(
        self, job_id: str, owner: str, model: str, response_format: str, work: GenerateWork
    ) -> SubmittedJob | RefusedJob:
        """Store a job. Returns its id, or why it is refused.

        `job_id` comes from the caller, made by `new_id`. If this process dies meanwhile and the call is repeated in the
        next one, the job is there once.
        """
        if (known := await self.get(owner, job_id)) is not None:
            return {"id": job_id, "status": known["status"]}
        if self._draining:
            refusal = ApiError(503, "the service is ending", code="draining", retry_after_s=10.0)
            return {"refused": refusal.as_dict()}
        mine = sum(job.owner == owner for job in self._jobs.values())
        if len(self._jobs) >= self._limits.max_jobs or mine >= self._limits.max_jobs_per_key:
            message = f"too many jobs are unfinished: {len(self._jobs)} in all, {mine} of this key; try again"
            return {"refused": ApiError(429, message, code="jobs_full", retry_after_s=30.0).as_dict()}
        created = _submitted_at(job_id)
        assert created is not None, f"{job_id!r} is no id of new_id"
        job = _Job(job_id, owner, model, response_format, created, work)
        # Counted before it is written, so that many at once cannot slip past the limit.
        self._jobs[job.id] = job
        request = json.dumps(job.request()).encode()
        writing = asyncio.create_task(asyncio.to_thread(self._storage.write, f"{_PENDING}/{job.id}.json", request))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            job.task = asyncio.create_task(self._withdraw(job, writing))
            raise
        except Exception:
            del self._jobs[job.id]
            raise
        self._start(job)
        return {"id": job.id, "status": job.status}

    async def _withdraw(self, job: _Job, writing: "asyncio.Task[None]") -> None:
        """Undo a submission that was cancelled, whose caller never learns the id.

        The thread that writes cannot be stopped. Until it ends the job counts, so that its file is not taken up.
        """
        try:
            await asyncio.wait([writing])
            await asyncio.to_thread(self._storage.delete, f"{_PENDING}/{job.id}.json")
        finally:
            del self._jobs[job.id]

    async def get(self, owner: str, job_id: str) -> UnfinishedJob | FinishedJob | None:
        """The state of a job; None if this owner has no job of that id.

        A finished job names its images in the storage (`keys`), which `images` reads.
        """
        await self._recover()
        job = self._jobs.get(job_id)
        if job is not None:
            if job.owner != owner:
                return None
            return {"id": job.id, "status": job.status, "progress": job.progress, "error": None}
        submitted_at = _submitted_at(job_id)
        if submitted_at is None or submitted_at < time.time() - self._limits.job_ttl_s:
            return None
        try:
            result = json.loads(await asyncio.to_thread(self._storage.read, f"{_FINISHED}/{job_id}/{_RESULT}"))
        except FileNotFoundError:
            # Unfinished and not in work: its end could not be written, or an earlier process took it in.
            job = await self._resume(job_id)
            if job is None or job.owner != owner:
                return None
            return {"id": job.id, "status": job.status, "progress": None, "error": None}
        return result if result.pop("owner") == owner else None

    async def images(self, keys: list[str]) -> list[bytes]:
        return list(await asyncio.gather(*(asyncio.to_thread(self._storage.read, key) for key in keys)))

    async def cancel(self, owner: str, job_id: str) -> UnfinishedJob | FinishedJob | None:
        """Cancel a job. A finished job stays as it is."""
        await self._recover()
        job = self._jobs.get(job_id)
        if job is not None and job.owner == owner and job.task is not None:
            # A job that is being finished only waits for its end to be written.
            if not job.finishing:
                job.cancelled = True
                job.task.cancel()
            await asyncio.wait([job.task])
        return await self.get(owner, job_id)

    async def drain(self) -> Unfinished:
        """Begin no further job; returns the unfinished ones. Those at work in a lasting storage are waited for.

        Without a lasting storage nobody can fetch their images, so none is waited for. What is unfinished at the first
        call is then lost, even if it ends meanwhile.
        """
        if not self._draining:
            self._unfinished = set(self._jobs)
        self._draining = True
        if self._temporary is not None:
            return {"waited_for": [], "kept": [], "lost": sorted(self._unfinished)}
        running = [job.id for job in self._jobs.values() if job.status == "running"]
        return {"waited_for": running, "kept": sorted(self._unfinished), "lost": []}

    def __del__(self) -> None:
        """Ray Serve calls it before the process ends, as Python's own end may not run."""
        if self._temporary is not None:
            remove_folder(self._temporary)

    async def check_health(self) -> None:
        """Ray Serve calls it from the start on, so that pending jobs are taken up without a request.

        Nothing is awaited: another process would not help a storage that does not answer.
        """
        self._recovering()

    # --- The work --------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        await asyncio.shield(self._recovering())

    def _recovering(self) -> "asyncio.Task[None]":
        """At the start and every hour: take up pending jobs that are not in work, and delete those that are too old."""
        last, age_s = self._recovery, time.monotonic() - self._recovered_at
        if last is None or (last.done() and (last.exception() is not None or age_s > _RECOVER_EVERY_S)):
            self._recovered_at = time.monotonic()
            self._recovery = last = asyncio.create_task(self._take_up())
            last.add_done_callback(lambda task: _log_fault(task, "the storage of jobs does not answer"))
            # It runs beside all else. What it cannot delete it tries again the next time.
            self._pruning = asyncio.create_task(asyncio.to_thread(self._prune))
            self._pruning.add_done_callback(lambda task: _log_fault(task, "old jobs could not be deleted"))
        return last

    async def _take_up(self) -> None:
        for name in await asyncio.to_thread((self._storage / _PENDING).list, ".json"):
            job_id = name.removesuffix(".json")
            if job_id not in self._jobs:
                await self._resume(job_id)

    async def _resume(self, job_id: str) -> _Job | None:
        """Take up a pending job; None if there is none, or if it cannot be read."""
        try:
            fields = json.loads(await asyncio.to_thread(self._storage.read, f"{_PENDING}/{job_id}.json"))
            work = GenerateWork.from_json(fields.pop("work"))
            job = _Job(job_id, work=work, **fields)
        except FileNotFoundError:
            return None
        except Exception:
            # The other jobs go on. The file that cannot be read stays where it is.
            logger.exception("a pending job cannot be read", extra={"fields": {"job": job_id}})
            return None
        # Another call may have begun it while its file was read.
        if job_id not in self._jobs:
            self._jobs[job_id] = job
            self._start(job)
        return self._jobs[job_id]

    def _prune(self) -> None:
        oldest = time.time() - self._limits.job_ttl_s
        for job_id in (self._storage / _FINISHED).folders():
            # The id says when it was handed in, so that no file has to be read.
            submitted_at = _submitted_at(job_id)
            if submitted_at is not None and submitted_at < oldest:
                (self._storage / _FINISHED / job_id).delete_tree(first=[_RESULT])

    def _start(self, job: _Job) -> None:
        job.task = asyncio.create_task(self._work(job))
        job.task.add_done_callback(lambda task: _log_fault(task, "a job's end could not be written; it stays pending"))

    async def _work(self, job: _Job) -> None:
        began = time.monotonic()
        try:
            end = await self._end_of(job)
            if end is None:
                return
            job.finishing = True
            await self._finish(job, end)
            if self._temporary is None:
                self._unfinished.discard(job.id)
            about = {"request_id": job.work.request_id, "job": job.id, "model": job.model, "n": len(job.work.seeds)}
            seconds = round(time.monotonic() - began, 4)
            logger.info("job", extra={"fields": {**about, "status": end["status"], "seconds": seconds}})
        finally:
            # If its end is not in the storage, the job is still pending there and is taken up again.
            del self._jobs[job.id]

    async def _end_of(self, job: _Job) -> _JobEnd | None:
        """The end of the job; None if it was not begun because this process ends."""
        fault_pauses_s = iter(_FAULT_PAUSES_S)
        about = {"request_id": job.work.request_id, "job": job.id, "model": job.model}
        try:
            while True:
                pause_s: float | None = _UNAVAILABLE_PAUSE_S
                try:
                    async with self._places:
                        if self._draining:
                            return None
                        job.status = "running"
                        return await self._generate(job)
                except ApiError as refusal:
                    error = refusal
                    if error.status < 500:
                        pause_s = None
                except Exception:
                    logger.exception("job failed", extra={"fields": about})
                    error, pause_s = fault(job.work.request_id), next(fault_pauses_s, None)
                if pause_s is None or time.time() + pause_s > job.created + self._limits.job_ttl_s:
                    return {"status": "failed", "error": error.body()["error"]}
                # Its place is free meanwhile for a job whose model may answer.
                job.status = "queued"
                logger.warning("job waits", extra={"fields": {**about, "error": error.code, "seconds": pause_s}})
                await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            if not job.cancelled:
                raise
            return {"status": "cancelled"}

    async def _generate(self, job: _Job) -> _JobEnd:
        replica = self._replicas.get(job.model)
        if replica is None:
            raise ApiError(404, f"the model {job.model!r} is no longer served", code="model_not_found")
        # A few images at a time, so that a direct request does not wait for a whole job.
        size, seeds = self._limits.max_n, job.work.seeds
        starts = range(0, len(seeds), size)
        for number, start in enumerate(starts):
            # Images that an earlier attempt has stored are not made again.
            part = seeds[max(start, len(job.keys)) : start + size]
            if not part:
                continue
            last = cast("LastEvent", {})
            async with contextlib.aclosing(replica.stream("stream", replace(job.work, seeds=part))) as events:
                async for event in events:
                    if event["event"] == "progress":
                        steps = event["total"]
                        job.progress = {"step": number * steps + event["step"], "total": len(starts) * steps}
                    last = event
            if last["event"] == "refused":
                raise ApiError.from_dict(last["error"])
            job.unknown_words = last["unknown_words"]
            for image in last["images"]:
                key = f"{_FINISHED}/{job.id}/{len(job.keys)}.png"
                try:
                    await self._write(key, image)
                except Exception:
                    message = "the storage of the jobs does not take images now"
                    raise ApiError(503, message, code="storage_unavailable") from None
                job.keys.append(key)
        return {"status": "done", "keys": job.keys, "unknown_words": job.unknown_words}

    async def _finish(self, job: _Job, end: _JobEnd) -> None:
        result: _StoredJob = {
            "id": job.id,
            "owner": job.owner,
            "progress": job.progress,
            "error": None,
            "model": job.model,
            "response_format": job.response_format,
            "created": job.created,
            "work": asdict(job.work),
            **end,
        }
        await self._write(f"{_FINISHED}/{job.id}/{_RESULT}", json.dumps(result).encode())
        await asyncio.to_thread(self._storage.delete, f"{_PENDING}/{job.id}.json")

    async def _write(self, name: str, data: bytes) -> None:
        """Write, with several attempts: the disk may be full for a while, and a job holds minutes of work."""
        for pause_s in _WRITE_PAUSES_S:
            try:
                return await asyncio.to_thread(self._storage.write, name, data)
            except Exception:
                logger.exception("the storage of jobs does not take a file", extra={"fields": {"file": name}})
                await asyncio.sleep(pause_s)
        await asyncio.to_thread(self._storage.write, name, data)


def _log_fault(task: "asyncio.Task[None]", message: str) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error(message, exc_info=task.exception())
