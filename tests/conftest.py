"""Shared fixtures: a local Ray, a local S3 server, and jobs run as a user runs them."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from marks import pytest_collection_modifyitems, pytest_runtest_setup, pytest_runtest_teardown  # noqa: F401

# OpenMP threads sleep while they wait. Otherwise they occupy the CPU, although other tests with their own processes run
# at the same time. Three equal test runs at once took 95 s; with sleeping threads 25 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Access to a hub of models or data fails, even with a network.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
JOB_TIMEOUT_S = 500.0
HEALTH_CHECK_INTERVAL_S = "0.1"  # each checkpoint waits for one
# Only ends a test that hangs. No awaited event takes this long.
HANG_S = 300.0
# Below the ports that the kernel assigns (from 32768 on), above those of `ray start` for its workers.
PORTS = range(20_000, 32_768)

_claims: list[socket.socket] = []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread, so that sums have one order. Files use it by `pytest.mark.usefixtures`."""
    import torch  # the tests of the service's protocol need none of it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def free_port() -> int:
    """A free port. Neither the kernel nor another test assigns it meanwhile."""
    while True:
        port = secrets.choice(PORTS)
        # Hold the UDP port of the same number, which no server here uses, so that other test processes skip it.
        claim = socket.socket(type=socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            claim.close()
        else:
            _claims.append(claim)
            return port


def wait_for_http(url: str, process: subprocess.Popen[bytes], timeout_s: float = HANG_S) -> None:
    """Wait until `url` answers. Fails if `process` ends or the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{url} does not answer: {error}; exit code of its process: {process.poll()}")
            time.sleep(0.1)


@contextlib.contextmanager
def ctrl_c_as_in_a_shell() -> Iterator[None]:
    """Processes started in the block receive Ctrl-C, even if the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the session of `process` only."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets (107 bytes). pytest's own paths are too long."""
    folder = Path(tempfile.mkdtemp(prefix="mm-test-", dir="/tmp" if os.path.isdir("/tmp") else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_local(short_tmp: Path, _s3_endpoint: str) -> Iterator[None]:
    """A local Ray in this process, shared by all tests that need one. Its workers can reach `s3_server`.

    Workers have the environment of Ray's start. A test that needs another environment runs a job with its own Ray.
    """
    import ray

    from jobs.runtime.cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_TMPDIR", str(short_tmp))
        patch.setenv("MMCORE_CACHE", str(short_tmp / "cache"))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
        with pytest.MonkeyPatch.context() as of_its_start:
            set_aws(of_its_start, _s3_endpoint)
            # Jobs that join ship the repository. Workers also import modules from tests/.
            of_its_start.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            connect()
        yield
        ray.shutdown()
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)


# S3 lets only one of several writers create an object. moto checks first and then writes, with one thread per writer.
MOTO_SERVER = """
import threading
from moto import server
from moto.s3.responses import S3Response

put, lock = S3Response.put_object, threading.Lock()

def one_at_a_time(response):
    with lock:
        return put(response)

S3Response.put_object = one_at_a_time
server.main()
"""


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO_SERVER, "-H", "127.0.0.1", "-p", str(port)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for_http(f"{endpoint}/moto-api/", process)
        yield endpoint
    finally:
        end_group(process)


def set_aws(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def s3_server(_s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket/prefix` of a new bucket. AWS_* variables give access to this process and to `run_job`."""
    import boto3

    set_aws(monkeypatch, _s3_endpoint)
    bucket = f"bucket-{secrets.token_hex(6)}"
    # A new session, as boto3's default session keeps its first credentials.
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(scope="session")
def shared_ray(ray_local: None) -> dict[str, str]:
    """The environment of a job that joins `ray_local`: `start_job(..., env={**shared_ray, "GATE": ...})`.

    This saves the ten seconds of starting a Ray. Killing such a job does not harm the shared Ray. kills.py finds its
    workers.
    """
    import ray

    # The same token mode on both sides, even with a token file in the home folder.
    kept = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    address = ray.get_runtime_context().gcs_address
    return {**kept, "RAY_ADDRESS": address, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@pytest.fixture
def job_environment(short_tmp: Path) -> Callable[..., dict[str, str]]:
    """`job_environment(**more)`: the environment of a user's shell, without this process's changes for Ray."""

    def build(env: Mapping[str, str] | None = None, root: Path = ROOT) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
        clean["PYTHONPATH"] = str(root)
        clean["RAY_TMPDIR"] = str(short_tmp)
        clean["MMCORE_CACHE"] = str(short_tmp / "cache")  # not the user's cache, which persists after the tests
        clean["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = HEALTH_CHECK_INTERVAL_S
        return clean | dict(env or {})

    return build


StartJob = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start_job(job_environment: Callable[..., dict[str, str]], tmp_path: Path) -> Iterator[StartJob]:
    """`start_job("jobs/x.py", "--flag", env=..., log=path)` -> Popen, for tests that kill the job.

    stdout and stderr go to `log`, by default `tmp_path/job-0.log`, `job-1.log`, ... Running jobs are killed at the end
    of the test.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(
        *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT, log: Path | None = None
    ) -> "subprocess.Popen[bytes]":
        log = log or tmp_path / f"job-{len(started)}.log"
        with log.open("wb") as stream, ctrl_c_as_in_a_shell():
            process = subprocess.Popen(
                [sys.executable, *map(str, args)],
                cwd=cwd,
                env=job_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        end_group(process)


RunJob = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_job(job_environment: Callable[..., dict[str, str]]) -> RunJob:
    """`run_job("jobs/x.py", "--flag", env={...}, check=True, timeout_s=300, cwd=ROOT)` -> CompletedProcess.

    Runs a job as `python jobs/x.py` with stdout and stderr as text. The test fails if the time is up, and with `check`
    for an exit code other than 0.
    """

    def run(
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = JOB_TIMEOUT_S,
        cwd: Path = ROOT,
    ) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *map(str, args)]
        return run_command(command, env=job_environment(env), check=check, timeout_s=timeout_s, cwd=cwd)

    return run


CallJob = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call_job(ray_local: None, call_here: CallJob) -> CallJob:
    """`call_job(main, "--flag", ...)` -> CompletedProcess: like `run_job`, but in this process and its Ray.

    This saves ten seconds per job for starting Python and Ray. Use `run_job` for jobs that are killed, that stall, or
    that need another environment. Do not rely on output of workers: Ray delivers it late, and on a busy machine never.
    """
    return call_here


@pytest.fixture
def call_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CallJob:
    """`call_job` without Ray, for output before a job needs Ray."""

    def call(main: Callable[[], None], *args: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
        from jobs.runtime.commandline import run

        command = [f"jobs/{main.__module__.rpartition('.')[2]}.py", *map(str, args)]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        code = 0
        try:
            run(main)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        out, err = capfd.readouterr()
        shown = f"\n{' '.join(command)}\n--- stdout\n{out[-6000:]}\n--- stderr\n{err[-6000:]}"
        if check and code != 0:
            pytest.fail(f"exit code {code}:{shown}")
        return subprocess.CompletedProcess(command, code, out, err)

    return call


def run_command(
    command: list[str], *, env: Mapping[str, str], check: bool, timeout_s: float, cwd: Path
) -> "subprocess.CompletedProcess[str]":
    """Run a command in its own session, so that a time-out also ends its child processes."""
    # Files instead of pipes: a grandchild that outlives the job would keep a pipe open, and the test would wait.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end_group(process)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    shown = f"\n{' '.join(command)}\n--- stdout\n{texts[0][-6000:]}\n--- stderr\n{texts[1][-6000:]}"
    if timed_out:
        pytest.fail(f"no end after {timeout_s:g} s:{shown}")
    if check and process.returncode != 0:
        pytest.fail(f"exit code {process.returncode}:{shown}")
    return subprocess.CompletedProcess(command, process.returncode, texts[0], texts[1])
