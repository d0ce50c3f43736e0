"""Faults in serve.control, with a fake Ray Serve.

Processes die while it ends, models do not load, others use the same cluster, and process ids are stale.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import free_port
from ray._private import worker
from ray.exceptions import RayActorError
from serving import HANG_S

from mmcore.errors import InputError
from serve import control
from serve.app import Api
from serve.draining import Unfinished
from serve.errors import ApiError


class FakeHandle:
    """Fake processes that answer requests, and how many each has at work at each `drain`. The last answer repeats.

    `kept` and `lost`: the ids of unfinished jobs, which each process names.
    """

    def __init__(self, *answers: Any, kept: Sequence[str] = (), lost: Sequence[str] = ()) -> None:
        self.answers, self.num_asked = list(answers), 0
        self.kept, self.lost = list(kept), list(lost)

    def broadcast(self, method: str) -> "FakeHandle":
        assert method == "drain"
        return self

    def results(self, *, timeout_s: float) -> list[Unfinished]:
        assert timeout_s < 30, "one process that hangs would take the time of all"
        answer = self.answers[min(self.num_asked, len(self.answers) - 1)]
        self.num_asked += 1
        if isinstance(answer, Exception):
            raise answer
        at_work = [[f"id-{process}-{request}" for request in range(num)] for process, num in enumerate(answer)]
        return [{"waited_for": ids, "kept": self.kept, "lost": self.lost} for ids in at_work]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of control. Only waits move it, as the machine may be busy."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


@pytest.mark.parametrize(
    ("answers", "left"),
    [
        (([2, 1], [0, 1], [0, 0]), 0),
        # One process died and another is being replaced: wait for the requests of the others.
        (([1], RayActorError(), TimeoutError(), [1], [0]), 0),
        (([1], [], [0]), 0),
        (([1],), 1),
        # Nobody confirmed that no request is in flight.
        (([],), None),
        ((RayActorError(),), None),
        (([3], RayActorError()), None),
    ],
)
def test_the_end_waits_for_every_request(answers: tuple[Any, ...], left: int | None, now: list[float]) -> None:
    handle = FakeHandle(*answers)
    unfinished = control.drain(handle, 60.0)
    assert (None if unfinished is None else len(unfinished["waited_for"])) == left
    if left == 0:
        assert handle.num_asked == len(answers)
    else:
        assert now[0] >= 160.0


async def _drain(jobs: Any) -> Unfinished:
    front = SimpleNamespace(draining=False, unanswered=["a", "b"])
    api: Any = SimpleNamespace(_jobs=jobs, _service=SimpleNamespace(front=front))
    left = await Api.func_or_class.drain(api)  # type: ignore[attr-defined]
    assert front.draining
    return left


def test_jobs_whose_process_is_dead_keep_nobody_waiting() -> None:
    import asyncio

    class Jobs:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        async def call(self, method: str) -> Unfinished:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    at_work: Unfinished = {"waited_for": ["job-c"], "kept": ["job-c", "job-d"], "lost": []}
    assert asyncio.run(_drain(Jobs(at_work))) == {**at_work, "waited_for": ["a", "b", "job-c"]}
    alone = {"waited_for": ["a", "b"], "kept": [], "lost": []}
    assert asyncio.run(_drain(Jobs(ApiError(503, "not available")))) == alone
    assert asyncio.run(_drain(None)) == alone


class FakeServe:
    """Fake Ray Serve for `run`, which is told to end as soon as it is ready. Records calls and stderr."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, handle: Any, applications: tuple[str, ...] = (), ends: bool = True
    ) -> None:
        """`ends`: whether the application ends when it is deleted, or waits for its requests."""
        self.ends = ends
        self.calls: list[str] = []
        self.said: list[str] = []
        self.handle, self.applications = handle, dict.fromkeys(applications)
        for name in ("start", "run", "delete", "shutdown", "status", "get_app_handle"):
            monkeypatch.setattr(f"ray.serve.{name}", getattr(self, name))
        monkeypatch.setattr(control, "_ray", contextlib.nullcontext)
        monkeypatch.setattr(control, "_say", self.say)

    def start(self, **options: Any) -> None:
        self.calls.append("start")

    def run(self, application: Any, **options: Any) -> Any:
        self.calls.append("run")
        if isinstance(self.handle, Exception):
            raise self.handle
        self.applications["mmcore"] = None
        return self.handle

    def get_app_handle(self, name: str) -> Any:
        self.calls.append(f"handle {name}")
        return self.handle

    def delete(self, name: str, _blocking: bool = True) -> None:
        self.calls.append(f"delete {name}")
        if self.ends:
            self.applications.pop(name, None)
        elif _blocking:
            # Ray raises this after a minute.
            raise TimeoutError(f"Some of these applications weren't deleted after 60s: ['{name}']")

    def shutdown(self) -> None:
        assert self.ends, "Ray Serve waits for its applications, 30 s at most"
        self.calls.append("shutdown")

    def status(self) -> Any:
        return SimpleNamespace(applications=self.applications)

    def say(self, line: str) -> None:
        self.said.append(line)
        if "is ready" in line:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_of_our_own_ends_as_a_whole(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe(monkeypatch, FakeHandle([0]))
    port = free_port()
    assert control.run(lambda: None, port=port) == 0
    assert fake.calls == ["start", "run", "delete mmcore", "shutdown"]
    assert fake.said[0].startswith("serve: starting; the models load")
    assert f"http://127.0.0.1:{port}/ is ready" in fake.said[1]
    assert fake.said[-1] == "serve: ended, every request answered"


def test_only_the_calls_of_the_ended_controller_are_left_out(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []

    def report(method: str, why: str) -> None:
        error = f"Task {method} failed. There are infinite retries remaining. Error: {why}"
        worker.print_to_stdstream({"lines": [error], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    class Reporting(FakeServe):
        def run(self, application: Any, **options: Any) -> Any:
            report("ServeController.listen_for_change", "it crashed")
            return super().run(application, **options)

        def shutdown(self) -> None:
            report("ServeController.listen_for_change", "ended")
            report("ServeController.graceful_shutdown", "ended")
            report("Jobs.submit", "disk full")

    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.extend(data["lines"]))
    Reporting(monkeypatch, FakeHandle([0]))
    assert control.run(lambda: None, port=free_port()) == 0
    assert [line.rpartition(": ")[2] for line in printed] == ["it crashed", "disk full"]


def test_on_a_cluster_nothing_of_others_is_ended(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe(monkeypatch, FakeHandle([0]), applications=("payroll",))
    assert control.run(lambda: None, port=free_port()) == 0
    assert fake.calls == ["start", "run", "delete mmcore"]
    # It does not listen on the given port.
    assert "127.0.0.1" not in fake.said[0]
    assert "its own host, port and limit of bodies, is ready" in fake.said[1]


def test_an_application_of_the_same_name_is_not_replaced(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe(monkeypatch, FakeHandle([0]), applications=("payroll", "mmcore"))
    command = "`RAY_ADDRESS=10.0.0.1:6379 python -m serve.control stop`"
    with pytest.raises(InputError, match=f"'mmcore' already; .* {command}"):
        control.run(lambda: None, port=free_port())
    assert fake.calls == ["start"]


@pytest.mark.parametrize(("answers", "code"), [(([1], [0]), 0), (([1],), 1)])
def test_what_a_killed_process_left_on_a_cluster_is_ended(
    answers: tuple[Any, ...], code: int, cluster: None, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command that `start` names. The rest of that cluster is left alone."""
    monkeypatch.setenv("SERVE_DRAIN_TIMEOUT_S", "0.4")
    fake = FakeServe(monkeypatch, FakeHandle(*answers), applications=("payroll", "mmcore"))
    assert control.stop([f"port={free_port()}"]) == code
    assert fake.calls == ["handle mmcore", "delete mmcore"]
    assert list(fake.applications) == ["payroll"]
    assert (
        fake.said[-1]
        == f"serve: ended{', every request answered' if code == 0 else '; 1 not finished in time: id-0-0'}"
    )
    with pytest.raises(InputError, match="no service, neither there"):
        control.stop([f"port={free_port()}"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([2, 1], "3 not finished in time: id-0-0, id-0-1, id-1-0"),
        ([22], "id-0-19 and 2 more"),
        ([], "not known whether every request"),
    ],
)
def test_requests_that_are_dropped_are_told(
    answer: list[int], words: str, no_cluster: None, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_DRAIN_TIMEOUT_S", "0.4")
    fake = FakeServe(monkeypatch, FakeHandle(answer))
    assert control.run(lambda: None, port=free_port()) == 1
    assert now[0] >= 100.4
    assert words in fake.said[-1]
    assert fake.calls[-2:] == ["delete mmcore", "shutdown"]


@pytest.mark.parametrize(
    ("handle", "code", "line"),
    [
        (
            FakeHandle([0, 0], lost=["job-a"]),
            1,
            "serve: ended; 1 unfinished job is lost (storage=URI would keep it): job-a",
        ),
        (
            FakeHandle([1], lost=["job-a", "job-b"]),
            1,
            "serve: ended; 1 not finished in time: id-0-0; "
            "2 unfinished jobs are lost (storage=URI would keep them): job-a, job-b",
        ),
        # The second job was at work when the time was up.
        (
            FakeHandle([1], kept=["job-a", "id-0-0"]),
            0,
            "serve: ended, every request answered; "
            "2 unfinished jobs go on at the next start with the same storage=: job-a, id-0-0",
        ),
    ],
)
def test_unfinished_jobs_are_told(
    handle: FakeHandle, code: int, line: str, no_cluster: None, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_DRAIN_TIMEOUT_S", "0.4")
    fake = FakeServe(monkeypatch, handle)
    assert control.run(lambda: None, port=free_port()) == code
    assert fake.said[-1] == line


def test_a_second_interrupt_ends_the_wait(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(FakeHandle):
        def results(self, *, timeout_s: float) -> list[Unfinished]:
            if self.num_asked == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().results(timeout_s=timeout_s)

    fake = FakeServe(monkeypatch, Interrupted([2]))
    assert control.run(lambda: None, port=free_port()) == 130
    assert "120 s at most" in fake.said[2]
    assert fake.said[3:] == [
        "serve: requests and jobs that are waited for: 2",
        "serve: ending at once; nothing is waited for any longer",
    ]


@pytest.mark.parametrize("joined", [False, True])
def test_an_end_that_finds_requests_left_takes_no_longer_than_it_says(
    joined: bool, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes keep waiting for their requests. Ray's own wait would end in a traceback and hide the result."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379" if joined else "")
    monkeypatch.setenv("SERVE_DRAIN_TIMEOUT_S", "0.2")
    monkeypatch.setattr(control, "_DELETE_S", 0.3)
    fake = FakeServe(monkeypatch, FakeHandle([2]), ends=False)
    assert control.run(lambda: None, port=free_port()) == 1
    assert 100.5 <= now[0] < 101
    assert fake.calls == ["start", "run", "delete mmcore"]
    assert "'mmcore' is still at work" in fake.said[-2]
    assert fake.said[-1] == "serve: ended; 2 not finished in time: id-0-0, id-0-1"


def test_the_verdict_is_told_where_ray_serve_says_nothing(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe(monkeypatch, FakeHandle([0]))

    def dead() -> Any:
        raise RayActorError

    monkeypatch.setattr("ray.serve.status", dead)
    assert control.run(lambda: None, port=free_port()) == 0
    assert "does not say whether 'mmcore' has ended (" in fake.said[-2]
    assert fake.said[-1] == "serve: ended, every request answered"


FAILED = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor. Error:
ray::ServeReplica:mmcore:captioner-words.initialize_and_get_metadata() (pid=1, ip=10.0.0.1)
  File "ray/serve/_private/replica.py", line 1, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "serve/captioner.py", line 1, in __init__
mmcore.errors.InputError: --encoder '/x': no such folder; name another
"""


def test_models_that_do_not_load_are_one_line(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe(
        monkeypatch, RuntimeError("Deploying application mmcore failed: Failed to update ['captioner-words'].")
    )
    with pytest.raises(InputError) as caught:
        control.run(lambda: None, port=free_port())
    assert str(caught.value).startswith("the models did not start: RuntimeError: Deploying application mmcore failed")
    # It is not left on a cluster that belongs to others.
    assert fake.calls[-1] == "delete mmcore"

    good, bad = SimpleNamespace(message=""), SimpleNamespace(message=FAILED)
    application = SimpleNamespace(deployments={"api": good, "captioner-words": bad})
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"mmcore": application}))
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(InputError) as caught:
        control.run(lambda: None, port=free_port())
    reason = "mmcore.errors.InputError: --encoder '/x': no such folder; name another"
    assert str(caught.value) == f"the models did not start: captioner-words: {reason}"


# --- stop ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(port: int) -> Iterator[int]:
    """The lock of a service at `port`. Returns its file."""
    import fcntl

    descriptor = os.open(control.lock_file(port), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # Like a service: an earlier one at this port left its longer process id, whose end must not remain.
    os.truncate(descriptor, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        control.lock_file(port).unlink()


@contextlib.contextmanager
def waiting_process() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.process
def test_a_number_that_was_left_behind_is_gone_before_anything_else(
    no_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left by a killed service. `stop` must not end another process with that id."""
    port = free_port()
    control.lock_file(port).write_text("12345678901234567890")
    try:

        def taken(host: str, port: int) -> None:
            assert control.lock_file(port).read_bytes() == b""
            raise InputError(f"port={port}: cannot listen there")

        monkeypatch.setattr(control, "_check_free", taken)
        with pytest.raises(InputError, match="cannot listen"):
            control.run(lambda: None, port=port)
        # Nor is a file left where the service ends.
        assert not control.lock_file(port).exists()
        with pytest.raises(InputError, match="no service"):
            control.stop([f"port={port}"])
    finally:
        control.lock_file(port).unlink(missing_ok=True)


@pytest.mark.process
def test_stop_waits_for_a_service_that_is_just_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with waiting_process() as process, contextlib.ExitStack() as held:
        descriptor = held.enter_context(holding(port))

        def begin_and_end() -> Iterator[None]:
            """The event at each wait of `stop`."""
            yield
            os.pwrite(descriptor, str(process.pid).encode(), 0)
            yield
            process.wait(HANG_S)
            held.close()
            yield

        waits = begin_and_end()
        monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: next(waits)))
        assert control.stop([f"port={port}"]) == 0
        assert process.returncode == -signal.SIGTERM


def test_stop_says_when_no_number_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_NUMBER_S", 0.3)
    port = free_port()
    with holding(port), pytest.raises(InputError, match="does not say which process"):
        control.stop([f"port={port}"])


@pytest.mark.process
def test_stop_of_a_process_that_has_just_ended() -> None:
    port = free_port()
    with waiting_process() as process:
        process.kill()
        process.wait()
        with contextlib.ExitStack() as held:
            os.pwrite(held.enter_context(holding(port)), str(process.pid).encode(), 0)
            threading.Timer(0.3, held.close).start()
            assert control.stop([f"port={port}"]) == 0


@pytest.mark.process
def test_stop_ends_nothing_where_a_limit_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_DRAIN_TIMEOUT_S", "soon")
    port = free_port()
    with waiting_process() as process, holding(port) as descriptor:
        os.pwrite(descriptor, str(process.pid).encode(), 0)
        with pytest.raises(InputError, match="SERVE_DRAIN_TIMEOUT_S"):
            control.stop([f"port={port}"])
        time.sleep(0.2)
        assert process.poll() is None


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_file_that_is_not_ours_is_told_in_one_line(kind: str, no_cluster: None) -> None:
    port = free_port()
    path = control.lock_file(port)
    if kind == "link":
        path.symlink_to("/nonexistent")
    else:
        path.mkdir()
    try:
        with pytest.raises(InputError, match=f"cannot open {path}"):
            control.run(lambda: None, port=port)
        with pytest.raises(InputError, match=f"cannot open {path}"):
            control.stop([f"port={port}"])
    finally:
        path.unlink() if kind == "link" else path.rmdir()


@pytest.mark.parametrize("number", ["what?", "0", "-1"])
def test_a_lock_file_without_a_process_is_told_in_one_line(number: str) -> None:
    port = free_port()
    with holding(port) as descriptor:
        os.pwrite(descriptor, number.encode(), 0)
        with pytest.raises(InputError, match="is no process"):
            control.stop([f"port={port}"])
