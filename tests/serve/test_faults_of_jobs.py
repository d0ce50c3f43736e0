"""Faults in jobs: processes that end, storages that fail, broken files, and duplicate jobs."""

import asyncio
import contextlib
import io
import itertools
import json
import threading
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import HANG_S, Served, colour_of, log_records, run, until
from test_jobs_of_images import WORK

from mmcore.storage import Storage
from serve import image_jobs as tasks
from serve.clients import model_unavailable
from serve.errors import bad_value
from serve.image_jobs import Jobs, new_id
from serve.limits import Limits


async def end_of(jobs: Jobs, job_id: str) -> dict[str, Any]:
    while (job := await jobs.get("me", job_id)) and job["status"] in ("queued", "running"):
        await asyncio.sleep(0.01)
    assert job is not None
    return job


def test_a_job_that_its_process_drops_stays_to_be_done(tmp_path: Path) -> None:
    """A cancellation without a request of the owner ends the process, not the job."""
    served = Served(jobs_storage=Storage(str(tmp_path)))

    async def main() -> None:
        job_id = new_id()
        served.fake_generator.gate.clear()
        await served.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        await until(lambda: served.fake_generator.num_steps > 0)
        task = served.jobs._jobs[job_id].task
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert [path.stem for path in (tmp_path / "pending").iterdir()] == [job_id]
        assert not (tmp_path / "jobs").exists()
        await served.close()

    run(main())


def test_one_broken_file_does_not_keep_the_others_from_being_done(
    tmp_path: Path,
) -> None:
    pending = tmp_path / "pending"
    pending.mkdir()
    good = new_id()
    fields = {"owner": "me", "model": "shapes", "response_format": "b64_json", "created": 1}
    work = {"prompt": "x", "seeds": [1], "num_inference_steps": 1, "guidance_scale": 3.0, "negative_prompt": None}
    broken = {
        "a": b"", "b": b"{", "c": b"[]", "d": b"3", "e": b"{}", "f": b"\xff\xfe",
        "g": json.dumps({**fields, "work": {**work, "colour": "red"}}).encode(),
        "h": json.dumps({**fields, "work": {**work, "seeds": None}}).encode(),
    }  # fmt: skip
    for name, data in broken.items():
        (pending / f"job-0-{name}.json").write_bytes(data)
    (pending / f"{good}.json").write_text(json.dumps({**fields, "work": work}))
    served = Served(jobs_storage=Storage(str(tmp_path)))

    async def main() -> None:
        assert (await end_of(served.jobs, good))["status"] == "done"
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        assert (await end_of(served.jobs, answer["id"]))["status"] == "done"
        await served.close()

    with log_records() as records:
        run(main())
    assert sorted(path.stem for path in pending.iterdir()) == sorted(f"job-0-{name}" for name in broken)
    told = [record.fields["job"] for record in records if "cannot be read" in record.getMessage()]  # type: ignore
    assert sorted(told) == sorted(f"job-0-{name}" for name in broken)


def test_what_cannot_be_deleted_keeps_no_job_from_being_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = f"job-{1:010x}-{'0' * 32}"
    (tmp_path / "jobs" / old).mkdir(parents=True)

    def fail(self: Storage, first: Any = ()) -> None:
        assert list(first) == ["result.json"], "killed on the way it would leave a result without its images"
        raise OSError("permission denied")

    monkeypatch.setattr(Storage, "delete_tree", fail)
    served = Served(jobs_storage=Storage(str(tmp_path)))

    async def main() -> None:
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        assert (await end_of(served.jobs, answer["id"]))["status"] == "done"
        while not any("could not be deleted" in record.getMessage() for record in records):
            await asyncio.sleep(0.01)
        await served.close()

    with log_records() as records:
        run(main())


class _Full:
    """A storage that accepts only the first `takes` files under jobs/, until it has refused `refusals` times."""

    def __init__(self, served: Served, takes: int, refusals: float) -> None:
        self.storage, self.takes, self.refusals, self.refused = served.jobs._storage, takes, refusals, 0
        self.write = self.storage.write
        object.__setattr__(self.storage, "write", self)

    def __call__(self, name: str, data: bytes) -> None:
        if name.startswith("jobs/"):
            self.takes -= 1
            if self.takes < 0 and self.refused < self.refusals:
                self.refused += 1
                raise OSError("no space left on device")
        self.write(name, data)


