"""Jobs submitted to a cluster as by a user: two real nodes, `ray job submit`, exit codes, and the version of the code.

The head is started in the root of a checkout. The second node is started elsewhere with another version of the code
installed, like a node that was set up last week. To test another job, add it to `BARE_JOBS` or `JOBS_WITH_FLAGS`.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import HANG_S, ROOT, end_group, free_port, run_command, wait_for_http

pytestmark = pytest.mark.process

# The test copies it into the checkout. It asks the node with the resource `other_node` which code it runs.
PROBE_JOB = """#!/usr/bin/env python
import argparse, hashlib, json, os, tempfile
from pathlib import Path

import ray

from jobs.runtime.cluster import connect
from jobs.runtime.commandline import run
from mmcore.errors import InputError


def code():
    import jobs.runtime.cluster
    import mmcore.errors

    digest = hashlib.sha256()
    for module in (jobs.runtime.cluster, mmcore.errors):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


@ray.remote(num_cpus=0, resources={"other_node": 1})
def code_there():
    return code(), os.getcwd()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", default="default")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--plain-init", action="store_true")
    args = parser.parse_args()
    # Ray gives workers the driver's current folder, which on one machine they would find: not so here.
    os.chdir(tempfile.gettempdir())
    if args.plain_init:
        ray.init(address=os.environ["RAY_ADDRESS"], logging_level="warning")
    else:
        connect()
    there, folder = ray.get(code_there.remote())
    if args.fail:
        raise InputError("--fail: this job was told to fail")
    print("RESULT " + json.dumps({"flag": args.flag, "here": code(), "there": there, "folder": folder}))


if __name__ == "__main__":
    run(main)
"""

# (script, text of its output): submitted as `ray job submit SCRIPT`
BARE_JOBS = [pytest.param("jobs/probe.py", "RESULT", id="probe")]
# Outside the working directory, which is copied to the cluster.
OUTSIDE = "{storage}"
SMOKE = ["--variant", "smoke", "--storage"]
# (script, flags, text of its output): submitted as `ray job submit --working-dir . -- python SCRIPT FLAGS`
JOBS_WITH_FLAGS = [
    pytest.param("jobs/probe.py", ["--flag", "seven"], '"flag": "seven"', id="probe"),
    # The probe tests what both ways of submission share. These take minutes, mostly to start workers.
    pytest.param("jobs/train_resnet_captioner.py", [*SMOKE, OUTSIDE], "finished: ", id="train", marks=pytest.mark.soak),
    *(
        pytest.param(
            f"jobs/train_{name}.py", [*SMOKE, OUTSIDE], f"runs/{name}/default/model", id=name, marks=pytest.mark.soak
        )
        for name in ("ldm", "autoregressive")
    ),
]
TRAIN_JOB = "jobs/train_resnet_captioner.py"


@dataclass(frozen=True)
class Cluster:
    checkout: Path
    """The folder in which the head was started: a copy of this repository with `jobs/probe.py`."""
    env: dict[str, str]
    """A user's shell: the token, the environment's programs on the PATH, and the address of the cluster."""
    gcs_address: str
    outputs: dict[tuple[str, ...], str]

    def output_of(self, *args: str) -> str:
        """The output of a job that must succeed. It is submitted once for all tests."""
        if args not in self.outputs:
            self.outputs[args] = self.submit(*args).stdout
        return self.outputs[args]

    def ray(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return run_command(["ray", *args], env=self.env, check=True, timeout_s=120, cwd=self.checkout)

    def submit(self, *args: str, check: bool = True, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        command = ["ray", "job", "submit", *args]
        return run_command(command, env=self.env, check=check, timeout_s=HANG_S, cwd=cwd or self.checkout)


def copy_code(target: Path, probe: str) -> Path:
    target.mkdir()
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, target)
    for package in ("jobs", "mmcore"):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "jobs" / "probe.py").write_text(probe)
    (target / "jobs" / "probe.py").chmod(0o755)
    return target


def wait_for_first_job(dashboard: str, token: str, head: "subprocess.Popen[bytes]") -> None:
    """Wait until the head accepts a job. It refuses jobs while its agent lags by 10 s."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{dashboard}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), headers)
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            urllib.request.urlopen(request, timeout=HANG_S).close()
            return
        except OSError as error:
            if head.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the head takes no job: {error}; its exit code: {head.poll()}")
            time.sleep(0.1)


def programs(folder: Path) -> str:
    """The environment's programs on a PATH without spaces, as Ray's nodes start workers by an unquoted path."""
    environment = ROOT / ".venv"
    if " " not in str(environment):
        return str(environment / "bin")
    folder.mkdir()
    (folder / "venv").symlink_to(environment)
    (folder / "ray").write_text(f'#!/bin/sh\nexec {folder}/venv/bin/python -m ray.scripts.scripts "$@"\n')
    (folder / "ray").chmod(0o755)
    return f"{folder}{os.pathsep}{folder / 'venv' / 'bin'}"


