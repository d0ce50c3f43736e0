"""A training whose machine is lost: it goes on on another one, and says so in a line of its own."""

import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import ROOT, end_group, free_port, wait_for_http
from gate import AHEAD, Gate
from job_output import driver_lines
from kills import TIMEOUT_S, wait_for_step, wait_until

from mmcore.storage import Storage

FLAGS = ["--variant", "smoke", "--dataset", "tiny", "--split", "split", "--num-epochs", "10", "--max-steps", "30"]


@pytest.fixture
def start_node(short_tmp: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`start_node(*flags)` is ``ray start`` with these flags; its environment is `start_node.env`."""
    started: list[subprocess.Popen[bytes]] = []
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"

    def start(*flags: str) -> subprocess.Popen[bytes]:
        command = ["ray", "start", "--block", "--object-store-memory=100000000", *flags]
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **quiet))
        return started[-1]

    start.env = env  # type: ignore[attr-defined]
    yield start
    for process in reversed(started):
        end_group(process)


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(1800)
def test_it_goes_on_and_says_from_where(start_node: Any, start_job: Any, short_tmp: Path, tmp_path: Path) -> None:
    storage, gate, log = Storage(str(tmp_path / "out")), Gate(tmp_path), tmp_path / "job.log"
    tiny.write_dataset(storage)
    port, dashboard = free_port(), free_port()
    head = start_node(
        "--head", f"--port={port}", "--num-cpus=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}", f"--temp-dir={short_tmp / 'ray'}",
    )  # fmt: skip
    wait_for_http(f"http://127.0.0.1:{dashboard}/api/version", head)
    machine = [f"--address=127.0.0.1:{port}", "--num-cpus=2"]
    lost = start_node(*machine)
    gate.allow(10 + AHEAD)
    env = {**start_node.env, "RAY_ADDRESS": f"127.0.0.1:{port}", "GATE": str(tmp_path)}
    job = start_job("tests/gated_job.py", "train_pixel_diffusion", *FLAGS, "--storage", storage, env=env, log=log)
    run = storage / "runs" / "pixel_diffusion" / "default"
    wait_for_step(run, 10, job)

    def said(*words: str) -> list[str]:
        return [line for line in driver_lines(log.read_text()) if all(word in line for word in words)]

    end_group(lost)
    wait_until(lambda: bool(said("train pixel_diffusion: lost ", "; going on from step 10")), job, "word of the loss")
    wait_until(lambda: bool(said("stalled: ", "CPU: 0.5", "missing: CPU")), job, "word of what is missing")
    gate.open()
    start_node(*machine)
    assert job.wait(TIMEOUT_S) == 0, log.read_text()[-4000:]
    output = log.read_text()
    assert "Traceback" not in output
    # What Ray's own core says of the lost node is a line or two.
    assert sum("TrainController" in line for line in output.splitlines()) <= 2, output
    assert len(said(" lost ")) == 1
