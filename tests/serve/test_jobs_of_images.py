"""Jobs: submitted, fetched later, cancelled and limited. They are finished even if processes end."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import AUTHORIZED, HANG_S, KEY, TIMESTEPS, InProcess, Served, colour, colour_of, error, run, until, wanted

from mmcore.storage import Storage
from serve import clients
from serve.clients import model_unavailable
from serve.image_jobs import Jobs, new_id
from serve.limits import Limits
from serve.security import Keys

JOBS = "/v1/jobs"


async def finished(client: httpx.AsyncClient, job_id: str, timeout_s: float = HANG_S) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        job = (await client.get(f"{JOBS}/{job_id}")).json()
        assert set(job) == {"id", "status", "progress", "result", "error"}
        if job["status"] not in ("queued", "running"):
            return job
        assert time.monotonic() < deadline, job
        await asyncio.sleep(0.02)


def test_a_job_is_handed_in_and_fetched_later() -> None:
    # Batches as large as a part of a job. The progress covers all of its images.
    served = Served(limits=Limits(generator_batch_size=8, rate_burst=1_000_000))

    async def main() -> None:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            body = {"request": {"prompt": "zebra", "seed": 5, "n": 20}}
            response = await client.post(JOBS, json=body)
            assert response.status_code == 202
            handed_in = response.json()
            assert set(handed_in) == {"id", "status"}
            assert handed_in["status"] == "queued"
            assert response.headers["location"] == f"{JOBS}/{handed_in['id']}"
            seen = []
            while (job := (await client.get(f"{JOBS}/{handed_in['id']}")).json())["status"] in ("queued", "running"):
                assert job["result"] is None
                seen.append((job["progress"] or {"step": 0})["step"])
                if seen[-1]:
                    served.fake_generator.gate.set()
                await asyncio.sleep(0.01)
            assert job["status"] == "done"
            assert seen == sorted(seen)
            assert 0 < max(seen) <= 12, "three parts of four steps each"
            rows = job["result"]["data"]
            assert [row["seed"] for row in rows] == list(range(5, 25))
            assert [colour(row["b64_json"]) for row in rows] == [colour_of("zebra", seed) for seed in range(5, 25)]
            assert job["result"]["model"] == "shapes"
            assert job["result"]["unknown_words"] == ["zebra"]
            # Again, any number of times.
            assert (await client.get(f"{JOBS}/{handed_in['id']}")).json() == job

    run(main())
    # More images than one request may have, but never more at once, so that others get their turn.
    assert max(len({seed for _, _, seed in batch}) for batch in served.fake_generator.batches) <= 8


def test_a_seed_is_drawn_when_the_job_is_handed_in() -> None:
    served = Served()

    async def main() -> None:
        async with served.client() as client:
            job_id = (await client.post(JOBS, json={"request": {"prompt": "x"}})).json()["id"]
            (row,) = (await finished(client, job_id))["result"]["data"]
            assert colour(row["b64_json"]) == colour_of("x", row["seed"])

    run(main())


def test_what_the_model_refuses_is_told_when_it_is_handed_in(tmp_path: Path) -> None:
    served = Served(jobs_storage=Storage(str(tmp_path)))

    async def main() -> None:
        async with served.client() as client:
            body = {"prompt": "x", "num_inference_steps": TIMESTEPS + 1}
            response = await client.post(JOBS, json={"request": body})
            assert response.status_code == 400
            assert error(response) == error(await client.post("/v1/images/generations", json=body))

    run(main())
    assert not (tmp_path / "pending").exists()


class _Silent(InProcess):
    """A generator that is missing or does not answer when it is asked to check a job."""

    def __init__(self, target: Any, gone: bool) -> None:
        super().__init__(target)
        self.gone = gone

    async def call(self, method: str, *args: Any) -> Any:
        if method == "check":
            if self.gone:
                raise model_unavailable()
            await asyncio.Event().wait()
        return await super().call(method, *args)


@pytest.mark.parametrize("gone", [True, False])
def test_a_job_that_fails_says_why(gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "TOLD_TIMEOUT_S", 0.2)
    served = Served()
    served.service.front.models["shapes"].replica = _Silent(served.generator, gone)

    async def main() -> None:
        async with served.client() as client:
            body = {"request": {"prompt": "x", "num_inference_steps": TIMESTEPS + 1}}
            job_id = (await client.post(JOBS, json=body)).json()["id"]
            job = await finished(client, job_id)
            assert job["status"] == "failed"
            assert job["error"]["param"] == "num_inference_steps"

    run(main())


def test_a_cancelled_job_costs_nothing_more() -> None:
    served = Served()

    async def main() -> None:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            body = {"request": {"prompt": "x", "num_inference_steps": 200}}
            jobs = [(await client.post(JOBS, json=body)).json()["id"] for _ in range(3)]
            await until(lambda: served.fake_generator.num_steps > 0)
            for job_id in jobs:
                cancelled = (await client.delete(f"{JOBS}/{job_id}")).json()
                assert (cancelled["id"], cancelled["status"]) == (job_id, "cancelled")
                assert (await client.get(f"{JOBS}/{job_id}")).json()["status"] == "cancelled"
            served.fake_generator.gate.set()
            await served.at_rest()
            assert served.fake_generator.num_steps < 100, "the work goes on"
            # Finished images are kept.
            job_id = (await client.post(JOBS, json={"request": {"prompt": "y", "num_inference_steps": 1}})).json()["id"]
            assert (await finished(client, job_id))["status"] == "done"
            assert (await client.delete(f"{JOBS}/{job_id}")).json()["status"] == "done"

    run(main())


def test_a_job_belongs_to_the_key_that_it_came_with() -> None:
    other = {"authorization": f"Bearer {KEY}-other"}
    served = Served(keys=Keys({"SERVE_API_KEYS": f"{KEY},{KEY}-other"}))

    async def main() -> None:
        async with served.client() as client:
            job_id = (await client.post(JOBS, json={"request": {"prompt": "x"}})).json()["id"]
            for method in ("GET", "DELETE"):
                response = await client.request(method, f"{JOBS}/{job_id}", headers=other)
                assert (response.status_code, error(response)["code"]) == (404, "job_not_found")
            await finished(client, job_id)
            assert (await client.get(f"{JOBS}/{job_id}", headers=other)).status_code == 404
            assert (await client.get(f"{JOBS}/{job_id}", headers=AUTHORIZED)).status_code == 200
            for nobodys in ("job-x", "x", "..", "pending", f"job-{'0' * 10}-{'0' * 32}"):
                assert (await client.get(f"{JOBS}/{nobodys}")).status_code == 404

    run(main())


def test_too_many_jobs_are_429() -> None:
    served = Served(limits=Limits(max_jobs=3))

    async def main() -> list[httpx.Response]:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            body = {"request": {"prompt": "x", "num_inference_steps": 100}}
            return await asyncio.gather(*(client.post(JOBS, json=body) for _ in range(6)))

    responses = run(main())
    assert sorted(response.status_code for response in responses) == [202] * 3 + [429] * 3
    refused = next(response for response in responses if response.status_code == 429)
    assert error(refused)["code"] == "jobs_full"
    assert int(refused.headers["retry-after"]) >= 1


def test_whoever_waits_for_an_answer_does_not_wait_for_a_job() -> None:
    served = Served()
    batches = served.fake_generator.batches

    async def main() -> None:
        async with served.client() as client:
            served.fake_generator.gate.clear()
            job_id = (await client.post(JOBS, json={"request": {"prompt": "long", "n": 64}})).json()["id"]
            await until(lambda: len(batches) == 1)
            asking = asyncio.ensure_future(client.post("/v1/images/generations", json={"prompt": "short"}))
            await until(lambda: "short" in [item.payload[0] for item in served.generator.batcher._waiting])
            served.fake_generator.gate.set()
            assert (await asking).status_code == 200
            assert (await finished(client, job_id))["status"] == "done"

    run(main())
    prompts = [{prompt for prompt, *_ in batch} for batch in batches]
    assert next(number for number, of_batch in enumerate(prompts) if "short" in of_batch) < len(batches) / 2


def test_a_job_names_what_nobody_reads_and_what_it_does_not_know() -> None:
    async def main() -> None:
        async with Served().client() as client:
            job = (await client.post(JOBS, json={"request": {"prompt": "x", "size": "auto", "user": "me"}})).json()
            assert job["ignored"] == ["user"]
            result = (await finished(client, job["id"]))["result"]
            assert (result["ignored"], result["size"]) == (["user"], "16x16")
            refused = error(await client.post(JOBS, json={"request": {"prompt": "x", "cfg": 3}}))
            assert refused["param"] == "request.cfg"
            assert refused["message"].startswith("unknown field 'cfg' in request; its fields are prompt, model, n, ")
            many = error(await client.post(JOBS, json={"request": {"prompt": "x", "n": 65}}))
            assert many["message"] == "n: 65 images; a job (POST /v1/jobs) makes up to 64"

    run(main())


WORK = wanted(seeds=(0, 1, 2))


def test_a_job_survives_its_process(tmp_path: Path) -> None:
    """The process ends in the middle of a job. The next one finishes it, with the same images."""
    storage = Storage(str(tmp_path))

    async def first() -> str:
        served = Served(jobs_storage=storage)
        served.fake_generator.gate.clear()
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        await until(lambda: served.fake_generator.num_steps > 0)
        return answer["id"]

    # The event loop is dropped as if the process had died, and nothing may be written afterwards.
    loop = asyncio.new_event_loop()
    job_id = loop.run_until_complete(asyncio.wait_for(first(), HANG_S))
    assert list((tmp_path / "pending").iterdir())
    assert not (tmp_path / "jobs").exists()

    async def second() -> None:
        served = Served(jobs_storage=storage)
        # Ray Serve checks the health of a process from its start on, so nobody has to fetch the job first.
        await served.jobs.check_health()
        while (job := await served.jobs.get("me", job_id)) and job["status"] != "done":
            await asyncio.sleep(0.01)
        assert job is not None
        assert job["keys"] == [f"jobs/{job_id}/{i}.png" for i in range(3)]
        assert (await served.jobs.get("somebody else", job_id)) is None

    run(second())
    assert not list((tmp_path / "pending").iterdir())
    assert sorted(path.name for path in (tmp_path / "jobs" / job_id).iterdir()) == [
        "0.png", "1.png", "2.png", "result.json",
    ]  # fmt: skip
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()


def test_a_finished_job_can_be_fetched_from_another_process(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    async def first() -> tuple[str, dict[str, Any]]:
        async with Served(jobs_storage=storage).client() as client:
            job_id = (await client.post(JOBS, json={"request": {"prompt": "x", "seed": 1}})).json()["id"]
            return job_id, await finished(client, job_id)

    job_id, job = run(first())

    async def second() -> None:
        async with Served(jobs_storage=storage).client() as client:
            assert (await client.get(f"{JOBS}/{job_id}")).json() == job

    run(second())


def test_links_of_a_job_are_made_when_it_is_fetched(s3_server: str) -> None:
    served = Served(storage=Storage(s3_server))

    async def main() -> None:
        async with served.client() as client:
            body = {"request": {"prompt": "x", "seed": 3, "response_format": "url"}}
            job = await finished(client, (await client.post(JOBS, json=body)).json()["id"])
            (row,) = job["result"]["data"]
            answer = await asyncio.to_thread(httpx.get, row["url"], timeout=HANG_S)
            assert answer.headers["content-type"] == "image/png"

    run(main())


def test_old_jobs_are_deleted(tmp_path: Path) -> None:
    old, new = f"job-{int(time.time()) - 4000:010x}-{'0' * 32}", f"job-{int(time.time()):010x}-{'1' * 32}"
    for job_id in (old, new):
        (tmp_path / "jobs" / job_id).mkdir(parents=True)
        (tmp_path / "jobs" / job_id / "result.json").write_text(json.dumps({"owner": "me"}))
    (tmp_path / "jobs" / "not-ours").mkdir()

    async def main() -> None:
        jobs = Jobs({}, str(tmp_path), Limits.from_environment({"SERVE_JOB_TTL_S": "3600"}))
        # Removed at once, whatever the age of its files.
        assert await jobs.get("me", old) is None
        assert await jobs.get("me", new) == {}
        while (tmp_path / "jobs" / old).exists():
            await asyncio.sleep(0.01)

    run(main())
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == sorted([new, "not-ours"])


def test_the_end_names_jobs_that_no_storage_keeps() -> None:
    served = Served(limits=Limits.from_environment({"SERVE_JOB_CONCURRENCY": "1"}))

    async def main() -> None:
        served.fake_generator.gate.clear()
        ids = [new_id() for _ in range(3)]
        for job_id in ids:
            await served.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        await until(lambda: served.fake_generator.num_steps > 0)
        # Nobody could fetch the images, so none is waited for.
        lost = {"waited_for": [], "kept": [], "lost": sorted(ids)}
        assert await served.jobs.drain() == lost
        served.fake_generator.gate.set()
        await until(lambda: not served.jobs._jobs)
        assert await served.jobs.drain() == lost

    run(main())


def test_the_end_waits_for_jobs_at_work_and_keeps_the_rest(tmp_path: Path) -> None:
    limits = Limits.from_environment({"SERVE_JOB_CONCURRENCY": "1"})
    served = Served(limits=limits, jobs_storage=Storage(str(tmp_path)))

    async def main() -> None:
        served.fake_generator.gate.clear()
        ids = [new_id() for _ in range(3)]
        for job_id in ids:
            await served.jobs.submit(job_id, "me", "shapes", "b64_json", WORK)
        await until(lambda: served.fake_generator.num_steps > 0)
        assert await served.jobs.drain() == {"waited_for": ids[:1], "kept": sorted(ids), "lost": []}
        served.fake_generator.gate.set()
        while (left := await served.jobs.drain())["waited_for"]:
            await asyncio.sleep(0.01)
        assert left["kept"] == sorted(ids[1:])
        answer = await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        assert answer["refused"]["status"] == 503

    run(main())
    assert len(list((tmp_path / "pending").iterdir())) == 2
    assert len(list((tmp_path / "jobs").iterdir())) == 1


def test_a_job_of_a_model_that_is_gone_fails(tmp_path: Path) -> None:
    async def main() -> None:
        jobs = Jobs({"shapes": None}, str(tmp_path), Limits(), InProcess)
        answer = await jobs.submit(new_id(), "me", "circles", "b64_json", WORK)
        while (job := await jobs.get("me", answer["id"])) and job["status"] in ("queued", "running"):
            await asyncio.sleep(0.01)
        assert job is not None
        assert job["status"] == "failed"
        assert "no longer served" in job["error"]["message"]

    run(main())


def test_a_storage_that_does_not_answer_refuses_the_job(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(jobs_storage=Storage(str(tmp_path)))

        def fail(name: str, data: bytes) -> None:
            raise OSError("no space left on device")

        await served.jobs.check_health()
        object.__setattr__(served.jobs._storage, "write", fail)
        with pytest.raises(OSError, match="no space"):
            await served.jobs.submit(new_id(), "me", "shapes", "b64_json", WORK)
        assert not served.jobs._jobs, "a job that is not in the storage counts as one"

    run(main())