@pytest.fixture(scope="module")
def cluster(short_tmp: Path) -> Iterator[Cluster]:
    """A head in the checkout and a second node with another version installed. Both are ended by process id."""
    checkout = copy_code(short_tmp / "head checkout", PROBE_JOB)  # with a space, as users may have
    old = copy_code(short_tmp / "old", PROBE_JOB)
    with (old / "mmcore" / "errors.py").open("a") as stream:
        stream.write("\n# last week's\n")

    python_bin = str(Path(shutil.which("python") or "").parent)
    base = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    base |= {
        "PATH": f"{programs(short_tmp / 'bin')}{os.pathsep}{python_bin}{os.pathsep}{os.environ['PATH']}",
        # The same on both sides, even with a token file in the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    gcs_port, dashboard_port = free_port(), free_port()
    gcs_address = f"127.0.0.1:{gcs_port}"
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, folder: Path, *args: str) -> subprocess.Popen[bytes]:
        # Instead of `pip install -e .` on that node.
        env = base | {"PYTHONPATH": str(folder)}
        with (short_tmp / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ray", "start", "--block", "--object-store-memory=100000000", *args],
                cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    try:
        head = start(
            "head", checkout, "--head", f"--port={gcs_port}", "--num-cpus=4", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={short_tmp / 'ray'}",
        )  # fmt: skip
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        wait_for_http(f"{dashboard}/api/version", head)
        start(
            "other", old, f"--address={gcs_address}", "--num-cpus=1", '--resources={"other_node": 1}',
            f"--dashboard-agent-listen-port={free_port()}",
        )  # fmt: skip
        wait_for_first_job(dashboard, base["RAY_AUTH_TOKEN"], head)
        user = base | {"RAY_API_SERVER_ADDRESS": dashboard, "PYTHONPATH": str(checkout)}
        yield Cluster(checkout, user, gcs_address, {})
    finally:
        below = [each for process in started for each in psutil.Process(process.pid).children(recursive=True)]
        for process in reversed(started):
            end_group(process)
        for each in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def result_of(output: str) -> dict[str, str]:
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize(("script", "expected"), BARE_JOBS)
def test_submitted_as_a_file(cluster, script, expected):
    output = cluster.output_of(script)
    assert expected in output
    assert "succeeded" in output
    assert f"code from {cluster.checkout}" in output


@pytest.mark.parametrize(("script", "flags", "expected"), JOBS_WITH_FLAGS)
def test_submitted_with_a_working_directory(cluster, script, flags, expected, tmp_path):
    flags = [flag.format(storage=tmp_path) if flag == OUTSIDE else flag for flag in flags]
    done = cluster.submit("--working-dir", ".", "--", "python", script, *flags)
    assert expected in done.stdout
    assert "succeeded" in done.stdout
    assert "code from the job's working directory" in done.stdout


def test_results_are_not_left_in_rays_copy_of_the_working_directory(cluster):
    done = cluster.submit("--working-dir", ".", "--", "python", TRAIN_JOB, *SMOKE, "out", check=False)
    assert done.returncode == 1
    assert "error: --storage out: would lie in Ray's copy of the job's working directory" in done.stdout + done.stderr


@pytest.mark.nightly  # most of its minutes are starts of workers; the probe tests submission
def test_a_training_job_as_a_file_trains(cluster):
    """A short submission. The soak test below submits the file alone."""
    output = cluster.submit("--", TRAIN_JOB, "--variant", "smoke", "--name", "smoke").stdout
    assert "finished: " in output
    assert "succeeded" in output
    assert f"code from {cluster.checkout}" in output


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_training_job_as_a_file_finishes(cluster):
    done = run_command(
        ["ray", "job", "submit", TRAIN_JOB], env=cluster.env, check=True, timeout_s=1500, cwd=cluster.checkout
    )
    assert "succeeded" in done.stdout
    assert "no --variant given: running `shapes`, self-contained" in done.stdout
    assert "--variant report" in done.stdout
    assert (cluster.checkout / "out" / "runs" / "resnet_captioner" / "default" / "_SUCCESS").exists()


def test_a_failing_job_has_failed(cluster):
    done = cluster.submit("--working-dir", ".", "--", "python", "jobs/probe.py", "--fail", check=False)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "error: --fail: this job was told to fail" in output
    assert re.search(r"Job '\w+' failed", output)
    assert "Traceback" not in output


def test_workers_on_another_node_run_the_drivers_code(cluster, short_tmp):
    # The second node has another version, which runs with a plain ray.init().
    env = cluster.env | {"RAY_ADDRESS": cluster.gcs_address}
    command = ["python", "jobs/probe.py", "--plain-init"]
    control = result_of(run_command(command, env=env, check=True, timeout_s=HANG_S, cwd=cluster.checkout).stdout)
    assert control["here"] != control["there"]

    # Submitted without a working directory: connect() ships the checkout.
    shipped = result_of(cluster.output_of("jobs/probe.py"))
    assert shipped["here"] == shipped["there"] == control["here"]
    assert Path(shipped["folder"]).is_relative_to(short_tmp / "ray"), "the copy that Ray made of it"


def test_plain_python_joins_the_cluster_of_ray_address(cluster):
    def run(address: str, check: bool = True, **more: str) -> "subprocess.CompletedProcess[str]":
        env = cluster.env | {"RAY_ADDRESS": address, **more}
        command = ["python", "jobs/probe.py", "--flag", "plain"]
        return run_command(command, env=env, check=check, timeout_s=HANG_S, cwd=cluster.checkout)

    cluster.output_of("jobs/probe.py")  # it ran on the second node, so it joined
    done = run(cluster.gcs_address)
    result = result_of(done.stdout)
    assert result["flag"] == "plain"
    assert result["here"] == result["there"]
    assert f"Ray: joined {cluster.gcs_address}, 5 CPUs, 0 GPUs" in done.stderr

    # Ray itself tries 20 times, one second apart.
    refused = run(cluster.gcs_address, check=False, RAY_AUTH_TOKEN="0" * 64, RAY_NUM_REDIS_GET_RETRIES="2")
    assert refused.returncode == 1
    assert (
        f"error: RAY_ADDRESS={cluster.gcs_address}: something answers there but does not let this job in"
        in refused.stderr
    )
    assert "Traceback" not in refused.stderr
