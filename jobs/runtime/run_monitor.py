"""What the driver of a training knows of its workers: their progress, restarts and mistakes."""

from dataclasses import dataclass
from typing import Any, TypedDict

import ray

# A crash is retried this often; losing a machine is no crash and is not counted.
MAX_CRASHES = 3


class RunProgress(TypedDict, total=False):
    """What workers tell of a training, beside the means of its newest step by name; `committed`: a step, too."""

    doing: str
    step: int
    total: int
    epoch: float
    loss: float
    committed: int


class RestartBudget:
    """Tells crashes from lost machines: each start of the workers after the first is one or the other.

    Ray's own counting takes a reclaimed spot machine for a crash wherever the cloud's notice does not reach it.
    """

    def __init__(self) -> None:
        self.num_starts = 0
        self.machines: set[str] = set()

    def runs_on(self, machine: str) -> None:
        """A worker runs there. Only such a machine is missed: the autoscaler takes idle ones back."""
        self.machines.add(machine)

    def started(self, alive: set[str]) -> int:
        """The workers have started while these machines are alive; returns the crashes so far."""
        self.num_starts += 1
        return max(0, self.num_starts - 1 - len(self.machines - alive))


@dataclass(frozen=True)
class RunState:
    """What the monitor knows: `progress` of the workers, the `machines` they ran on, and the crashes among restarts.

    `resumes` holds the step and the total of each start from a checkpoint.
    """

    progress: RunProgress
    machines: frozenset[str]
    num_crashes: int
    crash: str
    trace: str
    resumes: tuple[tuple[int, int], ...] = ()


class Restarts:
    """What a driver says of restarts: each lost machine, each crash and each resume once."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.num_crashes, self.trace = 0, ""
        self.num_resumes = 0

    def lines(self, state: RunState, nodes: list[dict[str, Any]]) -> list[str]:
        """`nodes`: those of `ray.nodes()`, which lists dead ones too."""
        committed = state.progress.get("committed")
        going_on = f"going on from {'the start' if committed is None else f'step {committed}'}"
        dead = [node for node in nodes if not node["Alive"] and node["NodeID"] in state.machines - self.lost]
        self.lost |= {node["NodeID"] for node in dead}
        lines = []
        if dead:
            names = ", ".join(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in dead)
            lines.append(f"lost {names}; {going_on}")
        # The one that is too many ends the run, which says so.
        if self.num_crashes < state.num_crashes <= MAX_CRASHES:
            lines.append(f"crash {state.num_crashes} of at most {MAX_CRASHES}: {state.crash}; {going_on}")
            if state.trace != self.trace:
                lines.append(state.trace)
            self.num_crashes, self.trace = state.num_crashes, state.trace
        lines += [f"resumed at step {step} of {total}" for step, total in state.resumes[self.num_resumes :]]
        self.num_resumes = len(state.resumes)
        return lines


@ray.remote(num_cpus=0)
class RunMonitor:
    """The newest progress of a run, its restarts and the mistakes that its workers met. Lives beside the driver."""

    def __init__(self) -> None:
        self.progress: RunProgress = {}
        self.mistakes: dict[int, str] = {}
        self.budget = RestartBudget()
        self.crash, self.trace = "a worker was killed", ""
        self.num_crashes = 0
        self.resumes: list[tuple[int, int]] = []

    def start(self, rank: int, machine: str) -> str | None:
        """A worker starts on `machine`, a node of Ray. Returns the mistake for which it must not."""
        self.budget.runs_on(machine)
        if rank == 0 and not self.mistakes:
            self.num_crashes = self.budget.started({node["NodeID"] for node in ray.nodes() if node["Alive"]})
            if self.num_crashes > MAX_CRASHES:
                self.mistakes[rank] = (
                    f"training crashed {self.num_crashes} times, last: {self.crash}; "
                    "the same command goes on from the last checkpoint"
                )
        return self.first_mistake()

    def update(self, progress: RunProgress) -> None:
        self.progress |= progress

    def state(self) -> RunState:
        machines = frozenset(self.budget.machines)
        return RunState(self.progress, machines, self.num_crashes, self.crash, self.trace, tuple(self.resumes))

    def add_resume(self, step: int, total: int) -> None:
        """The workers go on from the checkpoint of `step`."""
        self.resumes.append((step, total))

    def add_crash(self, text: str, trace: str = "") -> None:
        self.crash, self.trace = text, trace

    def add_mistake(self, rank: int, text: str) -> int:
        """Returns how many workers have met one."""
        self.mistakes[rank] = text
        return len(self.mistakes)

    def first_mistake(self) -> str | None:
        return self.mistakes[min(self.mistakes)] if self.mistakes else None
