"""Crashes and lost machines are told apart, and repeated crashes end a run."""

import dataclasses
from typing import Any

import pytest
import ray

from jobs.runtime.run_monitor import MAX_CRASHES, RestartBudget, Restarts, RunMonitor, RunState


def test_the_first_start_is_no_crash_and_each_further_one_is() -> None:
    budget = RestartBudget()
    budget.runs_on("a")
    assert [budget.started({"a", "b"}) for _ in range(4)] == [0, 1, 2, 3]


def test_lost_machines_are_not_counted_however_many() -> None:
    budget = RestartBudget()
    for start in range(50):
        budget.runs_on(f"spot-{start}")
        assert budget.started({"head", f"spot-{start}"}) == 0


def test_a_crash_among_lost_machines_is_counted() -> None:
    budget = RestartBudget()
    crashes = []
    for machine in ("spot-0", "spot-1", "spot-1", "spot-2", "spot-2"):
        budget.runs_on(machine)
        crashes.append(budget.started({"head", machine}))
    assert crashes == [0, 0, 1, 1, 2]


def test_an_idle_machine_that_is_taken_back_buys_no_crash() -> None:
    budget = RestartBudget()
    budget.runs_on("spot-0")
    assert budget.started({"spot-0", "idle"}) == 0
    assert budget.started({"spot-0"}) == 1


def node(name: str, alive: bool) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1"}


def test_a_lost_machine_and_a_crash_are_each_said_once() -> None:
    """Machines of the run. A crash of workers because of a lost machine does not count as a crash."""
    restarts, gone = Restarts(), [node("idle", False), node("spot-1", False), node("spot-2", False)]
    state = RunState({}, frozenset({"spot-1"}), 0, "a worker was killed", "")
    assert restarts.lines(state, [node("spot-1", True)]) == []
    assert restarts.lines(state, gone) == ["lost spot-1 (10.0.0.1); going on from the start"]
    crash, both = "RuntimeError: peer closed (worker 1)", frozenset({"spot-1", "spot-2"})
    state = RunState({"committed": 200}, both, 0, crash, "Traceback of gloo")
    assert restarts.lines(state, gone) == ["lost spot-2 (10.0.0.1); going on from step 200"]
    lines = [restarts.lines(dataclasses.replace(state, num_crashes=crashes), gone) for crashes in (1, 1, 2, 4)]
    first, second = (f"crash {each} of at most 3: {crash}; going on from step 200" for each in (1, 2))
    assert lines == [[first, "Traceback of gloo"], [], [second], []]


def test_each_resume_is_said_once() -> None:
    restarts, state = Restarts(), RunState({}, frozenset(), 0, "", "", ((10, 40),))
    assert restarts.lines(state, []) == ["resumed at step 10 of 40"]
    later = dataclasses.replace(state, resumes=((10, 40), (24, 40)))
    assert [restarts.lines(later, []) for _ in range(2)] == [["resumed at step 24 of 40"], []]


@pytest.mark.usefixtures("ray_local")
def test_the_monitor_ends_a_run_that_crashes_again_and_again() -> None:
    monitor = RunMonitor.remote()  # type: ignore[attr-defined]
    here = ray.get_runtime_context().get_node_id()
    ray.get(monitor.add_crash.remote("RuntimeError: it broke (worker 0)"))
    answers = [ray.get(monitor.start.remote(rank, here)) for _ in range(MAX_CRASHES + 2) for rank in (0, 1)]
    assert answers[:-2] == [None] * 2 * (MAX_CRASHES + 1)
    last = (
        f"training crashed {MAX_CRASHES + 1} times, last: RuntimeError: it broke (worker 0); "
        "the same command goes on from the last checkpoint"
    )
    assert answers[-2:] == [last, last], "every worker is told"
