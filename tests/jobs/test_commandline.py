"""The behaviour of a job in a shell."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import pytest
from conftest import HANG_S, ROOT, ctrl_c_as_in_a_shell

from jobs.runtime import ray_private
from jobs.runtime.commandline import _how_to_go_on, one_line, saying_that_it_stops


def test_a_storage_that_fails_is_one_line_whoever_asked_it() -> None:
    try:
        pyarrow.fs.S3FileSystem(
            endpoint_override="127.0.0.1:9", scheme="http", anonymous=True, connect_timeout=1,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
        ).get_file_info("bucket/a")  # fmt: skip
    except OSError as error:
        line = one_line(error)
    assert line is not None
    assert line.startswith("S3 refused or did not answer: ")
    assert one_line(OSError("of another origin")) is None


def test_an_interrupted_job_tells_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Python that is meant where the environment is active, else by its path; and in the same Ray."""
    python = tmp_path / "env" / "python"
    python.parent.mkdir()
    python.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    argv = ["jobs/train_ldm.py", "--storage", "my out"]
    for path, named in ((python.parent, "python"), ("", "env/python")):
        monkeypatch.setenv("PATH", str(path))
        expected = f"; to go on from what was saved, if anything was: {named} jobs/train_ldm.py --storage 'my out'"
        assert _how_to_go_on(argv) == expected
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert _how_to_go_on(argv).endswith(": RAY_ADDRESS=head:6379 env/python jobs/train_ldm.py --storage 'my out'")
    assert "without --fresh it goes on, with it everything begins anew" in _how_to_go_on([*argv, "--fresh"])
    for program in ("jobs/evaluate.py", "jobs/prepare.py", "jobs/bench/torchrun_loop.py"):
        assert _how_to_go_on([program]) == "", "nothing is committed"


@pytest.mark.process
def test_a_reader_that_is_gone_ends_a_job_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "jobs/evaluate.py", "--help"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=writer, stderr=subprocess.PIPE, text=True,
            timeout=HANG_S,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


LETS_GO_SLOWLY = """
import atexit, sys
from jobs.runtime import ray_private
from jobs.runtime.commandline import run

def lets_go(what):
    print(what, flush=True)
    sys.stdin.readline()

def main():
    atexit.register(lets_go, "removes its folder")
    try:
        lets_go("works")
    finally:
        lets_go("gives its lease back")

run(main)
"""


def start_letting_go() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LETS_GO_SLOWLY],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.process
def test_ctrl_c_does_not_hinder_what_a_finished_job_removes() -> None:
    job = start_letting_go()
    assert job.stdin is not None
    assert job.stdout is not None
    assert job.stderr is not None
    with job:
        job.stdin.write("\n\n")
        job.stdin.flush()
        while job.stdout.readline() != "removes its folder\n":
            assert job.poll() is None
        job.send_signal(signal.SIGINT)
        assert job.stderr.readline().startswith("still ending: ")
        rest = job.communicate("\n", timeout=HANG_S)
    assert rest == ("", "")
    assert job.returncode == 0


@pytest.mark.process
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_does_not_hinder_a_job_that_ends(first: signal.Signals) -> None:
    job = start_letting_go()
    assert job.stdin is not None
    assert job.stdout is not None
    assert job.stderr is not None
    with job:
        assert job.stdout.readline() == "works\n"
        job.send_signal(first)
        assert job.stderr.readline().startswith("stopping: ")
        assert job.stdout.readline() == "gives its lease back\n"
        job.send_signal(signal.SIGINT)
        assert job.stderr.readline().startswith("still ending: ")
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.stderr.readline().startswith("interrupted")
        assert job.stdout.readline() == "removes its folder\n"
        job.send_signal(signal.SIGINT)
        assert job.stderr.readline().startswith("still ending: ")
        rest = job.communicate("\n", timeout=HANG_S)
    assert rest == ("", "")
    assert job.returncode == 128 + first


def test_ctrl_c_of_a_training_says_at_once_that_it_stops(capfd: pytest.CaptureFixture[str]) -> None:
    """The handler of Ray Train says nothing, and waits until the training has ended."""

    class Trainer:
        def _register_sigint_handler(self, controller: object) -> None:
            signal.signal(signal.SIGINT, lambda number, frame: print("ends", file=sys.stderr))

    trainer = Trainer()
    ray_private.replace_ctrl_c_of_train(trainer, saying_that_it_stops)
    with ctrl_c_as_in_a_shell():
        trainer._register_sigint_handler("controller")
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    first, *rest = capfd.readouterr().err.splitlines()
    assert first.startswith("stopping: ")
    assert [line.split(":")[0] for line in rest] == ["ends", *["still ending", "ends"] * 2]
