"""jobs/runtime/lease.py: only one live run at a time, and a dead run blocks nobody."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import TIMEOUT_S, wait_until

import jobs.runtime.lease
from jobs.runtime.lease import LEASE, RENEW_S, TTL_S, Holder, Lease
from mmcore.errors import InputError
from mmcore.storage import Storage

ROOT = Path(__file__).parents[2]
# A lease this long does not expire if a test is paused for a while.
HOUR_S = 3600.0
HOLD = """
import sys
from jobs.runtime.lease import Lease
from mmcore.storage import Storage
with Lease(Storage(sys.argv[1]), "the sweep", ttl_s=3600, renew_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


class Clock:
    """Time that passes only while the lease sleeps."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.on_sleep: Callable[[], object] = lambda: None

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - 1_600_000_000

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jobs.runtime.lease, "time", clock)
    return clock


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_server"))


def held(place: Storage, number: int) -> dict:
    return json.loads(place.read(f"lease/{number:06d}.json"))


def put(place: Storage, number: int, **changes: object) -> Holder:
    """The file of a holder that equals this process except for `changes`."""
    holder = dataclasses.replace(Holder.this_process(HOUR_S), **changes)  # type: ignore[arg-type]
    place.write(f"lease/{number:06d}.json", json.dumps(dataclasses.asdict(holder)).encode())
    return holder


def start_holder(place: Storage, renew_s: float = 15) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place.uri, str(renew_s)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_run_is_not_disturbed_and_gives_back(place: Storage) -> None:
    began = time.time()
    with Lease(place, "the sweep", ttl_s=HOUR_S):
        with pytest.raises(InputError, match=rf"the sweep is being run by process {os.getpid()} on ") as refused:
            Lease(place, "the sweep").__enter__()
        assert "\n" not in str(refused.value)
        assert held(place, 0)["expires_unix"] >= began + HOUR_S
    assert held(place, 0)["expires_unix"] == 0
    with Lease(place, "the sweep") as again:
        assert again.number == 1


def test_a_failing_run_gives_back_too(place: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), Lease(place, "the sweep"):
        raise KeyboardInterrupt
    with Lease(place, "the sweep"):
        pass


@pytest.mark.process
def test_a_killed_run_of_this_machine_is_replaced_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Storage(str(tmp_path))
    process = start_holder(place)
    try:
        with pytest.raises(InputError, match=f"process {process.pid}"):
            Lease(place, "the sweep").__enter__()
    finally:
        process.kill()
    # A zombie keeps its process id.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Lease(place, "the sweep") as lease:
        assert lease.number == 1
    assert f"taken over from process {process.pid}" in capsys.readouterr().err
    process.communicate()


def test_a_process_number_that_is_used_again_is_no_holder(place: Storage) -> None:
    put(place, 0, start="another moment")
    with Lease(place, "the sweep") as lease:
        assert lease.number == 1


# How far the holder's clock is ahead of the clock of the waiting machine.
SKEWS_S = [600, 0, -600, -86_400]


@pytest.mark.parametrize("skew_s", SKEWS_S)
@pytest.mark.parametrize("machine", ["another boot", None])
def test_another_machine_holds_until_it_was_silent_for_long(
    machine: str | None, skew_s: float, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Storage(str(tmp_path))
    # Its process ids mean nothing here, even if a container there has the same host name.
    elsewhere: dict = {"machine": machine} if machine else {"host": "elsewhere"}
    began = clock.now
    put(place, 0, pid=2**22 + 1, expires_unix=began + skew_s + TTL_S, **elsewhere)
    with Lease(place, "the sweep") as lease:
        assert lease.number == 1
        assert TTL_S <= clock.now - began <= TTL_S + 1
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"the sweep is held by process \d+ on \S+: waiting 60 s for a sign of life", told[0])
    assert "taken over from" in told[1]


@pytest.mark.parametrize("skew_s", SKEWS_S)
def test_another_machine_that_gives_a_sign_of_life_is_left_alone(skew_s: float, tmp_path: Path, clock: Clock) -> None:
    place = Storage(str(tmp_path))
    began = clock.now

    def renew() -> None:
        renewals = (clock.now - began) // RENEW_S
        put(place, 0, host="elsewhere", expires_unix=began + skew_s + renewals * RENEW_S + TTL_S)

    renew()
    clock.on_sleep = renew
    with pytest.raises(InputError, match=r"is being run by process \d+ on elsewhere: wait for it or stop it"):
        Lease(place, "the sweep").__enter__()
    assert clock.now <= began + RENEW_S, "it waited on after the sign of life"
    assert (place / LEASE).list() == ["000000.json"]


def test_a_live_process_of_this_machine_holds_whatever_its_clock_has_become(place: Storage, clock: Clock) -> None:
    put(place, 0, expires_unix=clock.now - 86_400)
    with pytest.raises(InputError, match=rf"is being run by process {os.getpid()} on "):
        Lease(place, "the sweep").__enter__()


def test_old_files_do_not_pile_up(place: Storage) -> None:
    for _ in range(5):
        with Lease(place, "the sweep"):
            pass
    assert (place / LEASE).list() == ["000003.json", "000004.json"]


def test_the_holder_renews(tmp_path: Path) -> None:
    place = Storage(str(tmp_path))
    with Lease(place, "the sweep", ttl_s=HOUR_S, renew_s=0.05):
        first = held(place, 0)["expires_unix"]
        wait_until(lambda: held(place, 0)["expires_unix"] > first, None, "renewal")
        with pytest.raises(InputError, match="is being run"):
            Lease(place, "the sweep").__enter__()


def test_a_holder_that_was_replaced_is_told_and_leaves_its_successor_alone(tmp_path: Path) -> None:
    place = Storage(str(tmp_path))
    lines: list[str] = []
    with Lease(place, "the sweep", renew_s=0.05, on_lost=lines.append):
        successor = put(place, 1, host="elsewhere")
        wait_until(lambda: bool(lines), None, "line")
    assert lines == [
        f"the sweep was taken over by process {os.getpid()} on elsewhere; this run ends, what it committed stays"
    ]
    assert held(place, 1) == dataclasses.asdict(successor)


@pytest.mark.process
def test_a_holder_that_was_replaced_ends(tmp_path: Path) -> None:
    place = Storage(str(tmp_path))
    process = start_holder(place, renew_s=0.05)
    put(place, 1, host="elsewhere")
    assert process.wait(TIMEOUT_S) == 1
    _, err = process.communicate()
    assert err.startswith("error: the sweep was taken over by process")
    assert len(err.splitlines()) == 1


def test_of_many_at_once_one_gets_it(place: Storage) -> None:
    won: list[Lease] = []
    refused: list[InputError] = []
    barrier = threading.Barrier(6)

    def enter() -> None:
        lease = Lease(place, "the sweep", ttl_s=HOUR_S)
        barrier.wait()
        try:
            won.append(lease.__enter__())
        except InputError as error:
            refused.append(error)

    put(place, 0, start="another moment")
    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    won[0].__exit__(None, None, None)


def test_a_storage_that_fails_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Storage(str(tmp_path))
    with Lease(place, "the sweep", renew_s=0.05):
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error", "disk")))
            text = ""

            def told() -> bool:
                nonlocal text
                text += capsys.readouterr().err
                return "the lease could not be renewed (disk: Input/output error" in text

            wait_until(told, None, "word of the failure")
        now = held(place, 0)["expires_unix"]
        wait_until(lambda: held(place, 0)["expires_unix"] > now, None, "renewal")


def test_a_storage_that_fails_at_the_end_hides_nothing(
    place: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(place, "the sweep"):
        monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space", "disk")))
    assert "the lease could not be given back (disk: No space left on device" in capsys.readouterr().err