@pytest.mark.parametrize("takes", [0, 3], ids=["an image", "the result"])
def test_a_storage_that_fails_for_a_while_costs_no_job(
    takes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_WRITE_PAUSES_S", (0.01, 0.01, 0.01))
    served = Served(jobs_storage=Storage(str(tmp_path)))
    full = _Full(served, takes, refusals=3)

    async def main() -> None:
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        assert (await end_of(served.jobs, answer["id"]))["status"] == "done"
        await served.close()

    run(main())
    assert full.refused == 3


def test_a_storage_that_fails_for_long_costs_no_job_and_no_image_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_WRITE_PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(tasks, "_UNAVAILABLE_PAUSE_S", 0.01)
    served = Served(jobs_storage=Storage(str(tmp_path)))
    # The first image is accepted, the second one only at the third attempt, of four writes each.
    full = _Full(served, takes=1, refusals=9)

    async def main() -> None:
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        job = await end_of(served.jobs, answer["id"])
        assert job["status"] == "done"
        for image, seed in zip(await served.jobs.images(job["keys"]), WORK.seeds, strict=True):
            assert Image.open(io.BytesIO(image)).getpixel((0, 0)) == colour_of(WORK.prompt, seed)
        await served.close()

    run(main())
    assert full.refused == 9
    made = [sorted({seed for _, _, seed in batch}) for batch in served.fake_generator.batches]
    assert made == [[0, 1, 2], [1, 2], [1, 2]], "an image that is in the storage was made again"


class _Moody:
    """A generator's process that raises the given exceptions one by one before it works."""

    def __init__(self, generator: Any, errors: Iterable[Exception]) -> None:
        self.generator, self.errors, self.num_raised = generator, iter(errors), 0

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        for error in self.errors:
            self.num_raised += 1
            raise error
        async for event in self.generator.stream(*args):
            yield event


@pytest.mark.parametrize("error", [model_unavailable(), RuntimeError("CUDA error")], ids=["unavailable", "a fault"])
def test_a_bad_moment_of_a_model_costs_no_job(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_UNAVAILABLE_PAUSE_S", 0.02)
    monkeypatch.setattr(tasks, "_FAULT_PAUSES_S", itertools.repeat(0.02))
    served = Served(jobs_storage=Storage(str(tmp_path)), limits=Limits(job_concurrency=1))
    moody = _Moody(served.generator, itertools.repeat(error))
    served.jobs._replicas["moody"] = moody  # type: ignore[assignment]

    async def main() -> None:
        first, other = new_id(), new_id()
        await served.jobs.submit(first, "me", "moody", "b64_json", WORK)
        await served.jobs.submit(other, "me", "shapes", "b64_json", WORK)
        # While it waits, another model has the only place.
        assert (await end_of(served.jobs, other))["status"] == "done"
        waiting = await served.jobs.get("me", first)
        assert waiting is not None
        assert waiting["status"] in ("queued", "running")
        assert (tmp_path / "pending" / f"{first}.json").exists()
        moody.errors = iter(())
        assert (await end_of(served.jobs, first))["status"] == "done"
        await served.close()

    run(main())


def test_a_job_that_waits_for_its_model_can_be_cancelled_and_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_UNAVAILABLE_PAUSE_S", 3600.0)
    served = Served(jobs_storage=Storage(str(tmp_path)))
    moody = _Moody(None, [model_unavailable()])
    served.jobs._replicas["shapes"] = moody  # type: ignore[assignment]

    async def main() -> None:
        job_id = new_id()
        await served.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        await until(lambda: moody.num_raised == 1)
        assert await served.jobs.drain() == {"waited_for": [], "kept": [job_id], "lost": []}
        cancelled = await served.jobs.cancel("me", job_id)
        assert cancelled is not None
        assert cancelled["status"] == "cancelled"

    run(main())


@pytest.mark.parametrize(
    ("error", "ttl_s", "tried"),
    [(bad_value("prompt", "no"), 3600, 1), (model_unavailable(), 0.001, 1), (RuntimeError("CUDA error"), 3600, 3)],
    ids=["refused", "too old", "a fault each time"],
)
def test_what_another_attempt_does_not_help_fails(
    error: Exception, ttl_s: float, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_FAULT_PAUSES_S", (0.01, 0.01))
    served = Served(jobs_storage=Storage(str(tmp_path)), limits=Limits(job_ttl_s=ttl_s))
    moody = _Moody(served.generator, itertools.repeat(error))
    served.jobs._replicas["shapes"] = moody  # type: ignore[assignment]

    async def main() -> None:
        job_id = new_id()
        await served.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        task = served.jobs._jobs[job_id].task
        assert task is not None
        await task
        result = json.loads((tmp_path / "jobs" / job_id / "result.json").read_text())
        assert result["status"] == "failed"
        assert result["error"]["message"]
        await served.close()

    run(main())
    assert moody.num_raised == tried


def test_a_storage_that_hangs_does_not_make_the_process_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pending").mkdir()
    go, begun, listing = threading.Event(), [0], Storage.list

    def hang(self: Storage, suffix: str = "") -> list[str]:
        begun[0] += 1
        assert go.wait(HANG_S)
        return listing(self, suffix)

    monkeypatch.setattr(Storage, "list", hang)
    served = Served(jobs_storage=Storage(str(tmp_path)))

    async def main() -> None:
        await served.jobs.check_health()
        await until(lambda: begun == [1])
        recovery = served.jobs._recovery
        for _ in range(2):
            # However long it takes, one thread waits for it.
            served.jobs._recovered_at = float("-inf")
            await served.jobs.check_health()
            assert served.jobs._recovery is recovery
        assert begun == [1]
        go.set()
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        assert (await end_of(served.jobs, answer["id"]))["status"] == "done"
        await served.close()

    run(main())


def test_a_submission_that_is_cancelled_leaves_no_job(tmp_path: Path) -> None:
    served = Served(jobs_storage=Storage(str(tmp_path)))
    storage, begun, go = served.jobs._storage, threading.Event(), threading.Event()
    write = storage.write

    def slow(name: str, data: bytes) -> None:
        begun.set()
        assert go.wait(HANG_S)
        write(name, data)

    object.__setattr__(storage, "write", slow)

    async def main() -> None:
        submission = asyncio.ensure_future(served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        submission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submission
        go.set()
        while served.jobs._jobs:
            await asyncio.sleep(0.005)
        assert not list((tmp_path / "pending").iterdir())
        await served.close()

    run(main())
    assert not served.fake_generator.batches


@pytest.mark.parametrize("asked", [False, True])
def test_a_job_whose_end_cannot_be_written_is_taken_up_again(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_WRITE_PAUSES_S", (0.01, 0.01, 0.01))
    served = Served(jobs_storage=Storage(str(tmp_path)))
    full = _Full(served, takes=3, refusals=float("inf"))

    async def main() -> None:
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        task = served.jobs._jobs[answer["id"]].task
        assert task is not None
        with contextlib.suppress(OSError):
            await task
        assert full.refused == 4
        assert not served.jobs._jobs, "it is counted as one at work for ever"
        assert (await served.jobs.drain())["waited_for"] == []
        served.jobs._draining = False
        assert [path.stem for path in (tmp_path / "pending").iterdir()] == [answer["id"]]
        # An hour later, or at the next request for it.
        full.refusals = 0
        if asked:
            assert await served.jobs.get("somebody else", answer["id"]) is None
            job = await served.jobs.get("me", answer["id"])
            assert job is not None, "a job that is pending is not known"
            assert job["status"] in ("queued", "running")
        else:
            served.jobs._recovered_at = float("-inf")
            await served.jobs.check_health()
        assert (await end_of(served.jobs, answer["id"]))["status"] == "done"
        await served.close()

    run(main())


def test_a_job_that_is_handed_in_twice_is_there_once(tmp_path: Path) -> None:
    """If the process died before its answer, the front asks again. The next process finds the job pending."""
    storage = Storage(str(tmp_path))
    first, second = (Served(jobs_storage=storage) for _ in range(2))
    job_id = new_id()

    async def main() -> None:
        await first.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        task = first.jobs._jobs[job_id].task
        assert task is not None
        task.cancel()
        second.fake_generator.gate.clear()
        answer = await second.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        assert answer["id"] == job_id
        assert len(second.jobs._jobs) == 1
        second.fake_generator.gate.set()
        assert (await end_of(second.jobs, job_id))["status"] == "done"
        # The next process may also have finished it by then.
        assert await second.jobs.submit(job_id, "me", "shapes", "b64_json", WORK) == {"id": job_id, "status": "done"}
        assert not second.jobs._jobs
        await first.close()
        await second.close()

    run(main())
    assert second.fake_generator.num_steps == WORK.options["num_inference_steps"], "it was made twice"


def test_a_job_that_has_its_end_is_not_cancelled_any_more(tmp_path: Path) -> None:
    """While its result is being written, the answer is the complete result."""
    served = Served(jobs_storage=Storage(str(tmp_path)))
    storage, job_id, asked = served.jobs._storage, new_id(), threading.Event()
    write = storage.write

    def slow(name: str, data: bytes) -> None:
        if name.endswith("result.json"):
            assert asked.wait(HANG_S)
        write(name, data)

    object.__setattr__(storage, "write", slow)

    async def main() -> None:
        await served.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        while not served.jobs._jobs[job_id].finishing:
            await asyncio.sleep(0.005)
        cancelling = asyncio.ensure_future(served.jobs.cancel("me", job_id))
        await asyncio.sleep(0.05)
        asked.set()
        job = await cancelling
        assert job is not None
        assert job["status"] == "done"
        assert len(await served.jobs.images(job["keys"])) == 3
        await served.close()

    run(main())
    assert not list((tmp_path / "pending").iterdir())
