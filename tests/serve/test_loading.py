"""What is printed while the models load, with a fake Ray Serve."""

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import ray_logging
from ray.serve.schema import DeploymentStatus

from serve import loading
from serve.ray_private import worker_lines_left_out


def unscheduled(required: dict[str, float], available: dict[str, float]) -> str:
    return (
        "WARNING controller 12 -- Deployment 'jobs' in application 'mmcore' has 1 replicas that have taken more than "
        "30s to be scheduled. This may be due to waiting for the cluster to auto-scale or for a runtime environment to "
        f"be installed. Resources required for each replica: {json.dumps(required)}, total resources available: "
        f"{json.dumps(available)}. Use `ray status` for more details."
    )


SLOW = [
    unscheduled({}, {}),
    unscheduled({"CPU": 0.5}, {"CPU": 7.5}),
    "WARNING controller 12 -- Proxy actor reported not ready on node 0a1b",
    "Deployment 'x' in application 'mmcore' has 1 replicas that have taken more than 30s to initialize.",
    "This may be caused by a slow __init__ or reconfigure method.",
]
WANTED = [
    unscheduled({"CPU": 0.5, "GPU": 1.0}, {"CPU": 7.5}),
    unscheduled({"CPU": 0.5}, {"CPU": 0.25}),
    "ERROR controller 12 -- Exception in replica 'x', the replica will be stopped.",
]


def test_only_warnings_of_a_slow_start_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    dispatcher = ray_logging.WorkerStandardStreamDispatcher()
    dispatcher.add_handler("ray_print_logs", lambda data: printed.extend(data["lines"]))
    monkeypatch.setattr(ray_logging, "global_worker_stdstream_dispatcher", dispatcher)
    with worker_lines_left_out(loading.only_slow):
        dispatcher.emit({"lines": [*SLOW, *WANTED], "pid": 12})
    assert printed == WANTED
    dispatcher.emit({"lines": SLOW, "pid": 12})
    assert printed == [*WANTED, *SLOW], "a process that starts again later may have a reason to be slow"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"api": DeploymentStatus.HEALTHY, "a": DeploymentStatus.UPDATING}, "serve: still loading: a"),
        ({}, "serve: still loading"),
        (RuntimeError("gone"), "serve: still loading; Ray Serve does not say what (RuntimeError)"),
    ],
)
def test_what_still_loads_is_told(answer: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    spoken = threading.Event()

    def status() -> Any:
        if isinstance(answer, Exception):
            raise answer
        deployments = {name: SimpleNamespace(status=each) for name, each in answer.items()}
        return SimpleNamespace(applications={"mmcore": SimpleNamespace(deployments=deployments)})

    def say(line: str) -> None:
        said.append(line)
        spoken.set()

    monkeypatch.setattr(loading, "_TELL_EVERY_S", 0.001)
    monkeypatch.setattr("ray.serve.status", status)
    with loading.told("mmcore", say):
        assert spoken.wait(60.0)
    assert set(said) == {line}
    assert not [thread for thread in threading.enumerate() if thread.name == "loading"]
